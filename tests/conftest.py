"""Fixtures that every test file shares."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections import defaultdict

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # read when triton is first imported: its kernels then run on CPU tensors
    os.environ["TRITON_INTERPRET"] = "1"

import fastlm
from fastlm._core import dispatch as _dispatch
from fastlm.backends import cuda as _native_cuda

# An assertion that fails in what tests share shows its values too.
pytest.register_assert_rewrite("fuzz", "hf", "models.relatives", "samples")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Fills every torch.empty with NaN, so that an output a kernel leaves unwritten fails the comparison."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1000).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


# Most kernels have one version per vector width; what adds a version above avx512 has its own fixture.
WIDTHS = [name for name in fastlm.cpu_isas() if name in ("baseline", "avx2", "avx512")]


@pytest.fixture(params=WIDTHS or [pytest.param(None, marks=pytest.mark.skip("no CPU extension"))])
def isa(request):
    """Every vector width that this machine has, in turn."""
    before = fastlm.cpu_isa()
    fastlm.set_cpu_isa(request.param)
    yield request.param
    fastlm.set_cpu_isa(before)


@pytest.fixture(params=fastlm.cpu_isas() or [pytest.param(None, marks=pytest.mark.skip("no CPU extension"))])
def every_isa(request):
    """Every instruction set of this machine, for attention, which has versions above plain AVX-512."""
    before = fastlm.cpu_isa()
    fastlm.set_cpu_isa(request.param)
    yield request.param
    fastlm.set_cpu_isa(before)


@pytest.fixture
def threads():
    """A setter of torch's thread count that is undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _bfloat16_rounded(convert):
    """The interpreter's conversion of numbers, `convert`, with bf16 rounded to nearest even instead of truncated."""
    import triton.language as tl

    def converted(values, source, target, rounding):
        if (source, target) == (tl.bfloat16, tl.float32):
            return values.astype(np.uint32) << 16
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding)
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)

    return converted


def _indexable(patch):
    """The interpreter's preparation of tensors, `patch`, with loop bounds that numpy 2.4 accepts (triton 3.6)."""

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    return patched


def _by_boolean_masks(access, place):
    """The interpreter's load or store, `access`, which takes its mask at `place`, as strict as that of triton 3.9."""

    def checked(self, *args, **kwargs):
        assert args[place].data.dtype == np.bool_, "a mask is not boolean: see kernels/_common.py"
        return access(self, *args, **kwargs)

    return checked


@pytest.fixture(scope="session")
def interpreter():
    """Triton's interpreter, its conversion to bf16 and its loop bounds corrected, its masks boolean."""
    from triton.runtime import interpreter

    interpreter._convert_float = _bfloat16_rounded(interpreter._convert_float)
    interpreter._patch_lang_tensor = _indexable(interpreter._patch_lang_tensor)
    builder = interpreter.InterpreterBuilder
    builder.create_masked_load = _by_boolean_masks(builder.create_masked_load, 1)
    builder.create_masked_store = _by_boolean_masks(builder.create_masked_store, 2)
    return interpreter


# On the GPU where there is one, else in the interpreter.
TRITON = pytest.param("triton", marks=pytest.mark.gpu if torch.cuda.is_available() else ())


def _on_triton(request):
    """Inside, ops run on the Triton backend, and new tensors are made on its device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        request.getfixturevalue("interpreter")
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)  # numpy's word on a row of NaN
    with fastlm.backend("triton"), torch.device(device), np.errstate(all="ignore"):
        yield "triton"


@pytest.fixture(scope="session")
def emulated_module():
    """The CUDA kernels built for the CPU."""
    if sys.platform != "linux":
        pytest.skip("the emulation of CUDA is built on Linux alone")
    from emulation import build

    if build.compiler() is None:
        pytest.skip("no C++ compiler to build the emulation of CUDA with")
    return build.Emulated(build.build())


@pytest.fixture
def emulation(emulated_module):
    """The same, serving forced calls on CPU tensors during the test."""
    with _native_cuda.emulate(emulated_module):
        _dispatch.clear_cache()
        yield emulated_module
    emulated_module.set_order(0)
    emulated_module.set_device()
    _dispatch.clear_cache()


# Likewise, or else in the emulation.
CUDA = pytest.param("cuda", marks=pytest.mark.gpu if torch.cuda.is_available() else ())


def _on_cuda(request):
    """Inside, ops run on the CUDA backend, and new tensors are made on its device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        request.getfixturevalue("emulation")
    elif _native_cuda.missing_reason:
        pytest.skip(_native_cuda.missing_reason)
    with fastlm.backend("cuda"), torch.device(device):
        yield "cuda"


FEW = 2  # cases of a test of interpreted or emulated kernels in `make test`; the others are in `make test-gpu-code`
ON_GPU = {"triton": _on_triton, "cuda": _on_cuda}


@pytest.fixture(params=[*(f"cpu-{width}" for width in WIDTHS), TRITON, CUDA])
def kernels(request):
    """Every implementation in turn: the CPU's vector widths, and Triton's and CUDA's on the GPU or else on the CPU.

    Tests of a dtype that an implementation does not take are left out, and those of an op that it does not have.
    """
    if request.param in ON_GPU:
        yield from ON_GPU[request.param](request)
        return
    before = fastlm.cpu_isa()
    fastlm.set_cpu_isa(request.param.removeprefix("cpu-"))
    with fastlm.backend("cpu"), np.errstate(all="ignore"):
        yield "cpu"
    fastlm.set_cpu_isa(before)


@pytest.fixture(params=[*(fastlm.cpu_isas()), TRITON])
def attention_kernels(request):
    """As `kernels`, on the CPU with every instruction set: attention has versions above plain AVX-512."""
    if request.param in ON_GPU:
        yield from ON_GPU[request.param](request)
        return
    before = fastlm.cpu_isa()
    fastlm.set_cpu_isa(request.param)
    yield request.param
    fastlm.set_cpu_isa(before)


@pytest.hookimpl(tryfirst=True)  # before marks are looked at
def pytest_collection_modifyitems(config, items):
    def unsupported(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        backend = params.get("kernels") or params.get("attention_kernels")
        op = item.path.stem.removeprefix("test_")
        lacks_op = op in _dispatch.ops() and all(row.name != backend for row in _dispatch.backends(op))
        return backend in ON_GPU and (lacks_op or params.get("dtype") is torch.float64)

    config.hook.pytest_deselected(items=[item for item in items if unsupported(item)])
    items[:] = [item for item in items if not unsupported(item)]
    if not torch.cuda.is_available():
        _leave_most_interpreted_cases_to_gpu_code(items)


def pytest_collection_finish(session):
    """Keep what was imported out of later garbage collections, of which each took half a second."""
    gc.collect()
    gc.freeze()


def _leave_most_interpreted_cases_to_gpu_code(items):
    """Mark all but a few cases of each test of a GPU's kernels that run on the CPU, a thousand times slower."""
    cases = defaultdict(list)
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        backend = next((value for value in params.values() if isinstance(value, str) and value in ON_GPU), None)
        if backend is not None:
            cases[item.path, item.originalname, backend].append(item)
    for found in cases.values():
        kept = {round(i * (len(found) - 1) / (FEW - 1)) for i in range(FEW)}  # from the first to the last
        for number, item in enumerate(found):
            if number not in kept:
                item.add_marker(pytest.mark.gpu_code)
