"""The extension's kernels refuse dtypes that they don't serve, in words, and write nothing.

Python never asks for them, so these call the extension itself.
"""

import itertools

import pytest
import torch

from fastlm.backends import cpu
from fastlm.backends.cpu import TYPE_CODE, ptr
from fastlm.backends.cpu.attention import BOOL

pytestmark = pytest.mark.skipif(cpu.missing_reason is not None, reason="no CPU extension")

M, N = 2, 64
F32, F64, BF16, F16 = TYPE_CODE.values()
UNKNOWN = 7
NAMES = {code: str(dtype).removeprefix("torch.") for dtype, code in TYPE_CODE.items()}


def _memory(rows=M, columns=N):
    """Room for any dtype, every byte 7, and so also what is left where nothing is written."""
    return torch.full((rows * columns * 8,), 7, dtype=torch.uint8)


@pytest.fixture
def t():
    """Three inputs and three outputs of (M, N) elements of any dtype; the test ends by looking at the outputs."""
    tensors = [_memory() for _ in range(6)]
    yield [x.data_ptr() for x in tensors]
    assert all((x == 7).all() for x in tensors)


def _served(x, stream, y):
    return x == stream == y or (stream == F32 and {x, y} <= {F32, BF16}) or (stream == F32 and {x, y} <= {F32, F16})


UNSERVED = [types for types in itertools.product((F32, F64, BF16, F16), repeat=3) if not _served(*types)]


@pytest.mark.parametrize("types", UNSERVED, ids=str)
def test_norms_refuse_types_that_do_not_go_together(t, types):
    x, w, _, y, z, sums = t
    calls = {
        "layer_norm_fwd": (x, x, w, w, z, y, 0, 0, M, N, 1e-5, 0.0, 0),
        "layer_norm_bwd": (x, x, w, w, w, 0, y, z, sums, 0, 0, M, N, 0.0, 0),
        "rms_norm_fwd": (x, x, w, z, y, 0, M, N, 1e-5),
        "rms_norm_bwd": (x, x, w, w, 0, y, z, sums, 0, M, N),
    }
    for name, arguments in calls.items():
        with pytest.raises(ValueError, match=rf"^{name}: x, stream and y have got .*, expected") as raised:
            getattr(cpu._cpu, name)(*arguments, *types, F32)
        assert "{}, {} and {}".format(*(NAMES[code] for code in types)) in str(raised.value)


def test_one_type_that_is_none(t):
    x, w, _, y, z, _ = t
    rows = (M, N, N, N)
    heads = (x, (0, 0, N))
    attention = (*heads, *heads, *heads, 0, (), 0, y, (0, 0, N), 0, 0, 0, 0)
    calls = {
        "layer_norm": (x, w, w, y, M, N, 1e-5, UNKNOWN),
        "gelu_fwd": (x, 0, y, M, N, False, 0.0, 0, UNKNOWN, F32),
        "gelu_bwd": (x, x, 0, y, 0, 0, M, N, True, 0.0, 0, UNKNOWN, F32),
        "swiglu_fwd": (x, x, y, *rows, UNKNOWN),
        "swiglu_bwd": (x, x, x, y, z, *rows, UNKNOWN),
        "rotary": (x, w, w, y, (1, 1, M, N), (0, 0, N, 1), (0, 0, N, 1), 0, 0, False, False, UNKNOWN),
        "cross_entropy_fwd": (x, x, 0, y, z, 0, M, N, -100, 0.0, 0.0, UNKNOWN, F32),
        "cross_entropy_update": (x, x, 0, y, M, N, 0, N, -100, 0.0, UNKNOWN, F32),
        "cross_entropy_finish": (x, x, 0, y, z, M, N, -100, 0.0, UNKNOWN, F32),
        "cross_entropy_bwd": (x, x, 0, x, 0, y, M, N, 0, N, -100, 0.0, 1.0, UNKNOWN, F32),
        "cross_entropy_total": (x, M, BF16),
        "attention_fwd": (*attention, (1, 1, 1, M, M, N, N), 1.0, 0.0, 0, -1, -1, 0.0, UNKNOWN),
        "linear_fwd": (x, w, 0, y, 1, 1, N, UNKNOWN, UNKNOWN, F32, UNKNOWN),
        "dequantize": (x, w, y, 1, N, N, 0, F64),
    }
    for name, arguments in calls.items():
        with pytest.raises(ValueError, match=r"^[\w.]+: .* (has|have) got (dtype code 7|bfloat16|float64), expected"):
            getattr(cpu._cpu, name)(*arguments)


@pytest.mark.parametrize(("x", "w"), [(F16, BF16), (BF16, F16), (F64, F32), (F32, F64), (BF16, F32)])
def test_linear_refuses_inputs_beside_another_weight(t, x, w):
    """x and y have the weight's dtype, or are fp32 beside one of 16 bits."""
    at, weight, _, y, _, _ = t
    for x_type, y_type, name in ((x, w, "x"), (w, x, "y")):
        with pytest.raises(ValueError, match=rf"^linear_fwd: {name} has got {NAMES[x]}, expected {NAMES[w]}"):
            cpu._cpu.linear_fwd(at, weight, 0, y, 1, 1, N, x_type, w, F32, y_type)


def test_quantized_linear_refuses_doubles(t):
    x, w, scale, y, _, _ = t
    for x_type, y_type, name in ((F64, F32, "x"), (F32, F64, "y")):
        with pytest.raises(ValueError, match=rf"^quantized_linear_fwd: {name} has got float64, expected float32"):
            cpu._cpu.quantized_linear_fwd(x, w, scale, 0, y, 1, 1, N, N, 0, x_type, y_type)


def test_weights_and_masks_of_no_type(t):
    x, w, mask, y, _, _ = t
    with pytest.raises(ValueError, match="a weight or bias have got dtype code 7"):
        cpu._cpu.gelu_fwd(x, w, y, M, N, False, 0.0, 0, F32, UNKNOWN)
    heads = (x, (0, 0, N))
    with pytest.raises(ValueError, match="attention_fwd: mask has got dtype code 7"):
        cpu._cpu.attention_fwd(
            *heads, *heads, *heads, mask, (0, 0, 0, 0), UNKNOWN, y, (0, 0, N), 0, 0, 0, 0,
            (1, 1, 1, M, M, N, N), 1.0, 0.0, 0, -1, -1, 0.0, F32,
        )  # fmt: skip
    assert UNKNOWN > BOOL


def test_adamw_refuses_a_wide_gradient_of_a_narrow_parameter(t):
    p, g, _, m, v, _ = t
    scalars = (1.0, 1.0, 0.9, 0.99, 1e-3, 1.0, 1e-8)
    with pytest.raises(ValueError, match="param and grad have got bfloat16 and float32, expected both bfloat16"):
        cpu._cpu.adamw_update([((p, g, m, v, 0, N, BF16, F32), scalars)])
    with pytest.raises(ValueError, match="grad has got float16, expected float32 or bfloat16"):
        cpu._cpu.gradient_square_sum([(g, N, F16)])


def test_gemm_refuses_what_it_does_not_serve(t):
    a, b, _, c, _, _ = t
    sizes = (1, 1, 1, 1, 1, 1)
    for code in (F64, F16, UNKNOWN):
        assert not cpu._cpu.gemm_serves(code)
        with pytest.raises(ValueError, match=r"^gemm: a and b have got"):
            cpu._cpu.gemm(a, b, 0, c, *sizes, False, False, True, False, code)
    if cpu._cpu.gemm_serves(F32):
        with pytest.raises(ValueError, match=r"^gemm: out beside float32 has got bfloat16, expected float32"):
            cpu._cpu.gemm(a, b, 0, c, *sizes, False, False, False, False, F32)


def test_the_cuda_kernels_refuse_doubles(emulation):
    x, y = (torch.ones(M, N, dtype=torch.float64) for _ in range(2))
    with pytest.raises(ValueError, match="no kernels for dtype code 1"):
        emulation.gelu_fwd(0, 0, ptr(x), 0, ptr(y), M, N, False, 0.0, (0, False), F64, F32)
    for types in ((F64, F32, F32, F32), (F32, F64, F32, F32), (F32, F32, F64, F32), (F32, F32, F32, F64)):
        with pytest.raises(ValueError, match="no kernels for dtype code 1"):
            emulation.rms_norm_fwd(0, 0, ptr(x), ptr(x), ptr(x), ptr(x), ptr(y), 0, M, N, 1e-5, *types)
    assert (y == 1).all()
