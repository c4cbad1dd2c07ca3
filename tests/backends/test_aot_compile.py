"""Every Triton kernel in every shipped configuration compiles for the GPUs it claims, within their limits.

No GPU is needed: tools/aot.py compiles what the launchers would launch, in two processes outside the interpreter. The
ordinary run compiles each kernel once, `make test-gpu-code` all of them.
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

from emulation import build

triton = pytest.importorskip("triton", reason="triton is not installed")
kernels = pytest.importorskip("fastlm.kernels")
forward = pytest.importorskip("fastlm.kernels.attention.forward")
backward = pytest.importorskip("fastlm.kernels.attention.backward")
decoding = pytest.importorskip("fastlm.kernels.attention.decode")

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have
REGISTERS = 64 * 1024  # in a multiprocessor: what a block of a launch may take at most
AOT = Path(__file__).resolve().parents[2] / "tools" / "aot.py"


def _aot(cache, *arguments):
    """The lines that tools/aot.py prints, compiling from scratch into the folder `cache`."""
    done = subprocess.run(
        [sys.executable, AOT, *map(str, arguments)],
        env={
            **os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1",
            "TRITON_DISABLE_LINE_INFO": "1",  # nobody reads it, and it takes time
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
    sources = [AOT, *(path for folder in folders for path in sorted(folder.rglob("*.py")))]
    versions = (sys.version, triton.__version__, torch.__version__)
    with build.locked(folder := build.cache_folder(), "triton"):
        kept = folder / f"triton-{request.param}-{build.digest(*versions, *(p.read_bytes() for p in sources))}.json"
        if not kept.exists():
            cache = tmp_path_factory.mktemp("triton")
            with ThreadPoolExecutor(2) as pool:
                lines = "".join(pool.map(lambda share: _aot(cache, request.param, share, 2), range(2)))
            made = kept.with_suffix(f".{os.getpid()}")
            made.write_text(lines)
            made.rename(kept)
    return [json.loads(line) for line in kept.read_text().splitlines()]


@pytest.mark.parametrize("compiled", [ALL], indirect=True)
def test_every_architecture_got_the_same_kernels(compiled):
    kernels = {arch: {line["name"].split()[1] for line in compiled if line["arch"] == arch} for arch in SHARED_LIMIT}
    assert kernels[80] == kernels[90] == kernels[100]
    assert len(kernels[80]) > 5


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
    for kernel, arch, table in ((k, a, t) for k, both in tables.items() for a in SHARED_LIMIT for t in both):
        by_size = table[max(key for key in table if key <= arch)]
        for M, N, warps, stages in chain(*(sizes.values() for sizes in by_size if sizes)):
            wanted = re.compile(rf"sm_{arch} {kernel} .*\bM={M}, N={N}, .* warps={warps} stages={stages} ")
            assert any(map(wanted.search, names)), wanted.pattern


def _is_exempt(line):
    """Attention's key gradients in float32 with large heads may spill: they need whole rows of an operand at once.

    Products in full precision run on the FMA units, not on the tensor cores.
    """
    name = line["name"]
    single = "attention_bwd_keys_kernel" in name and not re.search(r"\*(bf|fp)16'", name)
    return single and int(re.search(r"\bBLOCK_D=(\d+)", name)[1]) >= 128


def test_no_spills_in_loops_and_little_stack(compiled):
    """What a program puts aside once, before its loops, and takes back once, after them, costs it nothing."""
    spilled = [line for line in compiled if (line["spills"] and not _is_exempt(line)) or line["LOCAL"]]
    assert not spilled, "\n".join(map(str, spilled))
    large = [line for line in compiled if line["STACK"] > (512 if _is_exempt(line) else 128)]
    assert not large, "\n".join(map(str, large))


def test_shared_memory_and_registers_within_the_limits(compiled):
    for line in compiled:
        assert line["SHARED"] + line["dynamic"] <= SHARED_LIMIT[line["arch"]], line
        assert line["REG"] * 32 * line["warps"] <= REGISTERS, line


def test_attention_multiplies_on_hoppers_tensor_cores(compiled):
    """wgmma takes 64 rows of 2-byte values, as every tile but those of the largest head sizes has."""
    rows = {"fwd": "M", "bwd_queries": "M", "bwd_keys": "N"}
    seen = set()
    for line in compiled:
        kernel = re.search(r"attention_(\w+)_kernel", line["name"])
        if line["arch"] != 90 or not kernel or kernel[1] not in rows or not re.search(r"\*(bf|fp)16'", line["name"]):
            continue
        if int(re.search(rf"\b{rows[kernel[1]]}=(\d+)", line["name"])[1]) >= 64:
            assert line["wgmma"] > 0, line
            seen.add(kernel[1])
    assert seen == set(rows)


def test_no_recompilation_for_another_row_count(tmp_path):
    """One compiled kernel serves every number of rows, seed and probability, or training would stall on batches."""
    keys = {}
    for line in map(json.loads, _aot(tmp_path, "keys").splitlines()):
        keys.setdefault(line["op"], {})[line["M"]] = line["keys"]
    for op, by_rows in keys.items():
        assert len(by_rows) == 5
        assert len({json.dumps(k) for k in by_rows.values()}) == 1, op
