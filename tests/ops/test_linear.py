"""fastlm.linear on few rows: parity with fp64, rows on their own, threads, dispatch, errors."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

import fastlm
from conftest import DTYPES
from fastlm import BackendError
from fastlm.backends import cpu as _native
from fastlm.ops import _thresholds
from tolerances import assert_as_close_as_torch

# K below a vector, with a tail, of two vectors at a time; N of one and of several threads' shares.
SIZES = [(1, 1), (5, 3), (37, 50), (64, 128), (300, 193)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("rows", range(1, 9))
def test_parity(every_isa, poisoned, rows, size, dtype):
    N, K = size
    x, weight, bias = torch.randn(rows, K).to(dtype), torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)
    with fastlm.backend("cpu"):
        y = fastlm.linear(x, weight, bias)
        plain = fastlm.linear(x[0], weight)
    truth = F.linear(x.double(), weight.double(), bias.double())
    assert y.dtype == dtype
    assert_as_close_as_torch(y, truth, F.linear(x, weight, bias), K)
    assert_as_close_as_torch(plain, x[0].double() @ weight.double().T, x[0] @ weight.T, K)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_row_has_the_same_bits_in_any_batch_and_on_any_threads(every_isa, threads, dtype):
    x, weight = torch.randn(8, 96).to(dtype), torch.randn(500, 96).to(dtype)
    threads(2)
    with fastlm.backend("cpu"):
        together = fastlm.linear(x, weight)
        threads(1)
        assert torch.equal(fastlm.linear(x, weight), together)
        for rows in range(1, 8):
            assert torch.equal(fastlm.linear(x[:rows], weight), together[:rows])


def test_views_of_any_layout():
    x, weight = torch.randn(2, 7, 3).mT[:, :, ::2], torch.randn(4, 9).T
    with fastlm.backend("cpu"):
        torch.testing.assert_close(fastlm.linear(x, weight), F.linear(x, weight))


# Tiles end between two rows of the weight, in the middle of one and after the last.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_special_values_stay_in_their_row_and_column(every_isa, dtype):
    x, weight = torch.randn(3, 40).to(dtype), torch.ones(35, 40, dtype=dtype)
    x[1, 7], x[2, 9] = math.nan, math.inf
    weight[3, 39], weight[34, 0] = math.nan, math.inf
    ordinary = torch.tensor([n for n in range(35) if n not in (3, 34)])
    with fastlm.backend("cpu"):
        y = fastlm.linear(x, weight)
    assert y[0, ordinary].isfinite().all()
    assert y[1].isnan().all()
    assert (y[2, ordinary] == math.inf).all()
    assert y[:, 3].isnan().all()
    assert y[0, 34].isinf()


@pytest.mark.skipif(not fastlm.cpu_isas(), reason="no CPU extension")
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_wide_rows_keep_their_precision(every_isa, rows, weight_dtype):
    """Decoding holds activations in fp32 between 16-bit weights: x is off by 2^-17 at most, not by bf16's 2^-9."""
    N, K = 37, 100
    x, weight, bias, y = torch.randn(rows, K), torch.randn(N, K).to(weight_dtype), torch.randn(N), torch.empty(rows, N)
    x[0, 5] = 1e-30
    _native._cpu.linear_fwd(
        x.data_ptr(), weight.data_ptr(), bias.data_ptr(), y.data_ptr(), rows, N, K,
        0, _native.TYPE_CODE[weight_dtype], 0, 0,
    )  # fmt: skip
    truth = F.linear(x.double(), weight.double(), bias.double())
    bound = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    assert ((y - truth).abs() <= bound * (2**-17 + K * torch.finfo(torch.float32).eps)).all()


def test_many_rows_and_gradients_are_the_librarys():
    x, weight = torch.randn(9, 16), torch.randn(4, 16, requires_grad=True)
    assert fastlm.explain(fastlm.linear, x, weight.detach()).selected == "torch"
    assert fastlm.explain(fastlm.linear, x[:8], torch.empty(2**14, 16)).selected == "cpu"
    assert fastlm.explain(fastlm.linear, x[:8], weight).selected == "torch"
    assert fastlm.explain(fastlm.linear, x[:1].bfloat16(), torch.empty(2**14, 16).bfloat16()).selected == "cpu"
    assert fastlm.explain(fastlm.linear, x[:4].double(), torch.empty(2**14, 16).double()).selected == "torch"
    with fastlm.backend("cpu"), pytest.raises(fastlm.BackendError, match="1 to 8 rows"):
        fastlm.linear(x, weight.detach())
    with fastlm.backend("cpu"), pytest.raises(fastlm.BackendError, match="no backward pass"):
        fastlm.linear(x[:1], weight)
    assert torch.autograd.grad(fastlm.linear(x[:1], weight).sum(), weight)[0].shape == weight.shape


def leads(monkeypatch, answer):
    """Let our GEMM lead on this CPU where `answer` says so of a dtype."""
    for module in ("_gemm", "linear"):
        monkeypatch.setattr(importlib.import_module(f"fastlm.ops.{module}"), "leads", answer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_products_are_ours_where_they_lead(monkeypatch, dtype):
    leads(monkeypatch, lambda asked: asked is dtype)
    x, weight = torch.empty(512, 512, dtype=dtype), torch.empty(512, 512, dtype=dtype)
    trained = weight.clone().requires_grad_()
    assert fastlm.explain(fastlm.linear, x, weight).selected == "cpu"
    assert fastlm.explain(fastlm.linear, x, trained).selected == "cpu"
    assert fastlm.explain(fastlm.linear, x[:64], trained).selected == "torch"
    assert fastlm.explain(fastlm.linear, x[:9], weight[:9]).selected == "torch"
    assert fastlm.explain(fastlm.linear, x.half(), weight.half()).selected == "torch"
    leads(monkeypatch, lambda asked: False)
    assert fastlm.explain(fastlm.linear, x, weight).selected == "torch"


@pytest.mark.parametrize("lags", [False, True])
def test_one_row_in_fp32_is_ours_where_mkl_lags(monkeypatch, lags):
    monkeypatch.setitem(_thresholds.FASTER_ROWS, torch.float32, _thresholds.ROWS_IN_FP32[lags])
    x, weight = torch.randn(1, 16), torch.empty(2**14, 16)
    found = fastlm.explain(fastlm.linear, x, weight)
    assert found.selected == ("cpu" if lags else "torch")
    assert ("faster with so few rows" in str(found)) is not lags
    assert fastlm.explain(fastlm.linear, x.expand(4, 16), weight).selected == "cpu"


def test_empty():
    assert fastlm.linear(torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0, 3)
    with fastlm.backend("cpu"):
        bias = torch.randn(3)
        for rows in (2, 100):
            assert torch.equal(fastlm.linear(torch.zeros(rows, 0), torch.zeros(3, 0), bias), bias.expand(rows, 3))
    assert torch.equal(fastlm.linear(torch.zeros(2, 0), torch.zeros(3, 0), torch.ones(3)), torch.ones(2, 3))
    assert fastlm.linear(torch.zeros(2, 4), torch.zeros(0, 4)).shape == (2, 0)


def test_a_forced_backend_refuses_dtypes_that_its_kernels_do_not_take():
    x, weight = (torch.ones(size, dtype=torch.float8_e4m3fn) for size in ((2, 16), (16, 16)))
    with fastlm.backend("cpu"), pytest.raises(BackendError, match=r"linear: .*not float8_e4m3fn"):
        fastlm.linear(x, weight)
    with fastlm.backend("reference"):
        assert fastlm.explain(fastlm.linear, x, weight).selected == "reference"
        assert torch.equal(fastlm.linear(x, weight).float(), torch.full((2, 16), 16.0))


def test_autocast_decides_the_dtype():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fastlm.linear(torch.randn(1, 8), torch.randn(3, 8)).dtype == torch.bfloat16


def test_compiles_without_a_break():
    x, weight = torch.randn(2, 8), torch.randn(3, 8)
    compiled = torch.compile(fastlm.linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, weight), F.linear(x, weight))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x: fastlm.linear(x, torch.ones(3, 4)), ValueError, r"weight has shape \(3, 4\), expected"),
        (lambda x: fastlm.linear(x, torch.ones(5)), ValueError, r"weight has shape \(5,\), expected"),
        (lambda x: fastlm.linear(x, torch.ones(3, 5), torch.ones(5)), ValueError, r"bias has shape \(5,\)"),
        (lambda x: fastlm.linear(x, torch.ones(3, 5).double()), TypeError, "weight has dtype torch.float64"),
        (lambda x: fastlm.linear(x, torch.ones(3, 5, device="meta")), ValueError, "weight is on meta"),
        (lambda x: fastlm.linear(x.int(), torch.ones(3, 5).int()), TypeError, "x has dtype torch.int32"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make(torch.ones(2, 5))
