"""Every layer of fastlm.nn as a module among others: what PyTorch's tools do with torch.nn's they do with ours."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

import fastlm.nn

E, H, FF, C, V, B, T, S = 12, 2, 21, 17, 19, 3, 5, 7


def sequence(length=T):
    return torch.randn(B, length, E)


def causal():
    return torch.ones(T, T, dtype=torch.bool).triu(1)


def padded():
    return torch.arange(S) >= torch.tensor([[S], [4], [2]])


def layer(package, kind):
    return getattr(package, f"Transformer{kind}Layer")(E, H, FF, 0.0, "gelu", batch_first=True)


def stack(package, kind, **options):
    return getattr(package, f"Transformer{kind}")(layer(package, kind), 2, package.LayerNorm(E), **options)


# name: (built from a package, positional arguments, keyword arguments)
CASES = {
    "LayerNorm": (lambda p: p.LayerNorm(E), lambda: (sequence(),), dict),
    "RMSNorm": (lambda p: p.RMSNorm(E), lambda: (sequence(),), dict),
    "Linear": (lambda p: p.Linear(E, FF), lambda: (sequence(),), dict),
    "GELU": (lambda p: p.GELU("tanh"), lambda: (sequence(),), dict),
    "MultiheadAttention": (
        lambda p: p.MultiheadAttention(E, H, batch_first=True),
        lambda: (sequence(), *[sequence(S)] * 2),
        lambda: {"need_weights": False, "key_padding_mask": padded()},
    ),
    "TransformerEncoderLayer": (lambda p: layer(p, "Encoder"), lambda: (sequence(), causal()), dict),
    "TransformerDecoderLayer": (
        lambda p: layer(p, "Decoder"),
        lambda: (sequence(), sequence(S), causal()),
        lambda: {"memory_key_padding_mask": padded()},
    ),
    "TransformerEncoder": (
        lambda p: stack(p, "Encoder", enable_nested_tensor=False),
        lambda: (sequence(S),),
        lambda: {"src_key_padding_mask": padded()},
    ),
    "TransformerDecoder": (
        lambda p: stack(p, "Decoder"),
        lambda: (sequence(), sequence(S), causal()),
        lambda: {"memory_key_padding_mask": padded()},
    ),
    "Transformer": (
        lambda p: p.Transformer(E, H, 1, 1, FF, 0.0, batch_first=True, norm_first=True),
        lambda: (sequence(S), sequence()),
        lambda: {"tgt_mask": causal(), "src_key_padding_mask": padded()},
    ),
    "Embedding": (lambda p: p.Embedding(V, E, padding_idx=2), lambda: (torch.randint(V, (B, T)),), dict),
    "CrossEntropyLoss": (
        lambda p: p.CrossEntropyLoss(label_smoothing=0.1),
        lambda: (torch.randn(B, C, T), torch.randint(C, (B, T))),
        dict,
    ),
    "LinearCrossEntropyLoss": (
        lambda p: p.LinearCrossEntropyLoss(E, C, bias=True),
        lambda: (torch.randn(B, E), torch.randint(C, (B,))),
        dict,
    ),
    "FeedForward": (lambda p: p.FeedForward(E, FF, 0.0), lambda: (sequence(),), dict),
    "SwiGLU": (lambda p: p.SwiGLU(E, FF), lambda: (sequence(),), dict),
    "SinusoidalPositions": (lambda p: p.SinusoidalPositions(E, 9), lambda: (sequence(),), lambda: {"start": 2}),
    "LearnedPositions": (lambda p: p.LearnedPositions(E, 9), lambda: (sequence(),), lambda: {"start": 2}),
    "RotaryEmbedding": (lambda p: p.RotaryEmbedding(4), lambda: (torch.randn(B, 3, T, 4),) * 2, dict),
}
TORCHS = [name for name in CASES if hasattr(nn, name)]
EVERY = pytest.mark.parametrize("name", CASES)
EVERY_OF_TORCH = pytest.mark.parametrize("name", TORCHS)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def build(name, package=fastlm.nn, seed=0):
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="enable_nested_tensor is True")
        return CASES[name][0](package)


def perturbed(module):
    """Every parameter moved, so that no bias is 0 and no norm an identity."""
    for parameter in module.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return module


def twins(name):
    """(ours, torch's) with one state, each loaded from the other's keys."""
    ours, theirs = build(name), perturbed(build(name, nn))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def inputs_of(name):
    _, args, kwargs = CASES[name]
    return args(), kwargs()


def run(call, module, args, kwargs):
    """Outputs, and the gradients of parameters and of inputs that have one."""
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in args]
    outputs = tree_leaves(call(*leaves, **kwargs))
    flat = torch.cat([x.flatten() for x in outputs if x is not None])
    wanted = [x for x in (*leaves, *module.parameters()) if x.requires_grad]
    torch.manual_seed(1)
    return flat.detach(), torch.autograd.grad(flat, wanted, torch.randn(flat.shape), allow_unused=True)


@EVERY_OF_TORCH
def test_constructor_state_and_class_are_torchs(name):
    ours, theirs = build(name), build(name, nn)
    assert isinstance(ours, getattr(nn, name))
    assert repr(ours) == repr(theirs)
    mine, other = (list(inspect.signature(type(m)).parameters.values()) for m in (ours, theirs))
    own = mine[len(other) :]
    assert [(p.name, p.kind, p.default) for p in mine[: len(other)]] == [(p.name, p.kind, p.default) for p in other]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in own)
    assert [(key, x.shape, x.dtype) for key, x in ours.state_dict().items()] == [
        (key, x.shape, x.dtype) for key, x in theirs.state_dict().items()
    ]
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)  # one seed, one model
    called = [m for m in ours.modules() if type(m).__name__ in TORCHS and m is not getattr(ours, "linear", None)]
    assert all(type(m) is getattr(fastlm.nn, type(m).__name__) for m in called)  # the loss calls no layer


@EVERY_OF_TORCH
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_results_and_gradients_are_torchs(name, training):
    ours, theirs = (m.train(training) for m in twins(name))
    args, kwargs = inputs_of(name)
    torch.testing.assert_close(run(ours, ours, args, kwargs), run(theirs, theirs, args, kwargs), **CLOSE)


@EVERY
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_whole(name, clone):
    module = perturbed(build(name))
    args, kwargs = inputs_of(name)
    copied = clone(module)
    assert all(type(m) is type(n) for m, n in zip(copied.modules(), module.modules(), strict=True))
    for mine, other in zip(module.parameters(), copied.parameters(), strict=True):
        assert mine.data_ptr() != other.data_ptr()
    torch.testing.assert_close(copied(*args, **kwargs), module(*args, **kwargs), rtol=0, atol=0)


@EVERY
def test_compiles_whole_with_gradients(name):
    torch._dynamo.reset()
    module = perturbed(build(name))
    args, kwargs = inputs_of(name)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, module, args, kwargs), run(module, module, args, kwargs), **CLOSE)


@EVERY
def test_exports(name):
    module = perturbed(build(name)).eval()
    args, kwargs = inputs_of(name)
    exported = torch.export.export(module, args, kwargs).module()
    torch.testing.assert_close(exported(*args, **kwargs), module(*args, **kwargs), **CLOSE)


@EVERY_OF_TORCH
def test_autocast_gives_torchs_dtypes(name):
    ours, theirs = twins(name)
    args, kwargs = inputs_of(name)
    with torch.autocast("cpu", torch.bfloat16):
        actual, by_torch = ours(*args, **kwargs), theirs(*args, **kwargs)
    torch.testing.assert_close(actual, by_torch, rtol=0.05, atol=0.05)  # of their dtypes too; both are rounded


@EVERY_OF_TORCH
def test_functional_call_takes_other_parameters(name):
    ours, theirs = twins(name)
    args, kwargs = inputs_of(name)
    other = {key: 2 * p.detach() for key, p in ours.named_parameters()}
    before = ours(*args, **kwargs)
    actual, expected = (torch.func.functional_call(m, other, args, kwargs) for m in (ours, theirs))
    torch.testing.assert_close(actual, expected, **CLOSE)
    torch.testing.assert_close(ours(*args, **kwargs), before, rtol=0, atol=0)


HOOKS = {
    "forward pre": lambda m, seen: m.register_forward_pre_hook(lambda *_: seen()),
    "forward": lambda m, seen: m.register_forward_hook(lambda *_: seen()),
    "backward pre": lambda m, seen: m.register_full_backward_pre_hook(lambda *_: seen()),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda *_: seen()),
}


@EVERY_OF_TORCH
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_run_as_torchs_do(name, kind):
    """On the module and each of its parts that torch's calls, and no other."""
    args, kwargs = inputs_of(name)
    if "backward" in kind and not any(x.is_floating_point() for x in args):
        pytest.skip(f"no input of {name} has a gradient")
    calls = ([], [])
    for module, found in zip(twins(name), calls, strict=True):
        for part, child in module.named_modules():
            HOOKS[kind](child, lambda part=part, found=found: found.append(part))
        run(module, module, args, kwargs)
    assert calls[0] == calls[1]
    assert calls[0].count("") == 1


@EVERY_OF_TORCH
def test_parametrizations_are_obeyed(name):
    pair = twins(name)
    args, kwargs = inputs_of(name)
    if not list(pair[0].parameters()):
        pytest.skip(f"{name} has no parameters")
    for module in pair:
        for child in list(module.modules()):
            for parameter in list(child._parameters):
                if child._parameters[parameter] is not None:
                    parametrize.register_parametrization(child, parameter, nn.Tanh())
    actual, expected = (run(m, m, args, kwargs) for m in pair)
    torch.testing.assert_close(actual, expected, **CLOSE)
