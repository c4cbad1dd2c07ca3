"""fastlm.nn.MultiheadAttention against torch.nn.MultiheadAttention on the same state."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch.overrides import TorchFunctionMode

import fastlm.nn
import fastlm.nn.attention
from tolerances import assert_as_close_as_torch

E, H, B, T, S = 33, 3, 2, 5, 7  # D = 11

OPTIONS = [
    dict(zip(("bias", "add_bias_kv", "add_zero_attn", "batch_first", "kdim", "vdim"), (*flags, *dims), strict=True))
    for *flags, dims in itertools.product(*4 * [(True, False)], ((None, None), (13, None), (17, 19)))
]
WEIGHTS = [
    {"need_weights": False},
    {"need_weights": True},
    {"need_weights": True, "average_attn_weights": False},
]
MASKS = ["none", "padding", "float padding", "2d", "float 2d", "3d", "float 3d", "padding 2d", "padding 3d"]
MASKS += ["float padding float 3d", "float padding 2d", "padding float 2d"]


def twins(dtype=torch.float32, embed_dim=E, num_heads=H, std=0.3, **options):
    """(ours, torch's, torch's in fp64) with one random state; torch starts its biases at 0."""
    theirs = torch.nn.MultiheadAttention(embed_dim, num_heads, dtype=dtype, **options)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=std)
    ours = fastlm.nn.MultiheadAttention(embed_dim, num_heads, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs, copy.deepcopy(theirs).double()


def sequence(layer, length, width, batch=B):
    dtype = layer.out_proj.weight.dtype
    if batch is None:
        return torch.randn(length, width, dtype=dtype)
    shape = (batch, length, width) if layer.batch_first else (length, batch, width)
    return torch.randn(shape, dtype=dtype)


def inputs_of(layer, kind, batch=B):
    """query, key, value; "self" and "cross" hold one tensor several times."""
    query = sequence(layer, T, layer.embed_dim, batch)
    if kind == "self":
        return query, query, query
    key = sequence(layer, S, layer.kdim, batch)
    return query, key, key if kind == "cross" else sequence(layer, S, layer.vdim, batch)


def masks_of(kind, T, S, batch=B, heads=H, dtype=torch.float32):
    """Masks that leave every query two keys; on a single one, the scores' gradients are 0 by cancellation alone."""

    def mask(*shape, floating):
        blocked = torch.rand(shape) < 0.4
        blocked[..., :2] = False
        return torch.randn(shape, dtype=dtype).masked_fill(blocked, -torch.inf) if floating else blocked

    masks = {}
    if "padding" in kind:
        shape = (S,) if batch is None else (batch, S)
        masks["key_padding_mask"] = mask(*shape, floating="float padding" in kind)
    if "2d" in kind:
        masks["attn_mask"] = mask(T, S, floating="float 2d" in kind)
    if "3d" in kind:
        masks["attn_mask"] = mask((1 if batch is None else batch) * heads, T, S, floating="float 3d" in kind)
    return masks


def run(layer, inputs, options, dys):
    """Outputs and all gradients by name. Shared inputs stay shared; floating-point masks get gradients."""
    dtype = layer.out_proj.weight.dtype
    leaves = {id(x): x.detach().to(dtype, copy=True).requires_grad_() for x in inputs}
    options = {
        name: option.detach().to(dtype, copy=True).requires_grad_()
        if isinstance(option, torch.Tensor) and option.is_floating_point()
        else option
        for name, option in options.items()
    }
    with warnings.catch_warnings():
        # torch calls masks of two kinds deprecated; they are supported here.
        warnings.filterwarnings("ignore", message="Support for mismatched")
        outputs = [y for y in layer(*(leaves[id(x)] for x in inputs), **options) if y is not None]
    torch.autograd.backward(outputs, [dy.to(y.dtype) for y, dy in zip(outputs, dys, strict=False)])
    results = {name: y.detach() for name, y in zip(("output", "weights"), outputs, strict=False)}
    results |= {f"d input {i}": leaf.grad for i, leaf in enumerate(leaves.values())}
    results |= {f"d {name}": m.grad for name, m in options.items() if getattr(m, "requires_grad", False)}
    return results | {f"d {name}": p.grad for name, p in layer.named_parameters()}


def assert_parity(layers, inputs, options):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Support for mismatched")
        shapes = [y.shape for y in layers[1](*inputs, **options) if y is not None]
    dys = [torch.randn(shape).to(layers[0].out_proj.weight.dtype) for shape in shapes]
    actual, by_torch, truth = (run(layer, inputs, options, dys) for layer in layers)
    assert actual.keys() == by_torch.keys()
    size = 3 * layers[0].embed_dim + max(x.shape[-1] for x in inputs) + B * H * (T + S)
    for name, result in actual.items():
        assert result.dtype == by_torch[name].dtype, name
        assert_as_close_as_torch(result, truth[name], by_torch[name], size, name)


@pytest.mark.parametrize("weights", WEIGHTS, ids=["output", "averaged", "per head"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_constructor_option(weights, training):
    for options, mask in zip(OPTIONS, itertools.cycle(MASKS)):
        layers = [layer.train(training) for layer in twins(**options)]
        inputs = inputs_of(layers[0], "separate")
        assert_parity(layers, inputs, weights | masks_of(mask, T, S))


@pytest.mark.parametrize("weights", WEIGHTS, ids=["output", "averaged", "per head"])
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask(mask, weights):
    cases = itertools.product(("self", "cross", "separate"), (True, False), (B, None), (True, False))
    for kind, batch_first, batch, extra_key in cases:
        layers = twins(batch_first=batch_first, add_bias_kv=extra_key)
        inputs = inputs_of(layers[0], kind, batch)
        assert_parity(layers, inputs, weights | masks_of(mask, T, T if kind == "self" else S, batch))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", WEIGHTS, ids=["output", "averaged", "per head"])
@pytest.mark.parametrize("mask", ["none", "padding", "float 3d", "padding 2d"])
def test_other_dtypes(dtype, weights, mask):
    for kind in ("self", "separate"):
        # Scores of 3 are rounded in bf16 before the exponential, on either side: of 1,200 pairs of gradients 9 came out
        # further apart than the tolerance by chance. With these, which are near 1, none did.
        layers = twins(dtype, batch_first=True, std=0.15)
        inputs = inputs_of(layers[0], kind)
        assert_parity(layers, inputs, weights | masks_of(mask, T, T if kind == "self" else S, dtype=dtype))


@pytest.mark.parametrize(("embed_dim", "num_heads"), [(7, 1), (65, 5), (6, 6), (64, 4)])
def test_head_counts_and_sizes(embed_dim, num_heads):
    layers = twins(embed_dim=embed_dim, num_heads=num_heads, batch_first=True)
    assert_parity(layers, inputs_of(layers[0], "cross"), {"need_weights": False})


@pytest.mark.parametrize("weights", WEIGHTS, ids=["output", "averaged", "per head"])
@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("extra_key", [False, True])
def test_causal_hint(weights, floating, padded, extra_key):
    layers = twins(batch_first=True, add_zero_attn=extra_key)
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)
    if floating:
        mask = torch.zeros(T, T).masked_fill(mask, -torch.inf)
    options = weights | {"attn_mask": mask, "is_causal": True}
    if padded:
        options |= masks_of("float padding" if floating else "padding", T, T)
    inputs = inputs_of(layers[0], "self")
    actual, by_torch = (layer(*inputs, **options) for layer in layers[:2])
    for ours, theirs in zip(actual, by_torch, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_eval_without_gradients_is_torchs_fast_path_result():
    ours, theirs, truth = (layer.eval() for layer in twins(embed_dim=32, num_heads=4, batch_first=True))
    inputs = inputs_of(ours, "self")
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():
        results = [attend(layer, inputs[0], key_padding_mask=padding) for layer in (ours, theirs, truth)]
    assert_as_close_as_torch(results[0], results[2], results[1], 128)


def attend(layer, x, **options):
    """Self-attention's output alone."""
    x = x.to(layer.out_proj.weight.dtype)
    return layer(x, x, x, **({"need_weights": False} | options))[0]


@pytest.mark.parametrize("weights", WEIGHTS, ids=["output", "averaged", "per head"])
@pytest.mark.parametrize("mask", ["padding", "2d", "float 2d", "float 3d"])
def test_fully_masked_rows_see_nothing(mask, weights):
    ours, _, _ = twins(torch.float64, batch_first=True)
    query, key, value = (x.requires_grad_() for x in inputs_of(ours, "separate"))
    masks = masks_of(mask, T, S, dtype=torch.float64)
    name, given = next(iter(masks.items()))
    blocked = torch.zeros_like(given, dtype=torch.bool)
    # One batch entry of key padding; one query of attn_mask, in the first head if there are several.
    blocked[(1,) if mask == "padding" else (0, 2) if "3d" in mask else (2,)] = True
    masks[name] = given | blocked if given.dtype == torch.bool else given.masked_fill(blocked, -torch.inf)
    output, returned = ours(query, key, value, **weights, **masks)
    assert output.isfinite().all()
    if mask == "padding":
        torch.testing.assert_close(output[1], ours.out_proj.bias.expand(T, E))
    elif "2d" in mask:
        torch.testing.assert_close(output[:, 2], ours.out_proj.bias.expand(B, E))
    if returned is not None:
        sums = returned.sum(-1)
        assert sums.isfinite().all()
        assert bool((sums == 0).any()) == (mask != "float 3d" or returned.dim() == 4)
    output.sum().backward()
    gradients = [query.grad, key.grad, value.grad, *(p.grad for p in ours.parameters())]
    assert all(g.isfinite().all() for g in gradients)
    if mask == "padding":
        assert all((g[1] == 0).all() for g in gradients[:3])


def test_dropout_on_returned_weights_is_torchs():
    ours, theirs, _ = twins(dropout=0.4, batch_first=True)
    inputs = inputs_of(ours, "separate")
    for average in (True, False):
        torch.manual_seed(7)
        expected = theirs(*inputs, average_attn_weights=average)
        torch.manual_seed(7)
        actual = ours(*inputs, average_attn_weights=average)
        for mine, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(mine, other)
    assert bool((actual[1] == 0).any())
    assert bool((ours.eval()(*inputs)[1] > 0).all())


def test_dropout_of_the_fused_path_has_the_right_mean():
    ours, _, _ = twins(dropout=0.3, batch_first=True)
    x = torch.randn(1, T, E).expand(4001, T, E)
    draws = attend(ours, x).detach().double()
    expected = attend(ours.eval(), x[:1])[0].detach().double()
    standard_error = draws.std(0) / len(draws) ** 0.5
    assert (draws.std(0) > 0).all()
    # 165 elements: five standard errors are exceeded by chance once in ten thousand runs.
    assert ((draws.mean(0) - expected).abs() < 5 * standard_error).all()
    ours.train().dropout = 1.0
    torch.testing.assert_close(attend(ours, x[:1]), ours.out_proj.bias.expand(1, T, E))


class Recorder(TorchFunctionMode):
    """Counts the linear products."""

    def __init__(self):
        super().__init__()
        self.linears = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.linears += func is torch.nn.functional.linear
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "products"), [("self", 2), ("cross", 3), ("separate", 4)])
def test_tensors_that_are_the_same_share_a_projection(kind, products):
    ours, _, _ = twins(batch_first=True)
    with Recorder() as recorder:
        ours(*inputs_of(ours, kind), need_weights=False)
    assert recorder.linears == products


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_op_gets_views_and_a_broadcast_padding_mask(batch_first, monkeypatch):
    calls = []

    def spy(q, k, v, mask, *rest):
        calls.append((q, k, v, mask))
        return fastlm.scaled_dot_product_attention(q, k, v, mask, *rest)

    monkeypatch.setattr(fastlm.nn.attention, "scaled_dot_product_attention", spy)
    ours, _, _ = twins(batch_first=batch_first)
    attend(ours, sequence(ours, T, E), key_padding_mask=torch.zeros(B, T, dtype=torch.bool))
    q, k, v, mask = calls[0]
    assert mask.shape == (B, 1, 1, T)
    assert q.shape == k.shape == v.shape == (B, H, T, E // H)
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    attend(ours, sequence(ours, T, E), **masks_of("padding 2d", T, T))
    assert calls[1][3].shape == (B, 1, T, T)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{v}" for v in o.values()))
def test_is_torchs_class_with_its_state_and_repr(options):
    torch.manual_seed(1)
    ours = fastlm.nn.MultiheadAttention(E, H, 0.1, **options)
    torch.manual_seed(1)
    theirs = torch.nn.MultiheadAttention(E, H, 0.1, **options)
    assert isinstance(ours, torch.nn.MultiheadAttention)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
    theirs.load_state_dict(twins(**options)[0].state_dict(), strict=True)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_whole(clone):
    ours, _, _ = twins(batch_first=True, add_bias_kv=True)
    x = sequence(ours, T, E)
    copied = clone(ours)
    assert type(copied) is fastlm.nn.MultiheadAttention
    assert torch.equal(attend(copied, x), attend(ours, x))
    assert copied.in_proj_weight.data_ptr() != ours.in_proj_weight.data_ptr()


@pytest.mark.parametrize("weights", WEIGHTS, ids=["output", "averaged", "per head"])
def test_hooks_and_parametrizations_run(weights):
    ours, _, _ = twins(batch_first=True)
    x = sequence(ours, T, E)
    seen = []
    ours.register_forward_hook(lambda module, args, output: seen.append(output[0].shape))
    ours.register_full_backward_hook(lambda module, dx, dy: seen.append(len(dx)))
    ours(x.requires_grad_(), x, x, **weights)[0].sum().backward()
    assert seen == [(B, T, E), 3]

    class Zero(torch.nn.Module):
        def forward(self, weight):
            return torch.zeros_like(weight)

    torch.nn.utils.parametrize.register_parametrization(ours, "in_proj_weight", Zero())
    row = torch.nn.functional.linear(ours.in_proj_bias[2 * E :], ours.out_proj.weight, ours.out_proj.bias)
    torch.testing.assert_close(ours(x, x, x, **weights)[0], row.expand(B, T, E))


@pytest.mark.parametrize("weights", WEIGHTS, ids=["output", "averaged", "per head"])
@pytest.mark.parametrize("mask", ["none", "padding 2d", "float 3d"])
def test_compiles_whole(weights, mask):
    torch._dynamo.reset()
    ours, _, _ = twins(batch_first=True, add_zero_attn=True)
    x = sequence(ours, T, E)
    masks = masks_of(mask, T, T)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    expected, actual = ours(x, x, x, **weights, **masks), compiled(x, x, x, **weights, **masks)
    torch.testing.assert_close(actual, expected)
    gradients = []
    for y in (expected[0], actual[0]):
        ours.zero_grad()
        y.square().sum().backward()
        gradients.append([p.grad for p in ours.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("weights", WEIGHTS, ids=["output", "averaged", "per head"])
@pytest.mark.parametrize("mask", ["none", "padding", "float 2d"])
@pytest.mark.parametrize("extra_key", [True, False])
def test_autocast_gives_torchs_dtypes(weights, mask, extra_key):
    ours, theirs, truth = twins(batch_first=True, add_bias_kv=extra_key)
    inputs = inputs_of(ours, "self")
    masks = masks_of(mask, T, T)
    with torch.autocast("cpu", torch.bfloat16):
        actual, by_torch = (layer(*inputs, **weights, **masks) for layer in (ours, theirs))
    exact = truth(*(3 * [inputs[0].double()]), **weights, **{
        name: m.double() if m.is_floating_point() else m for name, m in masks.items()
    })  # fmt: skip
    for mine, other, true in zip(actual, by_torch, exact, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert mine.dtype == other.dtype
            assert_as_close_as_torch(mine.detach(), true.detach(), other, 3 * E)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask", ["none", "float padding float 3d", "padding"])
def test_gradcheck(need_weights, mask):
    ours, _, _ = twins(torch.float64, embed_dim=6, num_heads=2, batch_first=True)
    masks = masks_of(mask, 2, 3, batch=1, heads=2, dtype=torch.float64)
    # -inf has no finite difference.
    floating = {name: m.nan_to_num(neginf=-1.0) for name, m in masks.items() if m.is_floating_point()}
    constant = {name: m for name, m in masks.items() if name not in floating}
    query, key = torch.randn(1, 2, 6, dtype=torch.float64), torch.randn(1, 3, 6, dtype=torch.float64)
    parameters = dict(ours.named_parameters())

    def call(query, key, *leaves):
        state = dict(zip(parameters, leaves[: len(parameters)], strict=True))
        options = dict(zip(floating, leaves[len(parameters) :], strict=True)) | constant
        options["need_weights"] = need_weights
        outputs = torch.func.functional_call(ours, state, (query, key, key), options)
        return tuple(y for y in outputs if y is not None)

    leaves = (query, key, *parameters.values(), *floating.values())
    assert torch.autograd.gradcheck(call, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("weights", WEIGHTS, ids=["output", "averaged", "per head"])
def test_empty_batch(batch_first, weights):
    ours, _, _ = twins(batch_first=batch_first)
    inputs = inputs_of(ours, "self", batch=0)
    heads = () if weights.get("average_attn_weights", True) else (H,)
    for mask in MASKS:
        output, returned = ours(*inputs, **weights, **masks_of(mask, T, T, batch=0))
        assert output.shape == inputs[0].shape
        assert (returned.shape == (0, *heads, T, T)) if weights["need_weights"] else returned is None
    output.sum().backward()
    assert all((p.grad == 0).all() for p in ours.parameters())


def test_output_layout_is_contiguous():
    for batch_first in (True, False):
        ours, _, _ = twins(batch_first=batch_first)
        assert attend(ours, sequence(ours, T, E)).is_contiguous()


def test_strided_inputs():
    layers = twins(batch_first=True)
    query = torch.randn(E, T, B).permute(2, 1, 0)
    key = torch.randn(B, 2 * S, E)[:, ::2]
    assert_parity(layers, (query, key, key), {"need_weights": False})


def padding(*shape):
    return torch.zeros(shape, dtype=torch.bool)


QUERY, KEY = (B, T, E), (B, S, E)
BAD_SHAPES = [
    ((B, T, E + 1), KEY, KEY, {}, rf"query has shape \({B}, {T}, {E + 1}\).*{E} features"),
    (QUERY, (B, S, E - 1), KEY, {}, rf"key has shape \({B}, {S}, {E - 1}\).*{E} features"),
    (QUERY, KEY, (B, S, 1), {}, rf"value has shape \({B}, {S}, 1\).*{E} features"),
    ((1, *QUERY), KEY, KEY, {}, r"query has shape .* expected two or three dimensions"),
    (QUERY, (S, E), KEY, {}, r"key has shape .* expected 3 dimensions, as query"),
    (QUERY, KEY, (B, S + 1, E), {}, rf"value has shape .* expected \({B}, {S}, {E}\)"),
    (QUERY, (B + 1, S, E), (B + 1, S, E), {}, rf"key has a batch of {B + 1}, query one of {B}"),
    (QUERY, KEY, KEY, {"key_padding_mask": padding(B, T)}, rf"key_padding_mask has shape .* \({B}, {S}\)"),
    (QUERY, KEY, KEY, {"key_padding_mask": padding(S)}, rf"key_padding_mask has shape .* \({B}, {S}\)"),
    ((T, E), (S, E), (S, E), {"key_padding_mask": padding(1, S)}, rf"key_padding_mask .* expected \({S},\)"),
    (QUERY, KEY, KEY, {"attn_mask": padding(S, T)}, rf"attn_mask .* \({T}, {S}\) or \({B * H}, {T}, {S}\)"),
    (QUERY, KEY, KEY, {"attn_mask": padding(B, T, S)}, rf"attn_mask has shape \({B}, {T}, {S}\)"),
]


@pytest.mark.parametrize(("query", "key", "value", "masks", "message"), BAD_SHAPES)
def test_wrong_shapes_are_named(query, key, value, masks, message):
    layer = fastlm.nn.MultiheadAttention(E, H, batch_first=True)
    with pytest.raises(ValueError, match=f"MultiheadAttention: {message}"):
        layer(torch.randn(query), torch.randn(key), torch.randn(value), **masks)


def test_other_errors_are_named():
    layer = fastlm.nn.MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(B, T, E)
    with pytest.raises(TypeError, match=r"query has dtype torch\.float64, the parameters"):
        layer(x.double(), x, x)
    with pytest.raises(TypeError, match=r"attn_mask has dtype torch\.int64, expected bool"):
        layer(x, x, x, attn_mask=torch.zeros(T, T, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"key_padding_mask has dtype torch\.uint8"):
        layer(x, x, x, key_padding_mask=torch.zeros(B, T, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="attn_mask is None, but the is_causal hint needs it"):
        layer(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match="query is on meta, the parameters are on cpu"):
        layer(x.to("meta"), x, x)
    with pytest.raises(AssertionError, match="embed_dim must be divisible by num_heads"):
        fastlm.nn.MultiheadAttention(E, 4)
