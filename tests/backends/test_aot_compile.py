"""Every Triton kernel in every shipped configuration compiles for the GPUs it claims, within their limits.

No GPU is needed: tools/aot.py compiles what the launchers would launch, in two processes outside the interpreter. The
ordinary run compiles each kernel once, and two for AMD; `make test-gpu-code` all of them for the architectures that
tables have rows for, and for the others that take these rows the configuration of each with the largest tile.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import pytest
import torch

import gpu_kernels
from emulation import build
from fastlm._core import architecture

triton = pytest.importorskip("triton", reason="triton is not installed")
kernels = pytest.importorskip("fastlm.kernels")
forward = pytest.importorskip("fastlm.kernels.attention.forward")
backward = pytest.importorskip("fastlm.kernels.attention.backward")
decoding = pytest.importorskip("fastlm.kernels.attention.decode")

# Kilobytes of shared memory that a block may have: "Technical Specifications per Compute Capability" of the CUDA C++
# Programming Guide; of local data share that a workgroup may have: "LDS" of AMD's ISA guides of CDNA3, CDNA4, RDNA3 and
# RDNA4.
SHARED_KB = {
    "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_103": 227, "sm_120": 99,
    "gfx942": 64, "gfx950": 160, "gfx1100": 64, "gfx1201": 64,
}  # fmt: skip
REGISTERS = 64 * 1024  # of NVIDIA's multiprocessor: what a block of a launch may take at most
# Vector registers of a lane that an AMD wavefront may name, and that its SIMD has (the same guides: 512 in CDNA3's
# unified file, 192 KB for 32 lanes of 4 bytes in RDNA3 and RDNA4). A workgroup runs on four SIMDs.
VGPRS = {"gfx942": (512, 512), "gfx950": (512, 512), "gfx1100": (256, 1536), "gfx1201": (256, 1536)}
SIMDS = 4
AOT = Path(__file__).resolve().parents[2] / "tools" / "aot.py"


def _aot(cache, *arguments, **settings):
    """The lines that tools/aot.py prints, compiling from scratch into the folder `cache`."""
    done = subprocess.run(
        [sys.executable, AOT, *map(str, arguments)],
        env={
            **os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1",
            "FASTLM_AOT_RESULTS": str(build.cache_folder() / "triton"),
            "TRITON_DISABLE_LINE_INFO": "1",  # nobody reads it, and it takes time
            **settings,
        },
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


ALL = pytest.param("all", marks=pytest.mark.gpu_code)


@pytest.fixture(scope="module", params=["one", ALL])
def compiled(request, tmp_path_factory):
    """Resources of what was compiled, kept by the hash of the kernels and of the compiler."""
    folders = Path(kernels.__file__).parent, AOT.parent / "launches"
    sources = [
        *sorted(AOT.parent.glob("aot*.py")),
        Path(architecture.__file__),
        *(p for folder in folders for p in sorted(folder.rglob("*.py"))),
    ]
    versions = (sys.version, triton.__version__, torch.__version__)
    with build.locked(folder := build.cache_folder(), "triton"):
        kept = folder / f"triton-{request.param}-{build.digest(*versions, *(p.read_bytes() for p in sources))}.json"
        if not kept.exists():
            cache = tmp_path_factory.mktemp("triton")
            (folder / "triton").mkdir(exist_ok=True)
            with ThreadPoolExecutor(2) as pool:
                lines = "".join(pool.map(lambda share: _aot(cache, request.param, share, 2), range(2)))
            made = kept.with_suffix(f".{os.getpid()}")
            made.write_text(lines)
            made.rename(kept)
    return [json.loads(line) for line in kept.read_text().splitlines()]


@pytest.mark.parametrize("compiled", [ALL], indirect=True)
def test_every_architecture_got_the_same_kernels(compiled):
    kernels = {arch: {line["name"].split()[1] for line in compiled if line["arch"] == arch} for arch in SHARED_KB}
    assert all(found == kernels["sm_80"] for found in kernels.values())
    assert len(kernels["sm_80"]) > 5


@pytest.mark.parametrize("compiled", [ALL], indirect=True)
def test_every_row_of_attentions_tables_was_compiled(compiled):
    tables = {
        "_attention_fwd_kernel": [forward.FORWARD],
        "attention_bwd_keys_kernel": [backward.KEYS],
        "attention_bwd_queries_kernel": [backward.QUERIES],
        "_attention_bwd_mask_kernel": [backward.MASK],
        "_attention_decode_kernel": [decoding.FEW, decoding.MANY],
    }
    names = [line["name"] for line in compiled]
    for kernel, table in ((kernel, table) for kernel, both in tables.items() for table in both):
        for arch, by_size in table.items():
            for M, N, warps, stages in chain(*(sizes.values() for sizes in by_size if sizes)):
                wanted = re.compile(rf"{arch} {kernel} .*\bM={M}, N={N}, .* warps={warps} stages={stages} ")
                assert any(map(wanted.search, names)), wanted.pattern


def test_the_limits_that_tiles_are_chosen_by_are_the_vendors():
    assert {name: architecture.parse(name).shared_memory for name in SHARED_KB} == {
        name: kilobytes * 1024 for name, kilobytes in SHARED_KB.items()
    }


HALF = re.compile(r"\*(bf|fp)16'")


def _nvidia(line):
    return line["arch"].startswith("sm_")


ATTENTION = re.compile(r"attention_(fwd|bwd_keys|bwd_queries|bwd_mask|decode)_kernel.*\bBLOCK_D=(\d+)")
ANY = 2**31


def _allowed(line):
    """(accesses to the stack inside loops, bytes of it) that a kernel may have.

    What a program puts aside once, before its loops, and takes back once, after them, costs it nothing. Attention may
    do more, which needs whole rows of an operand at once: on NVIDIA for the gradients of large heads' keys in float32,
    whose products run on FMA units. RDNA has 256 registers for what CDNA has 512, and its matrix instructions hold an
    operand's rows twice, so that heads from 128 on and float32 spill. CDNA puts nothing into memory: what exceeds
    scalar registers goes to lanes of vector registers.
    """
    attention = ATTENTION.search(line["name"])
    whole_rows = attention and (int(attention[2]) >= 128, not HALF.search(line["name"]))
    if _nvidia(line):
        return (ANY, 512) if attention and attention[1] == "bwd_keys" and all(whole_rows) else (0, 128)
    if attention and line["arch"].startswith("gfx1"):
        return (ANY, 3072) if any(whole_rows) else (0, 128)
    return 0, 0


def test_no_spills_in_loops_and_little_stack(compiled):
    over = [line for line in compiled if line["spills"] > _allowed(line)[0] or line["STACK"] > _allowed(line)[1]]
    assert not over, "\n".join(map(str, over))
    local = [line for line in compiled if line["LOCAL"]]
    assert not local, "\n".join(map(str, local))


def test_shared_memory_and_registers_within_the_limits(compiled):
    for line in compiled:
        arch = "sm_86" if line["arch"] == "sm_80" else line["arch"]  # which, like sm_89 and sm_120, takes its rows
        assert line["SHARED"] + line["dynamic"] <= SHARED_KB[arch] * 1024, line
        if _nvidia(line):
            assert line["REG"] * 32 * line["warps"] <= REGISTERS, line
        else:
            wavefront, simd = VGPRS[line["arch"]]
            assert line["wavefront"] == (64 if line["arch"].startswith("gfx9") else 32), line
            assert line["wavefront"] * line["warps"] <= 1024, line  # a workgroup's threads
            assert line["REG"] <= wavefront, line
            assert line["REG"] * -(-line["warps"] // SIMDS) <= simd, line


def _products(line):
    return {name for name in ("wgmma", "tcgen05", "mma", "mfma", "wmma") if line.get(name)}


def test_attention_multiplies_on_hoppers_tensor_cores(compiled):
    """wgmma takes 64 rows of 2-byte values, as every tile but those of the largest head sizes has."""
    rows = {"fwd": "M", "bwd_queries": "M", "bwd_keys": "N"}
    seen = set()
    for line in compiled:
        kernel = re.search(r"attention_(\w+)_kernel", line["name"])
        if line["arch"] != "sm_90" or not kernel or kernel[1] not in rows or not HALF.search(line["name"]):
            continue
        if int(re.search(rf"\b{rows[kernel[1]]}=(\d+)", line["name"])[1]) >= 64:
            assert line["wgmma"] > 0, line
            seen.add(kernel[1])
    assert seen == set(rows)


def test_attention_multiplies_in_matrix_instructions(compiled):
    """Of 2-byte values everywhere; of 4-byte ones, in full precision, on AMD's CDNA alone."""
    seen = set()
    for line in compiled:
        if re.search(r"attention_(fwd|bwd_queries|bwd_keys|bwd_mask|decode)_kernel", line["name"]):
            cdna = line["arch"].startswith("gfx9")
            if HALF.search(line["name"]) or cdna:
                own = {"mfma"} if cdna else {"wgmma", "tcgen05", "mma"} if _nvidia(line) else {"wmma"}
                assert _products(line) & own, line
                seen.add(line["arch"])
    assert seen >= {"sm_90", "gfx942"}


def test_registers_leave_room_for_as_many_wavefronts_as_llvm_says(compiled):
    lines = [line for line in compiled if not _nvidia(line)]
    assert lines
    for line in lines:
        assert gpu_kernels.warps_by_registers(line) == line["waves"], line


def test_the_page_has_every_kernel_on_every_architecture(compiled):
    text = gpu_kernels.PAGE.read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    kernels = {gpu_kernels.kernel_of(line) for line in compiled if line["arch"] == "sm_90"}
    assert set(sections) == set(SHARED_KB)
    for arch, section in sections.items():
        assert set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == kernels, f"{arch}: {gpu_kernels.__doc__}"


@pytest.fixture(scope="module")
def compile_keys(tmp_path_factory):
    """What compiled kernels are kept by, where Triton fuses floating-point operations by default."""
    return _aot(tmp_path_factory.mktemp("triton"), "keys", TRITON_DEFAULT_FP_FUSION="1")


def test_no_recompilation_for_another_row_count(compile_keys):
    """One compiled kernel serves every number of rows, seed and probability, or training would stall on batches."""
    keys = {}
    for line in map(json.loads, compile_keys.splitlines()):
        keys.setdefault(line["op"], {})[line["M"]] = line["keys"]
    for op, by_rows in keys.items():
        assert len(by_rows) == 5
        assert len({json.dumps(k) for k in by_rows.values()}) == 1, op


def test_what_triton_fuses_by_default_changes_no_kernel(compile_keys, tmp_path):
    """Results depend on it to the bit, and the default is another from one version of Triton to the next."""
    assert _aot(tmp_path, "keys", TRITON_DEFAULT_FP_FUSION="0") == compile_keys
