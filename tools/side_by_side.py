"""The page docs/design/side_by_side.md: our Triton kernels beside the same ops' kernels of other projects, compiled.

    python tools/side_by_side.py --peers FOLDER --tutorial FILE
    python tools/side_by_side.py --ours sm_90

FOLDER holds the unpacked wheels of liger-kernel 0.8.5 and fla-core 0.6.0 (with einops, which the latter imports), FILE
is python/tutorials/06-fused-attention.py of Triton's repository. Both run through their own launchers, with the launch
recorded, as ours do; each is compiled ahead of time for the same shapes and dtypes, and what is counted is the SASS.
The second form prints a JSON line for each of our own kernels.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

import aot
import aot_resources
import sass
import side_by_side_page
from fastlm._core.architecture import SM90, Architecture, parse
from fastlm.kernels import _common, attention, cross_entropy, layer_norm, rms_norm
from fastlm.kernels.attention import forward, tables

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/design/side_by_side.md"
RESULTS = ROOT / "benchmarks/results/2026-11-29-side-by-side.json"
ARCHITECTURES = tuple(map(parse, ("sm_80", "sm_90", "sm_100")))
BF16, FP16, FP32, INT64 = torch.bfloat16, torch.float16, torch.float32, torch.int64
ROWS = 32  # of a backward program: 4224 rows on 132 multiprocessors
MATRIX = ("UTCHMMA", "HGMMA", "HMMA")  # SASS of tcgen05.mma, wgmma and mma.sync


class Device(NamedTuple):
    """NVIDIA's data sheets of A100 80 GB, H100 SXM and B200: multiprocessors, GHz (boost) and GB/s."""

    multiprocessors: int
    clock: float
    bandwidth: float


DEVICES = {"sm_80": Device(108, 1.41, 2039), "sm_90": Device(132, 1.98, 3350), "sm_100": Device(148, 1.965, 8000)}
PARTS = 4  # of a multiprocessor, each of which issues an instruction of a warp a cycle

Launch = tuple[Any, tuple, dict]


class Case(NamedTuple):
    """A kernel to compile."""

    op: str
    N: int  # columns of a row; of attention, the head size
    who: str
    launch: Callable[[], None]
    turns: Callable[[list[sass.Region], int, int], list[float]]  # (regions, threads, N): of each loop, for a program
    rows: int = 1  # that a program goes over
    padded: float = 1.0  # columns that its tiles have, for each that there is
    dtype: str = "bfloat16"


@dataclass
class Counted:
    """What a kernel was compiled to. Instructions are of a thread; a row's bytes are those of its wide accesses."""

    op: str
    N: int
    dtype: str
    arch: str
    who: str
    warps: int
    registers: int
    shared: int
    stack: int
    spills: int
    loop: int  # instructions of the loop that has most of the work, or of the kernel where there is none
    per_element: float = 0.0
    loaded: float = 0.0  # bytes a row
    stored: float = 0.0
    wide: float = 0.0  # of these, the share in 16-byte accesses
    issue: float = 0.0  # time to issue the instructions over time to move a row's own bytes


def compiled(arch: Architecture, launch: Launch) -> tuple[Any, int]:
    """(the kernel of a recorded launch, its warps)."""
    kernel, options, signature, constants, attributes = aot.specialized(launch, aot.gpu_target(arch))
    source = aot.ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=aot.gpu_target(arch), options=options.__dict__), options.num_warps


def _moved(region: sass.Region, outside: bool) -> tuple[int, int, int]:
    """Bytes that a thread (loads, stores, moves 16 at a time) in its widest accesses, which are those to rows.

    Outside of loops narrower ones than 16 bytes are to what a row has one of.
    """
    width = max(region.loads, default=max(region.stores, default=0))
    if outside and width < 16:
        return 0, 0, 0
    loads, stores = (sum(w * n for w, n in kind.items() if w >= width) for kind in (region.loads, region.stores))
    return loads, stores, 16 * (region.loads[16] + region.stores[16])


# What a row itself has to move at least, in elements: read once and written once.
STRICT = {"layer_norm": 2, "rms_norm": 2, "layer_norm_bwd": 3, "rms_norm_bwd": 3, "cross_entropy": 2,
          "cross_entropy_loss": 1}  # fmt: skip


def counted(arch: Architecture, case: Case) -> Counted:
    _common.ASSUMED_ARCHITECTURE = arch
    launch = max(aot.recorded(case.launch), key=lambda found: "sum_partials" not in str(found[0]))
    kernel, warps = compiled(arch, launch)
    used = aot_resources.measured(arch, kernel)
    regions = sass.regions(sass.disassembled(kernel.asm["cubin"]))
    line = Counted(
        case.op, case.N, case.dtype, str(arch), case.who, warps, used["REG"], used["SHARED"] + used["dynamic"],
        used["STACK"], used["spills"], 0,
    )  # fmt: skip
    if case.op.startswith("attention"):
        line.loop = inner_loop(regions).instructions
        return line
    threads = 32 * warps
    turns = [1.0, *case.turns(regions[1:], threads, case.N)]
    work = threads / (case.rows * case.N)
    line.loop = max(zip(turns, regions, strict=True), key=lambda pair: pair[0] * pair[1].instructions)[1].instructions
    line.per_element = sum(n * region.instructions for n, region in zip(turns, regions, strict=True)) * work
    moved = [_moved(region, region is regions[0] and len(regions) > 1) for region in regions]
    line.loaded, line.stored, wide = (
        sum(n * m[i] for n, m in zip(turns, moved, strict=True)) * threads / case.rows / case.padded for i in range(3)
    )
    line.wide = wide / (line.loaded + line.stored)
    device = DEVICES[str(arch)]
    issue = line.per_element / 32 / (device.multiprocessors * PARTS * device.clock)
    line.issue = issue / (STRICT[case.op] * getattr(torch, case.dtype).itemsize / device.bandwidth)
    return line


def inner_loop(regions: list[sass.Region]) -> sass.Region:
    """Attention's loop over keys without masks: of those with the most matrix instructions the shortest."""
    kind = next(name for name in MATRIX if any(region.names[name] for region in regions[1:]))
    most = max(region.names[kind] for region in regions[1:])
    return min((r for r in regions[1:] if r.names[kind] == most), key=lambda region: region.instructions)


def once(regions: list[sass.Region], threads: int, N: int) -> list[float]:
    """No loop, but what a slow path may have, which no usual number takes."""
    return [0.0] * len(regions)


def over_rows(rows: int, inputs: int, itemsize: int) -> Callable[[list[sass.Region], int, int], list[float]]:
    """The first loop that reads rows goes over all of them."""

    def turns(regions: list[sass.Region], threads: int, N: int) -> list[float]:
        found = next(i for i, region in enumerate(regions) if region.stream)
        elements = regions[found].stream / itemsize / inputs * threads
        width = triton.next_power_of_2(N)
        return [rows * width / elements if i == found else 0.0 for i in range(len(regions))]

    return turns


def of(*numbers: float) -> Callable[[list[sass.Region], int, int], list[float]]:
    def turns(regions: list[sass.Region], threads: int, N: int) -> list[float]:
        if len(regions) != len(numbers):
            raise ValueError(f"{len(regions)} loops, where {len(numbers)} were expected")
        return list(numbers)

    return turns


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


NORM_SIZES = (1024, 4096, 8192)
VOCABULARIES = (50257, 50304, 128256)
HEADS = (64, 128)


def our_norms() -> Iterator[Case]:
    M = ROWS * _common.ASSUMED_MULTIPROCESSORS
    for N in NORM_SIZES:
        x, w, rows = meta(M, N), meta(N), meta(M, dtype=FP32)
        padded = triton.next_power_of_2(N) / N
        yield Case("layer_norm", N, "fastlm", partial(layer_norm.layer_norm_fwd, x, None, w, w, N, 1e-5), once,
                   padded=padded)  # fmt: skip
        yield Case("rms_norm", N, "fastlm", partial(rms_norm.rms_norm_fwd, x, None, w, N, 1e-5), once, padded=padded)
        each = ROWS // _common.tile_for(_norm().BACKWARD, _common.ASSUMED_ARCHITECTURE, N).programs
        turns = over_rows(each, 2, 2)
        yield Case("layer_norm_bwd", N, "fastlm", partial(layer_norm.layer_norm_bwd, x, x, w, rows, rows, N), turns,
                   each, padded)  # fmt: skip
        yield Case("rms_norm_bwd", N, "fastlm", partial(rms_norm.rms_norm_bwd, x, x, w, rows, N), turns, each, padded)


def _norm() -> types.ModuleType:
    return importlib.import_module("fastlm.kernels._norm")


def our_cross_entropies() -> Iterator[Case]:
    for V in VOCABULARIES:
        x, target = meta(64, V), meta(64, dtype=INT64)
        block = _common.tile_for(cross_entropy.FORWARD, _common.ASSUMED_ARCHITECTURE, V).block
        passes = V // block - 1, 1 + (V % block > 0)  # without masks, and the block of the class and the last with
        call = partial(cross_entropy.cross_entropy_fwd, x, target, None, -100, 0.0)
        padded = sum(passes) * block / V
        yield Case("cross_entropy", V, "fastlm", partial(call, meta(dtype=FP32)), of(*passes, *passes), padded=padded)
        yield Case("cross_entropy_loss", V, "fastlm", call, of(*passes), padded=padded)


TILES = {64: tables.Blocks(128, 64, 4, 3), 128: tables.Blocks(128, 64, 8, 3)}


def our_attentions(arch: Architecture) -> Iterator[Case]:
    for D in HEADS:
        for causal in (False, True):
            yield Case(_attention(causal), D, "fastlm", partial(_our_attention, arch, D, causal), once)


def _attention(causal: bool) -> str:
    return "attention, causal" if causal else "attention"


def _our_attention(arch: Architecture, D: int, causal: bool) -> None:
    """With the tile of TILES in the place of the table's."""
    q = meta(2, 16, 2048, D)
    kept = forward.blocks_for
    forward.blocks_for = lambda *_: TILES[D]
    try:
        attention.attention_fwd(q, q, q, None, causal, 0.125, 0.0, 0, -1, 0 if causal else -1, 0.0)
    finally:
        forward.blocks_for = kept


def ours(arch: Architecture) -> Iterator[Case]:
    _common.ASSUMED_ARCHITECTURE = arch
    yield from our_norms()
    yield from our_cross_entropies()
    yield from our_attentions(arch)


def liger(arch: Architecture) -> Iterator[Case]:
    """liger-kernel; its launchers take a GPU that is not there for one of a single multiprocessor: ROWS rows for it."""
    norm = importlib.import_module("liger_kernel.ops.layer_norm")
    rms = importlib.import_module("liger_kernel.ops.rms_norm")
    ce = importlib.import_module("liger_kernel.ops.cross_entropy")
    for N in NORM_SIZES:
        x, w, rows = meta(ROWS, N), meta(N), meta(ROWS, dtype=FP32)
        block, warps = rms.calculate_settings(N)
        padded = block / N
        turns = over_rows(ROWS, 2, 2)
        yield Case("layer_norm", N, "liger", partial(norm.layer_norm_forward, x, w, w, 1e-5), once, padded=padded)
        yield Case("rms_norm", N, "liger", partial(rms.rms_norm_forward, x, w, 1e-5, 0.0, "llama", None), once,
                   padded=padded)  # fmt: skip
        yield Case("layer_norm_bwd", N, "liger", partial(norm.layer_norm_backward, x, x, w, w, rows, rows), turns,
                   ROWS, padded)  # fmt: skip
        yield Case(
            "rms_norm_bwd", N, "liger",
            partial(rms.rms_norm_backward, x, x, w, rows, 0.0, "llama", block, warps, True, None), turns, ROWS, padded,
        )  # fmt: skip
    family = "blackwell" if arch.number >= 100 else "hopper"
    vars(ce)["infer_device_arch"] = lambda: family  # by which it chooses its warps
    for V in VOCABULARIES:
        block = min(ce.MAX_FUSED_SIZE, triton.next_power_of_2(V))
        passes = math.ceil(V / block)
        for op, grad in (("cross_entropy", True), ("cross_entropy_loss", False)):
            x = torch.zeros(2, V, dtype=BF16, requires_grad=grad)
            call = partial(
                ce.cross_entropy_forward, x, torch.zeros(2, dtype=INT64), None, -100, 0.0, 0.0, "mean", None, False
            )
            turns = of(0, passes, passes) if grad else of(0, passes)  # the first loop is for ignored rows
            yield Case(op, V, "liger", call, turns, padded=passes * block / V)


def fla(arch: Architecture) -> Iterator[Case]:
    """fla-core, with those of its autotuner's warps that give a thread 32 elements: the fewest instructions."""
    norm = importlib.import_module("fla.modules.norm.layernorm")
    for N in NORM_SIZES:
        padded = triton.next_power_of_2(N) / N
        for rms, name in ((False, "layer_norm"), (True, "rms_norm")):
            warps = max(2, min(8, N // 1024))
            yield Case(name, N, "fla", partial(_fla_forward, norm, N, rms, warps), once, padded=padded)
            yield Case(f"{name}_bwd", N, "fla", partial(_fla_backward, norm, N, rms, warps), over_rows(ROWS, 2, 2),
                       ROWS, padded)  # fmt: skip


def _fla_common(N: int, rms: bool) -> dict[str, Any]:
    w, rows = meta(N), meta(ROWS, dtype=FP32)
    return {
        "x": meta(ROWS, N), "w": w, "b": None if rms else w, "mean": None if rms else rows, "rstd": rows, "G": 1,
        "D": N, "BD": triton.next_power_of_2(N), "IS_RMS_NORM": rms, "HAS_WEIGHT": True, "HAS_BIAS": not rms,
    }  # fmt: skip


def _inside(kernel: Any) -> Any:
    """The compiled function inside of an autotuner and of heuristics."""
    while hasattr(kernel, "fn") and not isinstance(kernel, triton.runtime.jit.JITFunction):
        kernel = kernel.fn
    return kernel


def _fla_forward(norm: types.ModuleType, N: int, rms: bool, warps: int) -> None:
    _inside(norm.layer_norm_fwd_kernel_row)[(1,)](
        **_fla_common(N, rms), y=meta(ROWS, N), res=None, res_out=None, eps=1e-5, HAS_RESIDUAL=False,
        STORE_RESIDUAL_OUT=False, num_warps=warps,
    )  # fmt: skip


def _fla_backward(norm: types.ModuleType, N: int, rms: bool, warps: int) -> None:
    grads = meta(1, N, dtype=FP32)
    _inside(norm.layer_norm_bwd_kernel_row)[(1,)](
        **_fla_common(N, rms), y=None, dy=meta(ROWS, N), dx=meta(ROWS, N), dw=grads, db=None if rms else grads,
        dres=None, dres_in=None, T=ROWS, BS=ROWS, GS=1, HAS_DRESIDUAL=False, STORE_DRESIDUAL=False,
        RECOMPUTE_OUTPUT=False, num_warps=warps,
    )  # fmt: skip


def tutorial(path: Path) -> Callable[[Architecture], Iterator[Case]]:
    """Triton's tutorial: float16, which is all it writes, and tensor descriptors from the host from sm_90 on."""
    module = _imported_without_gpu(path)

    def cases(arch: Architecture) -> Iterator[Case]:
        for D in HEADS:
            for causal in (False, True):
                yield Case(_attention(causal), D, "tutorial", partial(_tutorial, module, arch, D, causal), once,
                           dtype="float16")  # fmt: skip

    return cases


class _NoDriver:
    """What the tutorial asks of Triton's driver when it is imported."""

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_target(self) -> Any:
        return types.SimpleNamespace(backend="cpu", arch="none")


def _imported_without_gpu(path: Path) -> types.ModuleType:
    triton.runtime.driver.set_active(_NoDriver())
    spec = importlib.util.spec_from_file_location("fused_attention_tutorial", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _tutorial(module: types.ModuleType, arch: Architecture, D: int, causal: bool) -> None:
    tile = TILES[D]
    tensors: list[Any] = [torch.empty(2, 16, 2048, D, dtype=FP16) for _ in range(4)]
    if arch.number >= 90:
        rows = (tile.M, tile.N, tile.N, tile.M)
        tensors = [
            triton.tools.tensor_descriptor.TensorDescriptor(x, [2 * 16 * 2048, D], [D, 1], [n, D])
            for x, n in zip(tensors, rows, strict=True)
        ]
    _inside(module._attn_fwd)[(1,)](
        0.125, torch.empty(2, 16, 2048), 2, 16, *tensors, 2048, HEAD_DIM=D, BLOCK_M=tile.M, BLOCK_N=tile.N,
        FP8_OUTPUT=False, STAGE=3 if causal else 1, warp_specialize=False, IS_HOPPER=arch == SM90,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


if __name__ == "__main__":
    import side_by_side_page

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peers", type=Path, help="folder of the peers' unpacked wheels")
    parser.add_argument("--tutorial", type=Path, help="Triton's 06-fused-attention.py")
    parser.add_argument("--ours", metavar="ARCH", help="print the counts of our own kernels on one architecture")
    asked = parser.parse_args()
    if asked.ours:
        for case in ours(parse(asked.ours)):
            print(json.dumps(asdict(counted(parse(asked.ours), case))), flush=True)
        sys.exit()
    if asked.peers is None or asked.tutorial is None:
        parser.error("--peers and --tutorial are needed, or --ours")
    sys.path.append(str(asked.peers))
    found: list[Counted] = []
    for arch in ARCHITECTURES:
        for project in (ours, liger, fla, tutorial(asked.tutorial)):
            for case in project(arch):
                found.append(counted(arch, case))
                print(json.dumps(asdict(found[-1])), file=sys.stderr, flush=True)
    side_by_side_page.write([asdict(line) for line in found], RESULTS, PAGE)
