"""Every public op on tensors of every layout in memory, and with every extent 0."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm._core import dispatch as _dispatch
from fastlm._core import registry
from fastlm.ops.rotary import rotary_ref
from fastlm.verify.guards import MARGIN, Guards, guarded_allocations
from samples import CASES

Tensors = dict[str, Tensor]


class Op(NamedTuple):
    """A call: its tensors' dimensions by letter, ours, and the same in PyTorch's operators."""

    name: str
    shapes: dict[str, str]
    extents: dict[str, int]
    call: Callable[[Tensors], Tensor | tuple[Tensor, ...]]
    stock: Callable[[Tensors], Tensor | tuple[Tensor, ...]]


NORM = {"x": "ABN", "residual": "ABN", "weight": "N", "bias": "N"}
WIDE = {"x": "ABN", "weight": "BN", "bias": "BN"}
ABN = {"A": 2, "B": 3, "N": 24}
EPS = 1e-5


def _some(shapes: dict[str, str], *names: str) -> dict[str, str]:
    return {name: shapes[name] for name in names}


def _seeded(call: Callable[[Tensors], Tensor | tuple[Tensor, ...]]) -> Callable[[Tensors], Tensor | tuple[Tensor, ...]]:
    def seeded(t: Tensors) -> Tensor | tuple[Tensor, ...]:
        torch.manual_seed(3)
        return call(t)

    return seeded


def _by_reference(call: Callable[[Tensors], Tensor | tuple[Tensor, ...]]) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """For dropout, whose mask PyTorch draws otherwise."""

    def referred(t: Tensors) -> Tensor | tuple[Tensor, ...]:
        with fastlm.backend("reference"):
            return call(t)

    return referred


def _add_layer_norm(t: Tensors) -> tuple[Tensor, Tensor]:
    z = t["x"] + t["residual"]
    return F.layer_norm(z, z.shape[-1:], t["weight"], t["bias"]), z


def _add_rms_norm(t: Tensors) -> tuple[Tensor, Tensor]:
    z = t["x"] + t["residual"]
    return F.rms_norm(z, z.shape[-1:], t["weight"], EPS), z


def _dropped_norm(t: Tensors) -> tuple[Tensor, Tensor]:
    return fastlm.add_layer_norm(t["x"], t["residual"], t["weight"], t["bias"], dropout_p=0.5)


def _dropped_gelu(t: Tensors) -> Tensor:
    return fastlm.bias_gelu(t["x"], t["bias"], dropout_p=0.5)


def _rotary(interleaved: bool) -> Callable[[Tensors], Tensor]:
    return lambda t: fastlm.rotary(t["x"], t["cos"], t["sin"], interleaved=interleaved)


def _rotary_stock(interleaved: bool) -> Callable[[Tensors], Tensor]:
    return lambda t: rotary_ref(t["x"], t["cos"], t["sin"], interleaved)


def _cross_entropy(**options) -> tuple[Callable[[Tensors], Tensor], Callable[[Tensors], Tensor]]:
    return (
        lambda t: fastlm.cross_entropy(t["x"], t["target"], t.get("class_weight"), **options),
        lambda t: F.cross_entropy(t["x"], t["target"], t.get("class_weight"), **options),
    )


def _linear_cross_entropy(**options) -> tuple[Callable[[Tensors], Tensor], Callable[[Tensors], Tensor]]:
    def stock(t: Tensors) -> Tensor:
        logits = F.linear(t["x"], t["weight"], t["bias"])
        rows = logits.reshape(t["target"].numel(), logits.shape[-1])
        loss = F.cross_entropy(rows, t["target"].reshape(-1), **options)
        return loss.reshape(t["target"].shape) if options.get("reduction") == "none" else loss

    return (lambda t: fastlm.linear_cross_entropy(t["x"], t["weight"], t["target"], t["bias"], **options), stock)


def _packed_attention(t: Tensors) -> Tensor:
    """One sequence of all queries, which is attention of a batch of one."""
    ends = (torch.tensor([0, len(t[name])], dtype=torch.int32) for name in ("query", "key"))
    return fastlm.attention_varlen(t["query"], t["key"], t["value"], *ends)


def _packed_stock(t: Tensors) -> Tensor:
    q, k, v = (t[name].transpose(0, 1)[None] for name in ("query", "key", "value"))
    return _sdpa(q, k, v)[0].transpose(0, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's; without heads, where its 2.10 ends the process, an empty result that depends on its inputs."""
    if q.shape[1] == 0:
        return q @ k.mT @ v + (0 if mask is None else mask.sum() * 0)
    return F.scaled_dot_product_attention(q, k, v, mask)


def _attention(t: Tensors) -> Tensor:
    return fastlm.scaled_dot_product_attention(t["query"], t["key"], t["value"], t.get("mask"))


def _attention_stock(t: Tensors) -> Tensor:
    return _sdpa(t["query"], t["key"], t["value"], t.get("mask"))


QKV = {"query": "BHTD", "key": "BHSD", "value": "BHSE"}
HEADS = {"B": 2, "H": 2, "T": 3, "S": 5, "D": 8, "E": 8}
TURNED = {"x": "BHLD", "cos": "LR", "sin": "LR"}
TURN = {"B": 2, "H": 2, "L": 3, "D": 11, "R": 4}
SHAPED = {"x": "ACD", "target": "AD"}
OPS = {
    "layer_norm": Op(
        "layer_norm", _some(NORM, "x", "weight", "bias"), ABN,
        lambda t: fastlm.layer_norm(t["x"], t["x"].shape[-1], t["weight"], t["bias"]),
        lambda t: F.layer_norm(t["x"], t["x"].shape[-1:], t["weight"], t["bias"]),
    ),
    "layer_norm of two dimensions": Op(
        "layer_norm", WIDE, ABN,
        lambda t: fastlm.layer_norm(t["x"], t["x"].shape[-2:], t["weight"], t["bias"]),
        lambda t: F.layer_norm(t["x"], t["x"].shape[-2:], t["weight"], t["bias"]),
    ),
    "add_layer_norm": Op(
        "add_layer_norm", NORM, ABN,
        lambda t: fastlm.add_layer_norm(t["x"], t["residual"], t["weight"], t["bias"]), _add_layer_norm,
    ),
    "add_layer_norm with dropout": Op(
        "add_layer_norm", NORM, ABN, _seeded(_dropped_norm), _by_reference(_seeded(_dropped_norm)),
    ),
    "rms_norm": Op(
        "rms_norm", _some(NORM, "x", "weight"), ABN,
        lambda t: fastlm.rms_norm(t["x"], t["x"].shape[-1], t["weight"]),
        lambda t: F.rms_norm(t["x"], t["x"].shape[-1:], t["weight"]),
    ),
    "rms_norm of two dimensions": Op(
        "rms_norm", _some(WIDE, "x", "weight"), ABN,
        lambda t: fastlm.rms_norm(t["x"], t["x"].shape[-2:], t["weight"]),
        lambda t: F.rms_norm(t["x"], t["x"].shape[-2:], t["weight"]),
    ),
    "add_rms_norm": Op(
        "add_rms_norm", _some(NORM, "x", "residual", "weight"), ABN,
        lambda t: fastlm.add_rms_norm(t["x"], t["residual"], t["weight"], EPS), _add_rms_norm,
    ),
    "gelu": Op("gelu", _some(NORM, "x"), ABN, lambda t: fastlm.gelu(t["x"]), lambda t: F.gelu(t["x"])),
    "bias_gelu": Op(
        "bias_gelu", _some(NORM, "x", "bias"), ABN,
        lambda t: fastlm.bias_gelu(t["x"], t["bias"]), lambda t: F.gelu(t["x"] + t["bias"]),
    ),
    "bias_gelu with dropout": Op(
        "bias_gelu", _some(NORM, "x", "bias"), ABN, _seeded(_dropped_gelu), _by_reference(_seeded(_dropped_gelu)),
    ),
    "swiglu": Op(
        "swiglu", {"gate": "ABN", "up": "ABN"}, ABN,
        lambda t: fastlm.swiglu(t["gate"], t["up"]), lambda t: F.silu(t["gate"]) * t["up"],
    ),
    "rotary": Op("rotary", TURNED, TURN, _rotary(False), _rotary_stock(False)),
    "rotary of neighbours, a table each": Op(
        "rotary", {"x": "BHLD", "cos": "BLR", "sin": "BLR"}, TURN, _rotary(True), _rotary_stock(True)
    ),
    "linear": Op(
        "linear", {"x": "AK", "weight": "NK", "bias": "N"}, {"A": 3, "K": 24, "N": 7},
        lambda t: fastlm.linear(t["x"], t["weight"], t["bias"]), lambda t: F.linear(t["x"], t["weight"], t["bias"]),
    ),
    "linear of many": Op(
        "linear", {"x": "ABK", "weight": "NK"}, {"A": 5, "B": 4, "K": 24, "N": 7},
        lambda t: fastlm.linear(t["x"], t["weight"]), lambda t: F.linear(t["x"], t["weight"]),
    ),
    "cross_entropy": Op("cross_entropy", {"x": "AC", "target": "A"}, {"A": 5, "C": 9}, *_cross_entropy()),
    "cross_entropy of each": Op(
        "cross_entropy", {"x": "ACD", "target": "AD"}, {"A": 3, "C": 9, "D": 4},
        *_cross_entropy(reduction="none", label_smoothing=0.1),
    ),
    "cross_entropy by weights": Op(
        "cross_entropy", {"x": "AC", "target": "A", "class_weight": "C"}, {"A": 5, "C": 9},
        *_cross_entropy(reduction="sum"),
    ),
    "linear_cross_entropy": Op(
        "linear_cross_entropy", {"x": "ABK", "weight": "CK", "bias": "C", "target": "AB"},
        {"A": 2, "B": 3, "K": 8, "C": 9}, *_linear_cross_entropy(),
    ),
    "linear_cross_entropy of each": Op(
        "linear_cross_entropy", {"x": "AK", "weight": "CK", "bias": "C", "target": "A"}, {"A": 6, "K": 8, "C": 9},
        *_linear_cross_entropy(reduction="none"),
    ),
    "attention": Op("scaled_dot_product_attention", QKV, HEADS, _attention, _attention_stock),
    "attention with a mask": Op(
        "scaled_dot_product_attention", QKV | {"mask": "BHTS"}, HEADS, _attention, _attention_stock
    ),
    "attention_varlen": Op(
        "attention_varlen", {"query": "THD", "key": "SHD", "value": "SHE"}, HEADS, _packed_attention, _packed_stock
    ),
}  # fmt: skip


def _by_samples(op: registry.Op, sample: dict) -> Op:
    """An op without a line above: a letter for each extent of a sample's tensors, and the reference to compare with."""
    leaves, others = op.split(sample)
    letters = {n: chr(ord("A") + i) for i, n in enumerate(sorted({n for t in leaves.values() for n in t.shape}))}
    shapes = {name: "".join(letters[n] for n in t.shape) for name, t in leaves.items()}
    call = _seeded(lambda t: op.function(**t, **others))
    return Op(op.name, shapes, {letter: n for n, letter in letters.items()}, call, _by_reference(call))


WRITTEN = {op.name for op in OPS.values()}
OPS |= {
    name: _by_samples(case.op, case.arguments())
    for name, case in CASES.items()
    if case.op.name not in WRITTEN and set(case.op.tensors) <= set(case.op.differentiable)
}


def test_every_op_is_here():
    """One of whose tensors some are indices or the like is not made by its samples."""
    assert {op.name for op in OPS.values()} == set(_dispatch.ops())


@pytest.mark.parametrize("name", ["gelu 1", "add_layer_norm 1", "swiglu"])
def test_an_op_without_a_line_is_made_of_its_samples(name):
    case = CASES[name]
    op = _by_samples(case.op, case.arguments())
    tensors = {n: torch.randn([op.extents[d] for d in dims]) for n, dims in op.shapes.items()}
    assert [t.shape for t in tensors.values()] == [t.shape for t in case.leaves()[0].values()]
    for ours, expected in zip(_run(op.call, tensors), _run(op.stock, tensors), strict=True):
        torch.testing.assert_close(ours, expected)


def _serves(op: Op, backend: str) -> bool:
    """Whether a backend has the op with gradients; linear's are PyTorch's."""
    return op.name != "linear" and any(row.name == backend for row in _dispatch.backends(op.name))


CONSTANT = ("cos", "sin", "class_weight")  # no gradient reaches them


def _differentiable(tensors: Tensors) -> list[Tensor]:
    return [t for name, t in tensors.items() if t.is_floating_point() and name not in CONSTANT]


def _run(call: Callable, tensors: Tensors, grads: list[Tensor] | None = None) -> list[Tensor]:
    """Outputs and gradients, for outputs that receive `grads` or, without, one number after the other."""
    leaves = [t.requires_grad_() for t in _differentiable(tensors)]
    outputs = call(tensors)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if grads is None:
        grads = [torch.linspace(-1, 1, o.numel()).reshape(o.shape) for o in outputs]
    found = torch.autograd.grad(outputs, leaves, grads, allow_unused=True, materialize_grads=True)
    return [o.detach() for o in outputs] + [g.detach() for g in found]


def _values(name: str, count: int, op: Op) -> Tensor:
    return torch.randint(0, op.extents["C"], (count,)) if name == "target" else torch.randn(count)


# What shares no memory between elements, and what does: an order of dimensions, a step between elements and a gap
# behind rows; rows that overlap, as unfold makes them, or repeat, as expand does; anything.
LAYOUTS = ("permuted", "stepped", "overlapping", "repeated", "expanded", "any")


def _strides(shape: tuple[int, ...], layout: str, generator: random.Random) -> list[int]:
    order, step = list(range(len(shape))), 1
    if layout == "permuted":
        generator.shuffle(order)
    elif layout == "stepped":
        step = generator.randint(2, 3)
    strides, extent = [0] * len(shape), step
    for dim in reversed(order):
        strides[dim] = extent
        extent = extent * shape[dim] + (generator.randint(0, 3) if layout == "stepped" else 0)
    if layout == "overlapping" and len(shape) > 1:
        strides[generator.randrange(len(shape) - 1)] = 1
    elif layout == "repeated" and len(shape) > 1:
        strides[generator.randrange(len(shape) - 1)] = 0
    elif layout == "expanded":
        strides[generator.randrange(len(shape))] = 0
    elif layout == "any":
        strides = [generator.randint(0, 5) for _ in shape]
    return [generator.randint(0, 9) if n == 1 else s for n, s in zip(shape, strides, strict=True)]


def _placed(values: Callable[[int], Tensor], shape: tuple[int, ...], layout: str, generator: random.Random) -> Tensor:
    """A tensor of that shape and layout amid NaN; values(n) gives the n elements that memory holds."""
    if not shape:
        return values(1)[0]
    strides = _strides(shape, layout, generator)
    size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    margin = MARGIN // 4 + generator.choice((0, 1, 3))
    place = torch.arange(size).as_strided(shape, strides).unique()
    elements = values(len(place))
    poison = math.nan if elements.is_floating_point() else 10**6
    memory = torch.full((size + 2 * margin,), poison, dtype=elements.dtype)
    memory[margin + place] = elements
    return memory.as_strided(shape, strides, margin)


@pytest.mark.parametrize("name", OPS)
def test_any_layout_gives_what_contiguous_tensors_do(kernels, name):
    """Strided, overlapping and repeated inputs and gradients: the same results, and nothing else is read or written."""
    op, generator = OPS[name], random.Random(name)
    backend = kernels if _serves(op, kernels) else None
    if backend is None and kernels != "cpu":
        pytest.skip(f"{op.name} has no {kernels} backend with gradients")
    for layout, _ in itertools.product(LAYOUTS, range(4 if kernels == "cpu" else 1)):
        extents = {d: n if d == "C" or generator.random() < 0.8 else 1 for d, n in op.extents.items()}
        extents = op.extents if op.name == "rotary" else extents
        tensors = {
            name: _placed(lambda n, name=name: _values(name, n, op), tuple(extents[d] for d in dims), layout, generator)
            for name, dims in op.shapes.items()
        }
        copies = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        with torch.no_grad(), fastlm.backend(backend):
            outputs = op.call(copies)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [_placed(torch.randn, tuple(o.shape), layout, generator) for o in outputs]
        before = [t.detach().clone() for t in (*tensors.values(), *grads)]
        guards = Guards()
        with fastlm.backend(backend), guarded_allocations(guards):
            results = _run(op.call, tensors, grads)
        with fastlm.backend(backend):
            expected = _run(op.call, copies, [g.clone(memory_format=torch.contiguous_format) for g in grads])
        strides = {name: t.stride() for name, t in tensors.items()}
        for a, e in zip(results, expected, strict=True):
            torch.testing.assert_close(a, e, msg=lambda m, s=strides: f"{s}: {m}")
            assert torch._debug_has_internal_overlap(a) == 0, strides
        assert guards.violations() == [], strides
        for now, then in zip((*tensors.values(), *grads), before, strict=True):
            assert torch.equal(now, then)


def _empties(op: Op) -> list[dict[str, int]]:
    """Extents of which one, two or all are 0."""
    letters = sorted({d for dims in op.shapes.values() for d in dims})
    chosen = [*itertools.combinations(letters, 1), *itertools.combinations(letters, 2), tuple(letters)]
    found = [{d: 0 if d in zero else n for d, n in op.extents.items()} for zero in chosen]
    if op.name == "rotary":  # 2 R <= D
        found = [e | {"R": min(e["R"], e["D"] // 2)} for e in found]
    return found


def _outcome(call: Callable, tensors: Tensors) -> list[Tensor] | type[Exception]:
    try:
        return _run(call, {name: t.clone() for name, t in tensors.items()})
    except (RuntimeError, IndexError) as error:
        return type(error)


@pytest.mark.parametrize("ignored", [False, True], ids=["counted", "ignored"])
@pytest.mark.parametrize("name", OPS)
def test_any_extent_may_be_zero(kernels, poisoned, name, ignored):
    """Outputs and gradients are PyTorch's, or its error."""
    op = OPS[name]
    backend = kernels if _serves(op, kernels) else None
    if backend is None and kernels != "cpu":
        pytest.skip(f"{op.name} has no {kernels} backend with gradients")
    if ignored and "target" not in op.shapes:
        pytest.skip("no targets")
    for extents in _empties(op):
        shapes = {name: tuple(extents[d] for d in dims) for name, dims in op.shapes.items()}
        tensors = {name: _values(name, math.prod(shape), op).reshape(shape) for name, shape in shapes.items()}
        if ignored:
            tensors["target"] = torch.full_like(tensors["target"], -100)
        expected = _outcome(op.stock, tensors)
        for forced in {backend, "reference"}:
            with fastlm.backend(forced):
                ours = _outcome(op.call, tensors)
            if isinstance(expected, type):
                assert ours is expected, extents
                continue
            assert not isinstance(ours, type), (extents, ours)
            for a, e in zip(ours, expected, strict=True):
                torch.testing.assert_close(a, e, equal_nan=True, msg=lambda m, x=extents: f"{x}: {m}")


@pytest.mark.parametrize("name", OPS)
def test_any_extent_may_be_zero_when_traced(name):
    """In the graphs that torch.compile makes, without the compiler's code."""
    op = OPS[name]
    for extents in (_empties(op)[0], _empties(op)[-1]):
        tensors = {
            name: _values(name, math.prod(extents[d] for d in dims), op).reshape([extents[d] for d in dims])
            for name, dims in op.shapes.items()
        }
        if "target" in tensors:
            tensors["target"] = torch.full_like(tensors["target"], -100)
        torch.compiler.reset()
        expected = _outcome(op.stock, tensors)
        ours = _outcome(torch.compile(op.call, backend="aot_eager"), tensors)
        if isinstance(expected, type):
            assert isinstance(ours, type), extents
            continue
        assert not isinstance(ours, type), (extents, ours)
        for a, e in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, e, equal_nan=True, msg=lambda m, x=extents: f"{x}: {m}")
