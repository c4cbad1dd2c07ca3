"""Attention at the edges: masks of the lowest and largest numbers, infinities and NaN that a row does not attend to,
scores of thousands, and extents of 0; on the CPU's instruction sets, Triton's kernels and CUDA's.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastlm
import sdpa
from conftest import CUDA, DTYPES, ON_GPU, TRITON
from fastlm.verify.attention import visible
from tolerances import assert_as_close_as_torch

KERNELS = [*fastlm.cpu_isas(), TRITON, CUDA]


def _force(request):
    if request.param in ON_GPU:
        yield from ON_GPU[request.param](request)
        return
    if request.param == "reference":
        with fastlm.backend("reference"):
            yield request.param
        return
    before = fastlm.cpu_isa()
    fastlm.set_cpu_isa(request.param)
    with fastlm.backend("cpu"):
        yield request.param
    fastlm.set_cpu_isa(before)


@pytest.fixture(params=[*KERNELS, "reference"])
def backend(request):
    """Every implementation in turn."""
    yield from _force(request)


@pytest.fixture(params=KERNELS)
def kernels(request):
    """Those that keep a NaN to the rows that attend to it, which the reference's products of whole matrices do not."""
    yield from _force(request)


def _needs(backend, dtype):
    if backend in ON_GPU and dtype is torch.float64:
        pytest.skip("GPU kernels take no fp64")


def _tensors(B, H, Hkv, T, S, D, Dv, dtype=torch.float32):
    sizes = (B, H, T, D), (B, Hkv, S, D), (B, Hkv, S, Dv)
    return tuple(torch.randn(size).to(dtype).requires_grad_() for size in sizes)


def _doubles(*tensors):
    return tuple(t.detach().double().requires_grad_(t.requires_grad) for t in tensors)


def _stock(q, k, v, mask=None, **options):
    """PyTorch's definition: its fused kernel's gradients of a row of the lowest number are as many times too large as
    there are keys."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, **options)


# ---- masks of the lowest and largest numbers ------------------------------------------------------------------------


def _extreme_rows(S, low, high):
    """(8, S): rows of an additive mask at an edge each."""
    rows = torch.zeros(8, S, dtype=torch.float64)
    rows[0] = low  # the mean of the values
    rows[1, :], rows[1, 1::3] = low, -math.inf  # the mean of those not closed
    rows[2], rows[2, ::4] = low, 0.9 * low
    rows[3], rows[3, 5:] = low, 0.5 * low
    rows[4, 3:6] = high
    rows[5] = torch.linspace(-2, 2, S)
    rows[5, S // 2 :] = low
    rows[6] = high
    rows[7, :2], rows[7, 2:] = low, -math.inf
    return rows


def _check_mask(q, k, v, mask, options):
    doubles = _doubles(q, k, v, mask)
    truth, stock = _stock(*doubles, **options), _stock(q, k, v, mask, **options)
    out, lse = fastlm.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, return_lse=True, **options)
    assert_as_close_as_torch(out, truth, stock, k.shape[2], "out")
    scores = doubles[0] @ doubles[1].repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3) * options["scale"]
    truth_lse = (scores + doubles[3]).logsumexp(-1)
    torch.testing.assert_close(lse.double(), truth_lse, rtol=2e-3 if q.dtype in HALF else 1e-6, atol=1e-5)
    dout = torch.randn_like(out)
    leaves = [(x, d) for x, d in zip((q, k, v, mask), doubles, strict=True) if x.requires_grad]
    ours, wide = zip(*leaves, strict=True)
    grads, theirs = (torch.autograd.grad(o, ours, dout) for o in (out, stock))
    for name, g, e, t in zip("qkvm", grads, torch.autograd.grad(truth, wide, dout.double()), theirs, strict=False):
        assert_as_close_as_torch(g, e, t, 8 * q.shape[1] * k.shape[2], "d" + name)


HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("S", [7, 70, 600])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_of_the_lowest_numbers(backend, poisoned, dtype, S, learned):
    """The lowest number times log2(e) is not finite, and beside it the logarithm of a row's sum is lost."""
    _needs(backend, dtype)
    q, k, v = _tensors(2, 2, 1, 8, S, 16, 24, dtype)
    info = torch.finfo(dtype)
    mask = _extreme_rows(S, info.min, info.max).to(dtype)[None, None].requires_grad_(learned)
    _check_mask(q, k, v, mask, {"scale": 0.25})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_of_the_lowest_numbers_on_the_reference(dtype):
    q, k, v = _tensors(2, 2, 1, 8, 70, 16, 24, dtype)
    info = torch.finfo(dtype)
    mask = _extreme_rows(70, info.min, info.max).to(dtype)[None, None].requires_grad_()
    with fastlm.backend("reference"):
        _check_mask(q, k, v, mask, {"scale": 0.25})


def _second_gradients(attend, q, k, v, mask):
    out = attend(q, k, v, mask)
    first = torch.autograd.grad(out.sin().sum(), (q, k, v), create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v))


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_second_gradients_under_the_lowest_number(name):
    """They go through the reference, whatever the kernel."""
    q, k, v = _tensors(1, 2, 2, 8, 20, 16, 16)
    mask = _extreme_rows(20, torch.finfo(torch.float32).min, torch.finfo(torch.float32).max).float()[None, None]
    with fastlm.backend(name):
        grads = _second_gradients(fastlm.scaled_dot_product_attention, q, k, v, mask)
    stock, truth = _second_gradients(_stock, q, k, v, mask), _second_gradients(_stock, *_doubles(q, k, v, mask))
    for x, g, e, t in zip("qkv", grads, truth, stock, strict=True):
        assert_as_close_as_torch(g, e, t, 8 * 20 * 16, "d" + x)


def test_batches_of_gradients_under_the_lowest_number():
    q, k, v = _tensors(1, 2, 2, 8, 20, 16, 16)
    mask = _extreme_rows(20, torch.finfo(torch.float32).min, torch.finfo(torch.float32).max).float()[None, None]
    out = fastlm.scaled_dot_product_attention(q, k, v, mask)
    douts = torch.randn(3, *out.shape)
    batched = torch.autograd.grad(out, (q, k, v), douts, is_grads_batched=True, retain_graph=True)
    for i, dout in enumerate(douts):
        for g, e in zip(batched, torch.autograd.grad(out, (q, k, v), dout, retain_graph=True), strict=True):
            torch.testing.assert_close(g[i], e, rtol=1e-5, atol=1e-5)


def test_statistics_of_a_row_of_the_lowest_number():
    """Its weights are equal, and its entropy the logarithm of their number."""
    q, k = torch.randn(1, 2, 3, 8, requires_grad=True), torch.randn(1, 2, 10, 8)
    mask = torch.zeros(3, 10)
    mask[1] = torch.finfo(torch.float32).min
    mask.requires_grad_()
    found = fastlm.attention_statistics(q, k, mask)
    wide = (q.detach().double() @ k.double().transpose(2, 3) / 8**0.5 + mask.detach().double()).softmax(-1)
    entropy = torch.special.entr(wide).sum(-1)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    (dmask,) = torch.autograd.grad(found.logsumexp.sum(), mask)
    torch.testing.assert_close(dmask.double(), wide.sum((0, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [1, 2, 40])
def test_padding_by_the_lowest_number(backend, poisoned, T):
    """Decoding and prompts under a mask that every row shares."""
    q, k, v = _tensors(3, 2, 1, T, 300, 16, 16)
    mask = torch.zeros(3, 1, 1, 300)
    mask[0, ..., :100] = mask[1] = torch.finfo(torch.float32).min
    _check_mask(q, k, v, mask, {"scale": 0.3})


def test_narrow_queries_and_a_wide_mask(backend, poisoned):
    q, k, v = (x.detach() for x in _tensors(1, 2, 2, 5, 40, 16, 16, torch.bfloat16))
    mask = torch.full((5, 40), torch.finfo(torch.float32).min)
    mask[2, :7] = 0
    truth = _stock(*_doubles(q, k, v, mask))
    out = fastlm.scaled_dot_product_attention(q, k, v, mask)
    assert_as_close_as_torch(out, truth, truth.bfloat16(), 40)


def test_compiled_gradients_under_the_lowest_number():
    """The registered operator has the log-sum-exp alone to start from."""
    torch._dynamo.reset()
    q, k, v = _tensors(1, 2, 2, 8, 70, 16, 16)
    mask = _extreme_rows(70, torch.finfo(torch.float32).min, torch.finfo(torch.float32).max).float()
    attend = torch.compile(lambda *x: fastlm.scaled_dot_product_attention(*x), fullgraph=True, backend="aot_eager")
    truth = _stock(*(doubles := _doubles(q, k, v, mask)))
    grads = torch.autograd.grad(attend(q, k, v, mask).sum(), (q, k, v))
    for g, e in zip(grads, torch.autograd.grad(truth.sum(), doubles[:3]), strict=True):
        assert_as_close_as_torch(g, e, e.float(), 8 * 70)


def test_gradients_behind_torchs_operator_under_the_lowest_number():
    q, k, v = _tensors(1, 2, 2, 8, 70, 16, 16)
    mask = _extreme_rows(70, torch.finfo(torch.float32).min, torch.finfo(torch.float32).max).float()[None, None]
    truth = _stock(*(doubles := _doubles(q, k, v, mask)))
    with sdpa.activated():
        grads = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, mask).sum(), (q, k, v))
    for g, e in zip(grads, torch.autograd.grad(truth.sum(), doubles[:3]), strict=True):
        assert_as_close_as_torch(g, e, e.float(), 8 * 70)


@pytest.mark.parametrize("merged", ["attn", "padding", "both"])
def test_multi_head_attention_with_floating_masks(merged):
    B, T, E, low = 2, 9, 16, torch.finfo(torch.float32).min
    theirs = torch.nn.MultiheadAttention(E, 2, batch_first=True).double()
    ours = fastlm.nn.MultiheadAttention(E, 2, batch_first=True)
    ours.load_state_dict({name: x.float() for name, x in theirs.state_dict().items()})
    x = torch.randn(B, T, E)
    attn = torch.zeros(T, T).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), low)
    attn[3] = low
    padding = torch.zeros(B, T)
    padding[0, :4] = low
    masks = {"attn_mask": attn if merged != "padding" else None}
    masks["key_padding_mask"] = None if merged == "attn" else padding
    if merged == "both":
        attn[3] = 0  # the sum of two lowest numbers is -inf: a row of it alone is closed
        attn[:4, 4] = 0
    if merged == "padding":
        padding[1] = low
    wide = x.double().requires_grad_()
    x.requires_grad_()
    expected = theirs(wide, wide, wide, **{n: None if m is None else m.double() for n, m in masks.items()})[0]
    y = ours(x, x, x, need_weights=False, **masks)[0]
    assert_as_close_as_torch(y, expected, expected.float(), 4 * E)
    (g,), (e,) = (torch.autograd.grad(o.sum(), i) for o, i in ((y, x), (expected, wide)))
    assert_as_close_as_torch(g, e, e.float(), 16 * E)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_accelerated_models_with_additive_masks(family):
    """Left padding as older code writes it: (B, 1, T, S), the lowest number where nothing is seen."""
    transformers = pytest.importorskip("transformers")
    eager = {"attn_implementation": "eager"}  # the fused one's gradients are wrong, see _stock
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=32, **eager)
        model = transformers.GPT2LMHeadModel(config).eval()
    else:
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, **eager,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).eval()
    tokens, low = torch.randint(0, 50, (2, 11)), torch.finfo(torch.float32).min
    seen = torch.ones(11, 11, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    seen[0, ..., :5] = False  # its first five rows see nothing
    mask = torch.zeros(2, 1, 11, 11).masked_fill(~seen, low)
    expected = model(tokens, attention_mask=mask).logits
    grads = torch.autograd.grad(expected.square().mean(), list(model.parameters()))
    fastlm.accelerate(model)
    logits = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    for g, e in zip(torch.autograd.grad(logits.square().mean(), list(model.parameters())), grads, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-6)


# ---- infinities and NaN that a row does not attend to ---------------------------------------------------------------

ATTENDED = ["padding", "additive", "scattered", "causal", "window", "documents"]


def _attended(kind, T, S):
    """((T, S): who attends to whom, the mask that says so, other options, a key to spoil)."""
    attended, options, spoilt = torch.ones(T, S, dtype=torch.bool), {}, S // 2 + 1
    if kind in ("padding", "additive"):
        attended[:, S // 2 :] = False
    elif kind == "scattered":
        attended = torch.rand(T, S) > 0.5
        attended[:, 0], attended[:, spoilt] = True, False
        attended[3, spoilt] = True
    elif kind == "documents":
        attended = torch.arange(T)[:, None] // 20 == torch.arange(S) // 20
    else:
        options = {"is_causal": True} if kind == "causal" else {"window": (5, 3)}
        attended, spoilt = visible(T, S, {"is_causal": False, **options}), T // 2
    mask = None if options else attended
    if kind == "additive":
        mask = torch.zeros(T, S).masked_fill(~attended, -math.inf)
    return attended, mask, options, spoilt


def _gradients(q, k, v, mask, dout, options):
    mask = mask.detach().to(q.dtype).requires_grad_() if mask is not None and mask.dtype != torch.bool else mask
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = fastlm.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, **options)
    leaves = [q, k, v] + ([mask] if mask is not None and mask.requires_grad else [])
    return (out.detach(), *torch.autograd.grad(out, leaves, dout))


def _check_nan_stays(kind, what, dtype, extra=None):
    """What no path leads to from a spoilt key has to come out as without it; what one leads to, as NaN."""
    T = S = 150
    q, k, v = (x.detach() for x in _tensors(2, 2, 1, T, S, 16, 24, dtype))
    attended, mask, options, spoilt = _attended(kind, T, S)
    options = {**options, **(extra or {})}
    touched = attended[:, spoilt]
    dout = torch.randn(2, 2, T, 24).to(dtype)
    clean = _gradients(q, k, v, mask, dout, options)
    k, v, dout = k.clone(), v.clone(), dout.clone()
    if "k" in what:
        k[:, :, spoilt, 3] = math.nan
    if "v" in what:
        v[:, :, spoilt] = math.inf
    if "g" in what:
        dout[:, :, touched] = math.nan  # as a loss of such rows would have it
    out, dq, dk, dv, *dmask = _gradients(q, k, v, mask, dout, options)
    reached = attended[touched].any(0)  # keys whose gradients are sums over a touched row
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype in HALF else {"rtol": 1e-5, "atol": 1e-5}
    for got, expected, kept in zip((out, dq, dk, dv), clean, (~touched, ~touched, ~reached, ~reached), strict=False):
        torch.testing.assert_close(got[:, :, kept], expected[:, :, kept], **tolerance)
    if dmask:
        torch.testing.assert_close(dmask[0][~touched], clean[4][~touched], **tolerance)
    assert not out[:, :, touched].isfinite().all(-1).any()
    assert not dq[:, :, touched].isfinite().all(-1).any()
    if "g" in what or "k" in what:
        assert not dv[:, :, reached].isfinite().all(-1).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", ["k", "v", "kv", "kvg"])
@pytest.mark.parametrize("kind", ATTENDED)
def test_nan_reaches_no_gradient_that_does_not_depend_on_it(kernels, poisoned, kind, what, dtype):
    _needs(kernels, dtype)
    if kernels in ON_GPU and not torch.cuda.is_available() and (dtype is not torch.float32 or what in ("v", "kv")):
        pytest.skip("emulating a GPU takes seconds, and every dtype goes the same way there")
    _check_nan_stays(kind, what, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["padding", "causal"])
@pytest.mark.parametrize("extra", [{"softcap": 2.0}, {"scale": -0.3}, {"return_lse": False}], ids=str)
def test_nan_stays_with_other_options(kernels, kind, extra):
    _check_nan_stays(kind, "kv", torch.float32, extra)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": (2, 1)}, {"window": (None, 0)}], ids=str)
def test_keys_beyond_the_last_query_get_gradients_of_0(backend, poisoned, options):
    """No row attends to them: those with which a tile of queries is filled up do not count."""
    q, k, v = (x.detach() for x in _tensors(2, 2, 1, 4, 40, 16, 16))
    k, v = k.clone(), v.clone()
    k[:, :, 9, 3], v[:, :, 12] = math.nan, math.inf
    out, dq, dk, dv = _gradients(q, k, v, None, torch.randn(2, 2, 4, 16), options)
    assert out.isfinite().all()
    assert dq.isfinite().all()
    assert dk[:, :, 5:].eq(0).all()
    assert dv[:, :, 5:].eq(0).all()


@pytest.mark.skipif(not fastlm.cpu_isas(), reason="no CPU extension")
@pytest.mark.parametrize("kind", ["padding", "additive", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_behind_the_mask_of_one_query_stays_there(every_isa, dtype, kind):
    """With few keys too, where PyTorch's operator is the fast one without a mask; whatever backend is chosen."""
    for B, H, S in itertools.product((1, 2), (1, 12), (2, 40, 400)):
        q, k, v = (x.detach() for x in _tensors(B, H, H, 1, S, 16, 16, dtype))
        attended, mask, options, _ = _attended(kind, 1, S)
        closed = ~attended[0]
        clean = fastlm.scaled_dot_product_attention(q, k, v, mask, **options)
        k[:, :, closed], v[:, :, closed] = math.nan, math.nan
        out = fastlm.scaled_dot_product_attention(q, k, v, mask, **options)
        torch.testing.assert_close(out, clean, rtol=2e-2 if dtype in HALF else 1e-5, atol=1e-5)
        nothing = torch.zeros(S, dtype=torch.bool)
        assert fastlm.scaled_dot_product_attention(q, k, v, nothing).eq(0).all()


@pytest.mark.parametrize("kind", ["padding", "additive"])
@pytest.mark.parametrize("compiled", [False, True])
def test_nan_behind_padding_on_the_reference(kind, compiled):
    """Plain torch keeps it out where no query attends to the key; the compiled operator's formula too."""
    with fastlm.backend("reference"):
        if not compiled:
            _check_nan_stays(kind, "kv", torch.float32)
            return
        torch._dynamo.reset()
        q, k, v = _tensors(1, 2, 2, 20, 30, 8, 8)
        mask = _attended(kind, 20, 30)[1]
        attend = torch.compile(lambda *x: fastlm.scaled_dot_product_attention(*x), backend="aot_eager", fullgraph=True)
        clean = torch.autograd.grad(attend(q, k, v, mask).sum(), (q, k, v))
        with torch.no_grad():
            k[:, :, 20], v[:, :, 20] = math.nan, math.inf
        for g, e in zip(torch.autograd.grad(attend(q, k, v, mask).sum(), (q, k, v)), clean, strict=True):
            torch.testing.assert_close(g, e)


def test_nan_of_one_sequence_stays_out_of_the_others(backend, poisoned):
    q, k, v = (torch.randn(90, heads, 16) for heads in (2, 1, 1))
    cu = torch.tensor([0, 30, 55, 90], dtype=torch.int32)

    def run(q, k, v):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = fastlm.attention_varlen(*leaves, cu, is_causal=True)
        return (out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out)))

    clean = run(q, k, v)
    k, v = k.clone(), v.clone()
    k[40], v[40] = math.nan, math.nan
    for got, expected in zip(run(q, k, v), clean, strict=True):
        torch.testing.assert_close(got[:30], expected[:30], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[55:], expected[55:], rtol=1e-5, atol=1e-5)


# ---- scores of thousands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [5, 50, 500])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("D", [64, 80])
def test_large_scores_cost_no_more_digits_than_in_torch(every_isa, D, is_causal, spread):
    """Weights come back from scores and log-sum-exp, both large: made otherwise than in the forward pass, they cost dv
    up to 25 times PyTorch's error."""
    q, k, v = _tensors(1, 4, 4, 256, 256, D, D)
    with torch.no_grad():
        q *= spread
    doubles = _doubles(q, k, v)
    dout = torch.randn_like(q)
    with fastlm.backend("cpu"):
        out = fastlm.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    stock = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    truth = _stock(*doubles, is_causal=is_causal)
    grads, theirs = (torch.autograd.grad(o, (q, k, v), dout) for o in (out, stock))
    for name, g, e, t in zip("qkv", grads, torch.autograd.grad(truth, doubles, dout.double()), theirs, strict=True):
        assert_as_close_as_torch(g, e, t, 1, "d" + name)


# ---- extents of 0 ---------------------------------------------------------------------------------------------------

NAMES = ("B", "H", "T", "S", "D", "Dv")
EMPTY = [*itertools.combinations(NAMES, 1), ("T", "S"), ("D", "Dv"), ("S", "D"), ("B", "H", "T", "S", "D", "Dv")]


def _check_empty(without, kind, T, dtype, learned=True):
    sizes = {"B": 2, "H": 2, "T": T, "S": 7, "D": 8, "Dv": 8} | dict.fromkeys(without, 0)
    B, H, T, S, D, Dv = sizes.values()
    q, k, v = _tensors(B, H, H, T, S, D, Dv, dtype)
    mask = None
    if kind == "boolean":
        mask = torch.ones(B, 1, 1, S, dtype=torch.bool)
    elif kind:
        shape = {"whole": (B, H, T, S), "matrix": (T, S), "keys": (1, H, 1, S), "rows": (B, 1, T, 1)}[kind]
        mask = torch.zeros(shape, dtype=dtype, requires_grad=True)
    out = fastlm.scaled_dot_product_attention(q, k, v, mask)
    # Without head size every score is 0, and the output the mean of the values; else it is empty, or nothing attends.
    scores = torch.zeros(B, H, T, S, dtype=torch.float64)
    scores = scores + mask.double() if mask is not None and mask.requires_grad else scores
    expected = scores.softmax(-1) @ v.double()
    assert out.shape == (B, H, T, Dv)
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)
    leaves = [x for x in (q, k, v, mask) if x is not None and x.requires_grad]
    leaves = leaves if learned else leaves[:3]
    dout = torch.randn_like(out)
    truths = torch.autograd.grad(expected, leaves, dout.double(), allow_unused=True)
    for x, g, e in zip(leaves, torch.autograd.grad(out, leaves, dout), truths, strict=True):
        assert g.shape == x.shape
        torch.testing.assert_close(g, torch.zeros_like(x) if e is None else e, rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        assert torch.equal(fastlm.scaled_dot_product_attention(q, k, v, mask), out)


@pytest.mark.parametrize("kind", [None, "boolean", "whole", "matrix", "keys", "rows"])
@pytest.mark.parametrize("without", EMPTY, ids="".join)
def test_every_extent_may_be_0(backend, poisoned, without, kind):
    for T, dtype in ((5, torch.float32), (1, torch.float32), (5, torch.bfloat16)):
        _check_empty(without, kind, T, dtype)


@pytest.mark.parametrize("kind", [None, "whole", "keys"])
@pytest.mark.parametrize("without", EMPTY, ids="".join)
def test_every_extent_may_be_0_elsewhere(poisoned, without, kind):
    for name in ("torch", "reference", None):
        with fastlm.backend(name) if name else torch.enable_grad():
            _check_empty(without, kind, 5, torch.float32, name != "torch")  # it gives no gradient of an empty mask


@pytest.mark.parametrize("without", [*itertools.combinations(("tokens", "H", "D", "Dv"), 1), ("D", "Dv")], ids="".join)
def test_every_extent_of_packed_sequences_may_be_0(backend, poisoned, without):
    tokens, H, D, Dv = ({"tokens": 6, "H": 2, "D": 8, "Dv": 8} | dict.fromkeys(without, 0)).values()
    for offsets in ([0, tokens], [0, 0, tokens, tokens], [0] if not tokens else [0, 2, tokens]):
        cu = torch.tensor(offsets, dtype=torch.int32)
        q, k, v = (torch.randn(tokens, H, size, requires_grad=True) for size in (D, D, Dv))
        out, lse = fastlm.attention_varlen(q, k, v, cu, return_lse=True)
        assert out.shape == (tokens, H, Dv)
        assert lse.shape == (H, tokens)
        for x, g in zip((q, k, v), torch.autograd.grad(out.sum() + lse.sum(), (q, k, v)), strict=True):
            assert g.shape == x.shape
            assert g.isfinite().all()


def test_heads_that_no_query_has_get_gradients_of_0(backend, poisoned):
    q, k, v = _tensors(2, 0, 2, 5, 7, 8, 8)
    out = fastlm.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert out.shape == (2, 0, 5, 8)
    for g in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)):
        assert g.eq(0).all()
    q, k, v = (torch.randn(6, heads, 8, requires_grad=True) for heads in (0, 2, 2))
    out = fastlm.attention_varlen(q, k, v, torch.tensor([0, 4, 6], dtype=torch.int32))
    assert out.shape == (6, 0, 8)
    for g in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)):
        assert g.eq(0).all()
