"""Every op has all that an op should have, and its samples agree on every backend."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm._core import dispatch as _dispatch
from fastlm._core import registry
from fastlm.benchmarks.registry import KERNELS
from fastlm.verify.fuzz import SPECS
from samples import CASES

ROOT = Path(__file__).resolve().parents[2]


def lacking(op: registry.Op) -> list[str]:
    """What an op has not, in words: nothing should be left for a reader of the code to find out."""
    return [*_elsewhere(op), *_in_its_table(op), *_in_its_samples(op)]


def _elsewhere(op: registry.Op) -> list[str]:
    found = []
    if getattr(fastlm, op.name, None) is not op.function or op.name not in fastlm.__all__:
        found.append(f"fastlm/__init__.py does not export {op.name}")
    if op.name not in SPECS:
        found.append(f"no random calls: fastlm/verify/{op.stem}.py has no Spec named {op.name}")
    if not any(b.times(op.name) for b in KERNELS):
        found.append(f"no benchmark: benchmarks/{op.stem}.py has no KernelBenchmark of {op.name}")
    if op.backend("triton") and importlib.util.find_spec(f"launches.{op.stem}") is None:
        found.append(f"a Triton backend, but nothing to compile ahead of time: no tools/launches/{op.stem}.py")
    if not (ROOT / f"tests/ops/test_{op.stem}.py").exists():
        found.append(f"no tests of its own: no tests/ops/test_{op.stem}.py")
    if not all(word in (op.function.__doc__ or "") for word in ("Args:", "Returns:", "Raises:")):
        found.append("its docstring does not say arguments, results and errors")
    return found


def _in_its_table(op: registry.Op) -> list[str]:
    found = []
    names = [row.name for row in op.backends]
    if not callable(op.reference):
        found.append("no reference")
    if names[-1:] != ["reference"] or names[-1] in names[:-1]:
        found.append("the reference is not the last of its backends")
    found += [f"{name} is no backend's name" for name in names if name not in _dispatch.NAMES]
    if op.name not in _dispatch.ops() or _dispatch.backends(op.name) != list(op.backends):
        found.append("another table of backends than the one in force")
    found += [f"{name} is no tensor argument" for name in op.differentiable if name not in op.tensors]
    found += [f"{name} is no option" for name in (*op.choices, *op.overwriting) if name not in op.options]
    return found


def _in_its_samples(op: registry.Op) -> list[str]:
    found, samples = [], op.samples()
    for name, parameter in op.parameters.items():
        given = [sample[name] for sample in samples if name in sample]
        if not given or all(value is parameter.default for value in given):
            found.append(f"no sample gives {name}")
        elif name not in op.choices and all(same(value, parameter.default) for value in given):
            found.append(f"no sample gives {name} another value than its default")
        if parameter.default is not parameter.empty and len(given) == len(samples) and name not in op.choices:
            found.append(f"no sample leaves out {name}")
    for name, values in op.choices.items():
        default = op.parameters[name].default if name in op.parameters else None
        shown = {sample.get(name, default) for sample in samples}
        found += [f"no sample has {name}={value!r}" for value in values if value not in shown]
    for name in op.differentiable:
        if not any(name in op.split(sample)[0] for sample in samples):
            found.append(f"no sample takes the gradient of {name}")
    return found


def same(value: object, default: object) -> bool:
    return not isinstance(value, Tensor) and value == default


@pytest.mark.parametrize("op", registry.ops(), ids=lambda op: op.name)
def test_an_op_lacks_nothing(op):
    assert not (found := lacking(op)), "\n".join([f"{op.name}:", *found])  # pytest would show the first alone


def test_every_file_of_ops_has_a_specification():
    """Which `import fastlm` enters: without a name in fastlm/__init__.py nothing would know of an op."""
    files = {path.stem for path in (ROOT / "fastlm/ops").glob("[!_]*.py")}
    assert files == set(registry.stems())


def test_every_op_is_of_a_specification():
    assert {op.name for op in registry.ops()} == set(_dispatch.ops()) == set(SPECS)
    assert {op.name for op in registry.ops()} >= {name for b in KERNELS for name in b.ops or (b.name,)}


GELU = registry.get("bias_gelu")
X, BIAS = torch.randn(3, 16), torch.randn(16)
MISSING = {
    "does not export": {"name": "other"},
    "no random calls": {"name": "other"},
    "no benchmark": {"name": "other"},
    "nothing to compile ahead of time": {"function": fastlm.linear},
    "no tests of its own": {"function": fastlm.load},
    "docstring": {"function": lambda x, bias, approximate="none", dropout_p=0.0: x},
    "no reference": {"reference": None},
    "the reference is not the last": {"backends": GELU.backends[:-1]},
    "no backend's name": {"backends": (GELU.backends[0]._replace(name="tpu"), *GELU.backends)},
    "another table": {"backends": GELU.backends[1:]},
    "scale is no tensor argument": {"differentiable": ("scale",)},
    "form is no option": {"choices": {"form": ("none",)}},
    "eps is no option": {"overwriting": ("eps",)},
    "no sample gives bias": {"draw": lambda draw: [{"x": X}]},
    "no sample gives dropout_p": {"draw": lambda draw: [{"x": X, "bias": BIAS, "approximate": "tanh"}]},
    "no sample gives dropout_p another value": {"draw": lambda draw: [{"x": X, "bias": BIAS, "dropout_p": 0.0}]},
    "no sample leaves out dropout_p": {"draw": lambda draw: [{"x": X, "bias": BIAS, "dropout_p": 0.5}]},
    "no sample has approximate='tanh'": {"draw": lambda draw: [{"x": X, "bias": BIAS}]},
    "no sample takes the gradient of bias": {"draw": lambda draw: [{"x": X, "bias": BIAS.long()}]},
}


@pytest.mark.parametrize("words", MISSING)
def test_what_is_missing_is_said(words):
    assert lacking(GELU) == []
    assert any(words in line for line in lacking(dataclasses.replace(GELU, **MISSING[words])))


def served(case, backend: str) -> bool:
    """Whether a backend takes the sample here, with its gradients."""
    if case.op.backend(backend) is None:
        return False
    with fastlm.backend(backend):
        return fastlm.explain(case.run, *case.leaves(dtype=torch.float64)).selected == backend


def results(case, backend: str) -> list[Tensor]:
    """Outputs and gradients of a sample in float64, the dropout's seed the same in every call."""
    torch.manual_seed(3)
    leaves, others = case.leaves(dtype=torch.float64)
    with fastlm.backend(backend):
        outputs = case.run(leaves, others)
        grads = [torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype) for y in outputs]
        return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), grads)]


@pytest.mark.parametrize("name", CASES)
def test_a_sample_is_the_same_on_every_backend(name):
    case = CASES[name]
    expected = results(case, "reference")
    chosen = [backend for backend in ("cpu", "torch") if served(case, backend)]
    for backend in chosen:
        for actual, y in zip(results(case, backend), expected, strict=True):
            narrow = y.dtype != torch.float64
            torch.testing.assert_close(actual, y, rtol=1e-3 if narrow else 1e-9, atol=1e-3 if narrow else 1e-9)


@pytest.fixture
def references(monkeypatch):
    """Counts the calls of the references, by name."""
    calls: dict[str, int] = defaultdict(int)
    for op in registry.ops():
        name = op.reference.__name__

        def counted(*args, name=name, reference=op.reference, **kwargs):
            calls[name] += 1
            return reference(*args, **kwargs)

        monkeypatch.setattr(importlib.import_module(op.function.__module__), name, counted)
    return calls


@pytest.mark.parametrize("name", CASES)
def test_the_reference_backend_runs_the_reference(name, references):
    case = CASES[name]
    with fastlm.backend("reference"):
        assert fastlm.explain(case.op.function, **case.arguments()).selected == "reference"
        case.op.function(**case.arguments())
    assert references[case.op.reference.__name__] == 1


@pytest.mark.parametrize("name", CASES)
def test_no_other_backend_runs_the_reference(name, references):
    """An op that names a backend and forgets to call it would be right, and slow."""
    case = CASES[name]
    for backend in ("cpu", "torch"):
        if served(case, backend):
            with fastlm.backend(backend):
                case.run(*case.leaves(dtype=torch.float64))
    assert references == {}


@pytest.mark.parametrize("name", CASES)
def test_a_sample_compiles_to_one_graph(name):
    """With the values and gradients of the uncompiled call, but where there is dropout, whose masks are others."""
    case = CASES[name]
    torch.compiler.reset()
    compiled = torch.compile(case.run, backend="aot_eager", fullgraph=True)
    found = []
    for run in (case.run, compiled):
        leaves, others = case.leaves()
        outputs = run(leaves, others)
        grads = [torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype) for y in outputs]
        found.append([*outputs, *torch.autograd.grad(outputs, list(leaves.values()), grads)])
    for eager, traced in zip(*found, strict=True):
        assert (eager.shape, eager.dtype) == (traced.shape, traced.dtype)
        if not others.get("dropout_p"):
            torch.testing.assert_close(traced, eager, rtol=1e-2 if eager.dtype.itemsize < 4 else 1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_no_gradient_reaches_a_tensor_that_the_specification_leaves_out(name):
    """Where one is wanted, the op says that it has none: else it would be silently wrong, or tested nowhere."""
    case = CASES[name]
    arguments = case.arguments(dtype=torch.float64)
    for argument in case.op.tensors:
        tensor = arguments.get(argument)
        if tensor is None or not tensor.is_floating_point() or argument in case.op.differentiable:
            continue
        wanting = arguments | {argument: tensor.clone().requires_grad_()}
        with pytest.raises(ValueError, match=f"{argument}.* requires a gradient, which this op does not have"):
            case.op.function(**wanting)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", registry.FLOATS, ids=str)
def test_samples_are_in_the_dtypes_of_the_op(name, dtype):
    case = CASES[name]
    assert dtype in case.op.dtypes
    tensors, _ = case.op.split(case.arguments(dtype=dtype))
    assert tensors
    assert {t.dtype for t in tensors.values()} == {dtype}
    leaves, others = case.leaves(dtype=dtype)
    outputs = case.run(leaves, others)
    assert outputs[0].dtype == case.arguments().get("out_dtype", dtype)
