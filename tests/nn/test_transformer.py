"""fastlm.nn's Transformer layers against torch.nn's on the same state."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlm.nn
from tolerances import assert_as_close_as_torch

E, H, FF, B, T, S = 22, 2, 37, 3, 5, 7  # D = 11
ENCODER = (fastlm.nn.TransformerEncoderLayer, nn.TransformerEncoderLayer)
DECODER = (fastlm.nn.TransformerDecoderLayer, nn.TransformerDecoderLayer)
KINDS = pytest.mark.parametrize("kind", [ENCODER, DECODER], ids=["encoder", "decoder"])
NORMS = pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "F.gelu": F.gelu,
    "fastlm.gelu": fastlm.gelu,
    "F.silu": F.silu,
    "nn.GELU": nn.GELU("tanh"),
    "fastlm.nn.GELU": fastlm.nn.GELU("tanh"),
    "nn.ReLU": nn.ReLU(),
}


def twins(kind, dtype=torch.float32, dropout=0.0, **options):
    """(ours, torch's, torch's in fp64) with one random state."""
    theirs = kind[1](E, H, FF, dropout, dtype=dtype, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = kind[0](E, H, FF, dropout, dtype=dtype, **copy.deepcopy(options))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs, copy.deepcopy(theirs).double()


def sequence(layer, length, batch=B):
    dtype = layer.linear1.weight.dtype
    if batch is None:
        return torch.randn(length, E, dtype=dtype)
    first = layer.self_attn.batch_first
    return torch.randn((batch, length, E) if first else (length, batch, E), dtype=dtype)


def inputs_of(kind, layer, batch=B):
    inputs = (sequence(layer, T, batch),)
    return inputs if kind is ENCODER else (*inputs, sequence(layer, S, batch))


def padding(length, floating, batch=B):
    blocked = torch.rand(() if batch is None else (batch, 1)) * length <= torch.arange(length) - 1
    return torch.zeros(blocked.shape).masked_fill(blocked, -torch.inf) if floating else blocked


def causal(floating):
    blocked = torch.ones(T, T, dtype=torch.bool).triu(1)
    return torch.zeros(T, T).masked_fill(blocked, -torch.inf) if floating else blocked


def masks_of(kind, name, floating=False, batch=B):
    """Keyword arguments of forward."""
    own = "src" if kind is ENCODER else "tgt"
    masks = {}
    if "causal" in name:
        masks[f"{own}_mask"] = causal(floating)
    if "hint" in name:
        masks["is_causal" if kind is ENCODER else "tgt_is_causal"] = True
    if "padding" in name:
        masks[f"{own}_key_padding_mask"] = padding(T, floating, batch)
    if "memory" in name and kind is DECODER:
        masks["memory_key_padding_mask"] = padding(S, floating, batch)
        masks["memory_mask"] = torch.zeros(T, S) if floating else torch.zeros(T, S, dtype=torch.bool)
    return masks


def run(layer, inputs, masks, dy):
    leaves = [x.detach().to(dy.dtype, copy=True).requires_grad_() for x in inputs]
    masks = {n: m.to(dy.dtype) if torch.is_tensor(m) and m.is_floating_point() else m for n, m in masks.items()}
    y = layer(*leaves, **masks)
    y.backward(dy)
    results = {"output": y.detach()} | {f"d input {i}": x.grad for i, x in enumerate(leaves)}
    return results | {f"d {name}": p.grad for name, p in layer.named_parameters()}


def assert_parity(layers, inputs, masks=None):
    dy = torch.randn_like(inputs[0])
    ours, theirs, truth = layers
    masks = masks or {}
    actual, by_torch = run(ours, inputs, masks, dy), run(theirs, inputs, masks, dy)
    exact = run(truth, inputs, masks, dy.double())
    assert actual.keys() == by_torch.keys()
    size = 12 * E + 2 * FF + B * (T + S)
    for name, result in actual.items():
        assert result.dtype == by_torch[name].dtype, name
        assert_as_close_as_torch(result, exact[name], by_torch[name], size, name)


@KINDS
@NORMS
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_every_constructor_option(kind, norm_first, activation):
    for batch_first, bias in itertools.product((True, False), (True, False)):
        options = {"norm_first": norm_first, "batch_first": batch_first, "bias": bias, "layer_norm_eps": 1e-3}
        layers = twins(kind, activation=activation, **options)
        assert_parity(layers, inputs_of(kind, layers[0]))


@KINDS
@NORMS
@pytest.mark.parametrize("floating", [False, True], ids=["boolean", "float"])
@pytest.mark.parametrize("masks", ["padding", "causal", "causal hint", "causal hint padding memory", "memory"])
def test_every_mask(kind, norm_first, floating, masks):
    for batch in (B, None):
        layers = twins(kind, activation="gelu", norm_first=norm_first, batch_first=True)
        assert_parity(layers, inputs_of(kind, layers[0], batch), masks_of(kind, masks, floating, batch))


@KINDS
@NORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(kind, norm_first, dtype):
    layers = twins(kind, dtype, activation="gelu", norm_first=norm_first, batch_first=True)
    assert_parity(layers, inputs_of(kind, layers[0]), masks_of(kind, "padding"))


@KINDS
@NORMS
def test_eval_without_gradients(kind, norm_first):
    layers = [layer.eval() for layer in twins(kind, dropout=0.3, norm_first=norm_first, batch_first=True)]
    inputs = inputs_of(kind, layers[0])
    with torch.no_grad():
        results = [layer(*(x.to(layer.linear1.weight.dtype) for x in inputs)) for layer in layers]
    assert_as_close_as_torch(results[0], results[2], results[1], 12 * E + 2 * FF)


@KINDS
@NORMS
def test_hooks_on_every_submodule_run(kind, norm_first):
    """Each submodule that torch calls is called, in torch's order, with the same shapes."""
    layers = twins(kind, activation=nn.GELU(), norm_first=norm_first, batch_first=True)
    calls = ([], [])
    for layer, seen in zip(layers, calls, strict=False):
        for name, module in layer.named_modules():
            module.register_forward_hook(lambda module, args, y, name=name, seen=seen: seen.append(name))
    assert_parity(layers, inputs_of(kind, layers[0]))
    assert calls[0] == calls[1]


@KINDS
@NORMS
def test_changed_submodules_and_blocks_are_used(kind, norm_first):
    layers = twins(kind, norm_first=norm_first, batch_first=True)
    for layer in layers:
        dtype = layer.linear1.weight.dtype
        layer.norm2 = nn.RMSNorm(E, dtype=dtype)
        layer.dropout1 = nn.Identity()
        nn.utils.parametrize.register_parametrization(layer.norm1, "weight", nn.Tanh())
        nn.utils.parametrize.register_parametrization(layer.linear1, "weight", nn.Tanh())
        block = layer._ff_block
        layer._ff_block = lambda x, block=block: 2 * block(x)
    assert_parity(layers, inputs_of(kind, layers[0]))


def test_subclass_overriding_a_block_is_obeyed():
    class Own(fastlm.nn.TransformerEncoderLayer):
        def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
            return torch.zeros_like(x)

    layer = Own(E, H, FF, 0.0, batch_first=True)
    x = sequence(layer, T)
    first = layer.norm1(x)
    torch.testing.assert_close(layer(x), layer.norm2(first + layer._ff_block(first)))


@KINDS
@NORMS
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_dropout_has_the_right_gradients(kind, norm_first, activation):
    """With the seed fixed, training mode is one function, and its gradients are the differences'."""
    ours, _, _ = twins(kind, torch.float64, 0.3, activation=activation, norm_first=norm_first, batch_first=True)
    inputs = [x[:1, :2].clone().requires_grad_() for x in inputs_of(kind, ours)]
    parameters = [ours.linear1.bias, ours.norm1.weight, ours.self_attn.out_proj.bias]

    def call(*leaves):
        torch.manual_seed(3)
        return ours(*inputs)

    assert torch.autograd.gradcheck(call, (*inputs, *parameters), fast_mode=True)
    different = ours(*inputs)
    assert not torch.equal(different, ours(*inputs))


@KINDS
@NORMS
def test_dropout_of_everything_leaves_the_stream(kind, norm_first):
    ours, _, _ = twins(kind, dropout=1.0, norm_first=norm_first, activation="gelu")
    inputs = inputs_of(kind, ours)
    expected = inputs[0]
    if not norm_first:
        for norm in [ours.norm1, ours.norm2] + ([ours.norm3] if kind is DECODER else []):
            expected = norm(expected)
    torch.testing.assert_close(ours(*inputs), expected)


@KINDS
@NORMS
def test_compiles_whole(kind, norm_first):
    torch._dynamo.reset()
    ours, _, _ = twins(kind, norm_first=norm_first, activation="gelu", batch_first=True)
    inputs, masks = inputs_of(kind, ours), masks_of(kind, "causal padding memory")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, **masks), ours(*inputs, **masks))


@NORMS
def test_inside_torchs_encoder_and_decoder(norm_first):
    """torch's stacks clone our layers; in evaluation the encoder hands on nested tensors where it can."""
    layers = [twins(kind, batch_first=True, norm_first=norm_first, activation="gelu") for kind in (ENCODER, DECODER)]
    blocked = torch.arange(T) >= torch.tensor([[T], [2], [4]])
    x = torch.randn(B, T, E)
    results = []
    for encoder, decoder in zip(*layers, strict=True):
        encoder = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=not norm_first).eval()
        decoder = nn.TransformerDecoder(decoder, 2).eval()
        source = x.to(encoder.layers[0].linear1.weight.dtype)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors is in prototype stage")
            memory = encoder(source, src_key_padding_mask=blocked).masked_fill(blocked[..., None], 0.0)
            results.append(decoder(source, memory, memory_key_padding_mask=blocked, tgt_mask=causal(False)))
    assert_as_close_as_torch(results[0], results[2], results[1], 36 * E)


def test_errors_name_the_argument():
    encoder, decoder = ENCODER[0](E, H, FF, batch_first=True), DECODER[0](E, H, FF, batch_first=True)
    x = sequence(encoder, T)
    with pytest.raises(ValueError, match=rf"query has shape \({B}, {T}, {E - 1}\).*{E} features"):
        encoder(x[..., 1:])
    with pytest.raises(ValueError, match=rf"attn_mask has shape \({T}, {S}\), expected \({T}, {T}\)"):
        encoder(x, torch.zeros(T, S, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="attn_mask is None, but the is_causal hint needs it"):
        encoder(x, is_causal=True)
    with pytest.raises(ValueError, match=rf"key has a batch of {B - 1}, query one of {B}"):
        decoder(x, x[1:])
    with pytest.raises(RuntimeError, match="activation should be relu/gelu, not swish"):
        ENCODER[0](E, H, FF, activation="swish")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors is in prototype stage")
        nested = torch.nested.nested_tensor([torch.randn(2, E), torch.randn(3, E)])
    with pytest.raises(ValueError, match="src_mask is given with a nested src"):
        encoder(nested, torch.zeros(T, T, dtype=torch.bool))
