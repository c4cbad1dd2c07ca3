"""What torch keeps private and fastlm uses: each name is there and does what it is used for."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlm
from fastlm import runtime
from fastlm._core import torch_private

ROOTS = [Path(importlib.import_module(name).__file__ or "").parent for name in ("fastlm.kernels", "fastlm.benchmarks")]
SOURCES = sorted(file for root in (Path(fastlm.__file__).parent, *ROOTS) for file in root.rglob("*.py"))


def private_names(source: str) -> list[str]:
    """Names below `torch` or `nn` that begin with one underscore, as `line: name`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        for name in names:
            first, *parts = name.split(".")
            if first in ("torch", "nn") and parts[-1:] and parts[-1].startswith("_") and not parts[-1].startswith("__"):
                found.append(f"{line}: {name}")
        if isinstance(node, ast.Attribute) and node.attr == "_version":
            found.append(f"{line}: {ast.unparse(node)}")
    return found


def test_search_finds_private_names():
    source = """
import torch._functorch.config
from torch._C import _functorch
from torch.utils import _pytree
from torch import nn, __version__
version = parameter._version
hooks = nn.modules.module._global_forward_hooks, torch._C._cuda_getDevice(), torch.__version__, self._private
"""
    found = {line.split(": ")[1] for line in private_names(source)}
    wanted = {"torch._C._functorch", "torch.utils._pytree", "parameter._version", "torch._C._cuda_getDevice"}
    assert wanted | {"nn.modules.module._global_forward_hooks"} <= found
    assert not any("__version__" in name or "self" in name for name in found)


def test_no_other_file_names_what_torch_keeps_private():
    found = {file: private_names(file.read_text(encoding="utf-8")) for file in SOURCES}
    assert found.pop(Path(torch_private.__file__))
    assert not {file: names for file, names in found.items() if names}


@pytest.mark.parametrize("package", runtime.TRIED)
def test_the_version_that_is_pinned_was_tried(package):
    pins = (Path(__file__).parents[1] / "constraints.txt").read_text().split()
    assert next(pin.partition("==")[2] for pin in pins if pin.startswith(f"{package}==")) in runtime.TRIED[package]


def test_transforms_are_seen_while_they_last():
    seen = []

    def square(x: Tensor) -> Tensor:
        seen.append(torch_private.transforms_active())
        return x.square().sum()

    square(torch.ones(2))
    torch.func.grad(square)(torch.ones(2))
    torch.func.vmap(square)(torch.ones(2, 2))
    square(torch.ones(2))
    assert seen == [False, True, True, False]


def test_forward_mode_is_seen_while_it_lasts():
    assert not torch_private.forward_mode()
    with torch.autograd.forward_ad.dual_level():
        assert torch_private.forward_mode()
    assert not torch_private.forward_mode()


def test_a_batch_of_gradients_is_told_from_a_gradient():
    seen = []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            seen.append(torch_private.is_legacy_batch(grad))
            return 2 * grad

    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad(Twice.apply(x), x, torch.ones(2))
    torch.autograd.grad(Twice.apply(x), x, torch.eye(2), is_grads_batched=True)
    assert seen == [False, True]


def test_version_counts_edits_in_place():
    x = torch.zeros(2)
    before = torch_private.version_of(x)
    x + 1
    assert torch_private.version_of(x) == before
    x.detach()[0] = 1  # through a view
    torch.autograd.graph.increment_version(x)
    assert torch_private.version_of(x) == before + 2


def test_modules_have_the_dictionaries_that_are_read():
    layer = nn.BatchNorm1d(2)
    assert set(torch_private.MODULE_ATTRIBUTES) <= layer.__dict__.keys()
    assert layer.__dict__["_parameters"]["weight"] is layer.weight
    assert layer.__dict__["_buffers"]["running_mean"] is layer.running_mean
    assert nn.Sequential(layer).__dict__["_modules"]["0"] is layer
    registered = {
        "_forward_pre_hooks": layer.register_forward_pre_hook(print),
        "_forward_hooks": layer.register_forward_hook(print),
        "_backward_hooks": layer.register_full_backward_hook(print),
        "_backward_pre_hooks": layer.register_full_backward_pre_hook(print),
    }
    assert all(layer.__dict__[name] for name in registered)
    for handle in registered.values():
        handle.remove()
    assert not any(layer.__dict__[name] for name in registered)


def test_a_weighted_loss_holds_reduction_and_weight():
    weight = torch.ones(3)
    loss = torch_private.WeightedLoss(weight, reduction="sum")
    assert loss.reduction == "sum"
    assert dict(loss.named_buffers())["weight"] is weight
    assert isinstance(nn.CrossEntropyLoss(), torch_private.WeightedLoss)


def test_global_hooks_are_seen_while_they_last():
    hooks = torch_private.module_hooks
    registered = {
        "_global_forward_pre_hooks": hooks.register_module_forward_pre_hook(lambda *_: None),
        "_global_forward_hooks": hooks.register_module_forward_hook(lambda *_: None),
        "_global_backward_hooks": hooks.register_module_full_backward_hook(lambda *_: None),
        "_global_backward_pre_hooks": hooks.register_module_full_backward_pre_hook(lambda *_: None),
    }
    seen = {name: bool(getattr(hooks, name)) for name in torch_private.GLOBAL_HOOKS}
    for handle in registered.values():
        handle.remove()
    assert seen == dict.fromkeys(registered, True)
    assert not any(getattr(hooks, name) for name in torch_private.GLOBAL_HOOKS)


@pytest.mark.skipif(not torch_private.has_pointwise_linear(), reason="oneDNN does not multiply in bf16 here")
@pytest.mark.parametrize("leading", [(5,), (2, 3), ()])
def test_pointwise_linear_is_linear(leading):
    x, weight, bias = torch.randn(*leading, 48), torch.randn(32, 48), torch.randn(32)
    x, weight, bias = (t.bfloat16() for t in (x, weight, bias))
    truth = F.linear(x.double(), weight.double(), bias.double())
    found = torch_private.pointwise_linear(x, weight, bias)
    torch.testing.assert_close(found.double(), truth, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_streams_and_devices_are_the_current_ones():
    assert torch_private.current_device() == torch.cuda.current_device()
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            assert torch_private.current_raw_stream(torch.cuda.current_device()) == stream.cuda_stream


def test_donated_buffers_are_off_after_asking():
    from torch._functorch import config

    with config.patch(donated_buffer=True):  # restored afterwards
        torch_private.keep_compiled_buffers()
        assert config.donated_buffer is False


def test_a_fake_mode_is_seen_while_it_lasts():
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert torch_private.fake_mode() is None
    with FakeTensorMode() as mode:
        assert torch_private.fake_mode() is mode
        fake = torch.empty(2)
    assert torch_private.fake_mode() is None
    assert torch_private.is_fake(fake)
    assert not torch_private.is_fake(torch.empty(2))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_what_is_compiled_runs_as_it_was_written_inside_uncompiled(fullgraph):
    def never(graph, inputs):
        raise AssertionError("compiled")

    def call(x):
        raise ValueError(torch.compiler.is_compiling())

    found = []
    for function in (call, torch.compile(call, backend=never, fullgraph=fullgraph)):
        with torch_private.uncompiled(), pytest.raises(ValueError, match="False") as raised:
            function(torch.ones(2))
        found.append(torch_private.runs_compiled(raised.tb))
    assert found == [False, True]
