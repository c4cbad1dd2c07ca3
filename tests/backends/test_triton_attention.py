"""What the Triton attention has of its own: split keys, capacity after the last packed sequence.

The test files of the ops run the shared parity cases on it. Without a GPU all of it runs in Triton's interpreter.
"""

import math

import pytest
import torch

import fastlm
from conftest import TRITON
from fastlm._core import dispatch as _dispatch
from fastlm._core import dropout as _dropout
from fastlm.ops._attention_reference import attention_ref
from tolerances import assert_as_close_as_torch

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")
attention = pytest.importorskip("fastlm.kernels.attention")
forward = pytest.importorskip("fastlm.kernels.attention.forward")
backward = pytest.importorskip("fastlm.kernels.attention.backward")
decoding = pytest.importorskip("fastlm.kernels.attention.decode")
masks = pytest.importorskip("fastlm.kernels.attention.mask")
tables = pytest.importorskip("fastlm.kernels.attention.tables")

pytestmark = pytest.mark.parametrize("kernels", [TRITON], indirect=True)


@pytest.fixture(autouse=True)
def _on_triton(kernels):
    """Every test of this file is for the Triton backend, on the GPU or in the interpreter."""


def _inputs(B, H, Hkv, T, S, D, Dv, dtype=torch.float32):
    return [torch.randn(*shape).to(dtype) for shape in ((B, H, T, D), (B, Hkv, S, D), (B, Hkv, S, Dv))]


# (sizes, options) of calls whose keys are split: the smallest, a remainder, grouped heads in one and in several tiles
# of rows, masks of each kind, a window that ends before the last splits, and everything at once.
SPLIT = [
    ((2, 2, 2, 1, 256, 64, 64), {}),
    ((1, 6, 1, 1, 700, 80, 40), {"scale": -0.2}),
    ((2, 8, 1, 16, 513, 32, 32), {"mask": "bool"}),
    ((1, 4, 2, 5, 600, 17, 24), {"window": (None, 240), "softcap": 2.0}),
    ((2, 4, 2, 3, 520, 32, 32), {"mask": "additive", "window": (2, 511), "softcap": 3.0, "dropout_p": 0.3}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("sizes", "options"), SPLIT, ids=str)
def test_split_keys(poisoned, sizes, options, dtype):
    """A few queries over a long cache."""
    q, k, v = _inputs(*sizes, dtype)
    B, H, _, T, S, _, _ = sizes
    options = dict(options)
    kind, p = options.pop("mask", ""), options.get("dropout_p", 0.0)
    by_kind = {"": None, "bool": torch.rand(B, 1, T, S) > 0.3, "additive": torch.randn(1, H, T, S).to(dtype)}
    mask = by_kind[kind]
    if kind == "bool":
        mask[0, 0, 0] = False  # a row that attends to nothing
    torch.manual_seed(5)
    out, lse = fastlm.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, return_lse=True, **options)
    torch.manual_seed(5)
    seed = _dropout.draw_seed() if p else 0
    left, right = (-1 if w is None else w for w in options.get("window", (None, None)))
    rest = False, options.get("scale", q.shape[-1] ** -0.5), p, seed, left, right, options.get("softcap", 0.0)
    doubled = None if mask is None else mask if kind == "bool" else mask.double()
    truth, truth_lse = attention_ref(q.double(), k.double(), v.double(), doubled, *rest)
    own, _ = attention_ref(q, k, v, mask, *rest)
    assert_as_close_as_torch(out, truth, own, S, "out")
    assert_as_close_as_torch(lse.to(dtype), truth_lse, truth_lse.to(dtype), S, "lse")


def test_split_keys_do_not_see_the_batch():
    q, k, v = _inputs(5, 4, 2, 2, 600, 32, 32)
    whole = fastlm.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    alone = fastlm.scaled_dot_product_attention(q[3:4], k[3:4], v[3:4], enable_gqa=True)
    assert torch.equal(whole[3:4], alone)


def test_gradient_where_keys_are_split():
    q, k, v = (x.requires_grad_() for x in _inputs(1, 4, 2, 3, 300, 16, 16))
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = fastlm.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    truth, _ = attention_ref(*doubles, None, False, 0.25, 0.0, 0, -1, -1, 0.0)
    dout = torch.randn_like(out)
    grads, expected = torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(truth, doubles, dout.double())
    for g, e in zip(grads, expected, strict=True):
        assert_as_close_as_torch(g, e, None, 300)


def test_capacity_after_the_last_sequence_is_zero(poisoned):
    """Offsets end before the tokens do in a buffer of fixed capacity, such as one that a CUDA graph captured."""
    q, k, v = (torch.randn(200, heads, 16) for heads in (4, 2, 2))
    cu = torch.tensor([0, 5, 75, 80, 80, 80], dtype=torch.int32)
    options = True, 0.25, 0.0, 0, -1, 0, 0.0
    out, lse = attention.attention_varlen_fwd(q, k, v, cu, cu, *options)
    exact, exact_lse = attention.attention_varlen_fwd(q[:80], k[:80], v[:80], cu[:4], cu[:4], *options)
    assert torch.equal(out[:80], exact)
    assert torch.equal(lse[:, :80], exact_lse)
    assert out[80:].eq(0).all()
    assert lse[:, 80:].eq(-math.inf).all()
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    grads = attention.attention_varlen_bwd(dout, dlse, q, k, v, cu, cu, out, lse, *options)
    expected = attention.attention_varlen_bwd(
        dout[:80], dlse[:, :80].contiguous(), q[:80], k[:80], v[:80], cu[:4], cu[:4], exact, exact_lse, *options
    )
    for g, e in zip(grads, expected, strict=True):
        assert torch.equal(g[:80], e)
        assert g[80:].eq(0).all()


def test_every_tile_finds_its_sequence():
    """Many short sequences, empty ones among them, in any order."""
    lengths = torch.randint(0, 40, (50,))
    lengths[[0, 7, 8, 49]] = 0
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    q, k, v = (torch.randn(int(cu[-1]), 1, 8) for _ in range(3))
    out = fastlm.attention_varlen(q, k, v, cu, scale=1.0)
    for b in lengths.nonzero().flatten().tolist():
        part = slice(int(cu[b]), int(cu[b + 1]))
        scores = (q[part, 0].double() @ k[part, 0].double().T).softmax(-1)
        torch.testing.assert_close(out[part, 0].double(), scores @ v[part, 0].double(), rtol=1e-5, atol=1e-5)


def test_rows_masked_by_large_numbers_have_finite_gradients():
    """Scores of -1e9 lose all digits; the weights made again in the backward pass must not exceed 1 for it."""
    q, k, v = (x.requires_grad_() for x in _inputs(1, 2, 2, 20, 33, 16, 16))
    mask = torch.zeros(20, 33)
    mask[4] = -1e9
    out = fastlm.scaled_dot_product_attention(q, k, v, mask)
    grads = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert all(g.isfinite().all() and g.abs().max() < 100 for g in grads)


def _attended_alone(q, k, v, attended, bias, scale, softcap):
    """(out, lse) in fp64 of each row from the keys that it attends to and nothing else, whatever the others hold."""
    T, group = q.shape[2], q.shape[1] // k.shape[1]
    out, lse = q.new_zeros(*q.shape[:3], v.shape[3], dtype=torch.float64), q.new_empty(q.shape[:3], dtype=torch.float64)
    for h, t in ((h, t) for h in range(q.shape[1]) for t in range(T)):
        seen = attended[t].nonzero().flatten()
        keys, values = (x[0, h // group, seen].double() for x in (k, v))
        scores = keys @ q[0, h, t].double() * scale
        scores = softcap * torch.tanh(scores / softcap) + bias[0, h, t, seen].double()
        lse[0, h, t] = scores.logsumexp(0)
        out[0, h, t] = (scores.softmax(0)[:, None] * values).sum(0)
    return out, lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [70, 7])
@pytest.mark.parametrize("kind", ["bool", "additive", "window"])
def test_what_is_not_attended_to_does_not_reach_a_row(poisoned, kind, T, dtype):
    """NaN and infinity in keys and values, all keys in one program and split: rows without them do not notice."""
    S = 300 if T < 16 else 140
    q, k, v = _inputs(1, 4, 2, T, S, 16, 24, dtype)
    k[0, 1, 31], v[0, 1, 33, 3], v[0, 0, S - 1] = math.nan, math.inf, math.nan
    attended = torch.ones(T, S, dtype=torch.bool).tril(30).triu(-20)
    if kind != "window":
        attended = torch.rand(T, S) > 0.5
    bias = torch.zeros(1, 4, T, S, dtype=dtype)
    options = {"window": {"window": (20, 30)}, "bool": {"attn_mask": attended}, "additive": {"attn_mask": bias}}[kind]
    if kind == "additive":
        bias += torch.randn(1, 4, T, S).to(dtype).masked_fill(~attended, -math.inf)
    out, lse = fastlm.scaled_dot_product_attention(q, k, v, enable_gqa=True, softcap=5.0, return_lse=True, **options)
    truth, truth_lse = _attended_alone(q, k, v, attended, bias, 0.25, 5.0)
    for mine, expected in ((out, truth), (lse.to(dtype), truth_lse)):
        finite = expected.isfinite()
        assert 0.2 < finite.float().mean() < 1  # both kinds of rows are there
        assert torch.equal(mine.isfinite(), finite)
        own = expected.to(dtype).where(finite, 0)
        assert_as_close_as_torch(mine.where(finite, 0), expected.where(finite, 0), own, S)


def test_what_is_not_attended_to_with_dropout_and_packed_sequences(poisoned):
    """Rows that are recomputed drop the same weights; sequences do not see their neighbours' NaN."""
    q, k, v = (torch.randn(200, heads, 16) for heads in (4, 2, 2))
    cu = torch.tensor([0, 90, 110, 200], dtype=torch.int32)
    clean, rows = (), torch.ones(200, dtype=torch.bool)
    for non_finite in (False, True):
        if non_finite:
            k[60], v[100] = math.nan, math.inf
            rows[60:90], rows[100:110] = False, False
        torch.manual_seed(3)
        result = fastlm.attention_varlen(q, k, v, cu, dropout_p=0.3, is_causal=True, return_lse=True)
        clean = clean or result
    torch.testing.assert_close(result[0][rows], clean[0][rows])
    torch.testing.assert_close(result[1][:, rows], clean[1][:, rows])
    assert not result[0][~rows].isfinite().any()


def test_a_window_wider_than_32_bits():
    q, k, v = _inputs(1, 1, 1, 9, 9, 8, 8)
    wide = fastlm.scaled_dot_product_attention(q, k, v, window=(2**40, 2**33))
    assert torch.equal(wide, fastlm.scaled_dot_product_attention(q, k, v))


def test_backward_passes_have_the_same_bits(poisoned):
    q, k, v = (x.requires_grad_() for x in _inputs(1, 4, 2, 70, 140, 16, 16))
    mask = torch.randn(1, 4, 1, 140, requires_grad=True)
    inputs = (q, k, v, mask)

    def run():
        torch.default_generator.manual_seed(3)
        out = fastlm.scaled_dot_product_attention(q, k, v, mask, 0.2, enable_gqa=True, window=(60, 60))
        return (out, *torch.autograd.grad(out, inputs, torch.ones_like(out)))

    first = run()
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def _shipped(table):
    """The distinct tiles, queries by keys, of a configuration table."""
    rows = (blocks for by_size in table.values() for sizes in by_size if sizes for blocks in sizes.values())
    return sorted({(blocks.M, blocks.N) for blocks in rows})


def _in_turn(*tables):
    """Tuples of one tile of each table that together have every tile of every table."""
    tiles_of = [_shipped(table) for table in tables]
    return [tuple(own[i % len(own)] for own in tiles_of) for i in range(max(map(len, tiles_of)))]


def _use(monkeypatch, chosen):
    """Let the launchers take the tiles of `chosen`, pairs of a table and (M, N), and no others."""

    def blocks_for(table, *rest):
        return next(tables.Blocks(*tile, 4, 1) for own, tile in chosen if own is table)

    for module in (forward, backward, decoding):
        monkeypatch.setattr(module, "blocks_for", blocks_for)


TABLES = forward.FORWARD, backward.KEYS, backward.QUERIES, backward.MASK


@pytest.mark.parametrize("chosen", _in_turn(*TABLES), ids=str)
def test_shipped_tiles(poisoned, monkeypatch, chosen):
    """Forward and all gradients in the tiles of a GPU: other tests run in one size of tile that suits the interpreter.

    Sequences end a little behind a tile's, and the window leaves whole tiles, cut ones and some that are not read.
    """
    _use(monkeypatch, list(zip(TABLES, chosen, strict=True)))
    T, S = (max(tile[axis] for tile in chosen) + 5 for axis in (0, 1))
    S += S // 2
    leaves = [x.requires_grad_() for x in (*_inputs(1, 2, 1, T, S, 16, 24), torch.randn(1, 1, T, S))]
    window = S // 2, 7
    out, lse = fastlm.scaled_dot_product_attention(*leaves, enable_gqa=True, window=window, return_lse=True)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    options = False, 0.25, 0.0, 0, *window
    truth, truth_lse = attention_ref(*doubles, *options)
    own, own_lse = attention_ref(*leaves, *options)
    assert_as_close_as_torch(out, truth, own, S, "out")
    assert_as_close_as_torch(lse, truth_lse, own_lse, S, "lse")
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    expected = torch.autograd.grad((truth, truth_lse), doubles, (dout.double(), dlse.double()))
    theirs = torch.autograd.grad((own, own_lse), leaves, (dout, dlse))
    for name, g, e, t in zip(("dq", "dk", "dv", "dmask"), grads, expected, theirs, strict=True):
        assert_as_close_as_torch(g, e, t, 2 * max(T, S), name)


@pytest.mark.parametrize(("few", "many"), _in_turn(decoding.FEW, decoding.MANY), ids=str)
def test_shipped_tiles_of_split_keys(poisoned, monkeypatch, few, many):
    _use(monkeypatch, [(decoding.FEW, few), (decoding.MANY, many)])
    k, v = torch.randn(1, 1, 261, 16), torch.randn(1, 1, 261, 24)
    for heads in (3, max(many[0] + 1, 17)):
        q = torch.randn(1, heads, 1, 16)
        out = fastlm.scaled_dot_product_attention(q, k, v, enable_gqa=True, window=(None, 250))
        options = False, 0.25, 0.0, 0, -1, 250
        truth, _ = attention_ref(q.double(), k.double(), v.double(), None, *options)
        own, _ = attention_ref(q, k, v, None, *options)
        assert_as_close_as_torch(out, truth, own, 261)


tanh = masks.tanh


@triton.jit
def _tanh_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tanh(tl.load(x_ptr + i)))


def test_tanh():
    """Relative error of a few units in the last place, small arguments included."""
    x = torch.cat([torch.linspace(-12, 12, 3000), torch.logspace(-30, 1, 1096)])
    out = torch.empty_like(x)
    _tanh_kernel[(1,)](x, out, 4096)
    expected = x.double().tanh()
    assert ((out - expected) / expected.abs().clamp_min(1e-38)).abs().max() < 4 * torch.finfo(torch.float32).eps


def test_head_sizes_that_fit():
    request = (("head_dim", 320), ("mask", "none"), ("dropout", False), ("lse", True), ("window", False))
    request = _dispatch.Request("cpu", torch.float32, (*request, ("softcap", False)))
    row = next(row for row in _dispatch.backends("scaled_dot_product_attention") if row.name == "triton")
    assert row.unsupported(request) == "its kernels take head sizes up to 256, not 320"
    assert row.needs_proof
    q, k, v = _inputs(1, 1, 1, 3, 3, 320, 8)
    with pytest.raises(fastlm.BackendError, match="head sizes up to 256, not 320"):
        fastlm.scaled_dot_product_attention(q, k, v)
