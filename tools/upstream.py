"""PyTorch's own tests, pointed at fastlm.nn.

    python tools/upstream.py                        PyTorch's module database, which its wheel carries
    python tools/upstream.py --tests test_modules.py    a test file of PyTorch's repository as well
    python tools/upstream.py --fetch                the same, fetched at run time for the installed version

The database (torch.testing._internal.common_modules.module_db) holds, for every torch.nn class, constructor and
forward arguments, plain reference functions and wrong arguments. Each entry of a class that fastlm.nn has is run on
fastlm's class: the forward against PyTorch's reference function and class, gradients, copies, saving and loading,
inputs that are not contiguous, and errors. Results are compared with torch.testing's tolerances. One outside them
passes if PyTorch's own is no nearer: if the error, against PyTorch's class in fp64, is at most twice that of PyTorch's
class or reference function in most of nine draws of the parameters. A test file is run as PyTorch runs it, with
the database's classes, and torch.nn's names, replaced by fastlm's. A table of passed and failed is printed, and every
failure's reason. Exit status: 0 if nothing failed. PyTorch's database needs the package expecttest.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import io
import os
import pickle
import re
import sys
import tempfile
import types
import unittest
import urllib.request
import warnings
from pathlib import Path
from unittest import mock

os.environ["PYTORCH_PRINT_REPRO_ON_FAILURE"] = "0"

import torch
from torch import nn
from torch.testing._internal.common_modules import MODULE_CLASS_NAMES, FunctionInput, ModuleInfo, module_db

import fastlm.nn
from fastlm.integrations.rules import CLASSES

RAW = "https://raw.githubusercontent.com/pytorch/pytorch/v{version}/test/{name}"
FETCHED = ("test_modules.py", "nn/test_multihead_attention.py")
MORE: dict[type, type] = {cls: getattr(fastlm.nn, cls.__name__) for cls in (nn.Embedding, nn.Linear, nn.Transformer)}
OURS = {**CLASSES, **MORE}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
DRAWS = 9


def inputs_of(info: ModuleInfo, dtype: torch.dtype, training: bool):
    torch.manual_seed(0)
    return info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)


def build(cls: type, given, dtype: torch.dtype, training: bool, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    module = cls(*given.constructor_input.args, **given.constructor_input.kwargs)
    return module.to(dtype).train(training)


def call(module: nn.Module, given):
    torch.manual_seed(0)
    return module(*given.forward_input.args, **given.forward_input.kwargs)


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, equal_nan=True)


def close_or_no_worse(draw) -> None:
    """Raise unless the results are within torch.testing's tolerances, or as near to the truth as PyTorch's are.

    In bf16, and where a normalization of four numbers magnifies what comes before it, one draw of the parameters
    says little: either side may be lucky. So each tensor's error may be more than twice PyTorch's, and half a unit
    of the last place, in less than half of DRAWS draws.

    Args:
        draw: seed -> (results, what PyTorch gives, the truth).
    """
    actual, expected, _ = draw(0)
    try:
        close(actual, expected)
    except AssertionError:
        verdicts = [no_worse(*map(flat, draw(seed))) for seed in range(DRAWS)]
        if not all(2 * sum(verdict) > DRAWS for verdict in zip(*verdicts, strict=True)):
            raise


def no_worse(actual: list, by_torch: list, truth: list) -> list[bool]:
    verdicts = []
    for mine, theirs, exact in zip(actual, by_torch, truth, strict=True):
        rounding = torch.finfo(mine.dtype).eps / 2 * exact.abs().amax()
        error, their_error = ((x.double() - exact).abs().amax() for x in (mine, theirs))
        verdicts.append(bool(error <= 2 * their_error + rounding))
    return verdicts


def flat(results) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(results) if torch.is_tensor(x)]


def widened(given):
    """The same arguments in fp64."""

    def wide(x: torch.Tensor) -> torch.Tensor:
        return x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x

    given = copy.copy(given)
    forward = given.forward_input
    args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, wide, (forward.args, forward.kwargs))
    given.forward_input = FunctionInput(*args, **kwargs)
    return given


def gradients(module: nn.Module, given, output) -> list:
    """Of every input and parameter that the output depends on."""
    leaves = [x for x in (*given.forward_input.args, *given.forward_input.kwargs.values()) if torch.is_tensor(x)]
    leaves = [x for x in leaves if x.requires_grad] + list(module.parameters())
    first = output[0] if isinstance(output, tuple) else output
    if not leaves or not first.requires_grad:
        return []
    torch.manual_seed(1)
    # Of the shape alone: randn_like fills memory in order, and outputs may be transposed.
    return list(torch.autograd.grad(first, leaves, torch.randn(first.shape, dtype=first.dtype), allow_unused=True))


def against_torch(cls, theirs, given, dtype, training):
    """Outputs and gradients are those of torch's class."""
    if stochastic(theirs, given, training):
        return

    def draw(seed):
        ours, other = (build(each, given, dtype, training, seed) for each in (cls, theirs))
        return results(ours, given), results(other, given), results(other.double(), widened(given))

    close_or_no_worse(draw)


def results(module: nn.Module, given) -> tuple:
    output = call(module, given)
    return output, gradients(module, given, output)


def against_reference(cls, theirs, given, dtype, training):
    """Outputs are those of the database's reference function."""
    if given.reference_fn is None or stochastic(theirs, given, training):
        return
    forward = given.forward_input
    detached = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (forward.args, forward.kwargs))

    def draw(seed):
        ours, other = (build(each, given, dtype, training, seed) for each in (cls, theirs))
        expected = given.reference_fn(other, *detached[0], **detached[1])
        return call(ours, given), expected, call(other.double(), widened(given))

    close_or_no_worse(draw)


def copies_and_state(cls, theirs, given, dtype, training):
    """A pickle, a deep copy and a loaded state give the same output; the state dict is torch's."""
    module = build(cls, given, dtype, training)
    expected = call(module, given)
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        close(call(clone, given), expected)
    other = build(theirs, given, dtype, training)
    assert list(other.state_dict()) == list(module.state_dict()), "state dict keys differ"
    buffer = io.BytesIO()
    torch.save(other.state_dict(), buffer)
    buffer.seek(0)
    module.load_state_dict(torch.load(buffer))


def strided_inputs(cls, theirs, given, dtype, training):
    """Inputs that are not contiguous give the same output."""
    module = build(cls, given, dtype, training)
    expected = call(module, given)
    arguments = [strided(x) if torch.is_tensor(x) else x for x in given.forward_input.args]
    torch.manual_seed(0)
    close(module(*arguments, **given.forward_input.kwargs), expected)


def strided(x: torch.Tensor) -> torch.Tensor:
    if x.numel() < 2 or x.dim() == 0:
        return x
    return torch.stack((x.detach(), x.detach()), -1)[..., 0].requires_grad_(x.requires_grad)


def stochastic(theirs: type, given, training: bool) -> bool:
    """Whether dropout makes the output another each time."""
    dropouts = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.TransformerEncoder, nn.Transformer)
    arguments = given.constructor_input
    layer = next((a for a in arguments.args if isinstance(a, nn.TransformerEncoderLayer)), None)
    p = layer.dropout.p if layer is not None else arguments.kwargs.get("dropout", 0.1)
    p = arguments.args[3] if len(arguments.args) > 3 and layer is None else p
    return training and issubclass(theirs, dropouts) and p > 0


CHECKS = (against_torch, against_reference, copies_and_state, strided_inputs)


def run_database(only: list[str]) -> int:
    """Every class, or those named; returns how many checks failed."""
    infos = [info for info in module_db if info.module_cls in OURS]
    infos = [info for info in infos if not only or info.module_cls.__name__ in only]
    return sum(report(info.module_cls.__name__, *run_class(info)) for info in infos)


def run_class(info: ModuleInfo) -> tuple[collections.Counter, list[str]]:
    outcomes: collections.Counter = collections.Counter()
    failures: list[str] = []
    cls = OURS[info.module_cls]
    for dtype in DTYPES:
        for training in (True, False):
            for index, given in enumerate(inputs_of(info, dtype, training)):
                if given.forward_input is None:
                    continue
                for check in CHECKS:
                    where = f"{cls.__name__}[{index}] {str(dtype)[6:]} {'train' if training else 'eval'}"
                    one(outcomes, failures, f"{where} {check.__name__}", check, cls, info.module_cls, given, dtype,
                        training)  # fmt: skip
    run_errors(outcomes, failures, info, cls)
    return outcomes, failures


def one(outcomes, failures, name, check, *arguments) -> None:
    try:
        check(*arguments)
        outcomes["passed"] += 1
    except Exception as error:
        outcomes["failed"] += 1
        failures.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")


def run_errors(outcomes, failures, info: ModuleInfo, cls: type) -> None:
    """Wrong arguments raise; the type may be narrower than torch's, as ValueError for RuntimeError."""
    if info.module_error_inputs_func is None:
        return
    for index, case in enumerate(
        info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True)
    ):
        given = case.module_error_input

        def raises(given=given, case=case):
            try:
                module = cls(*given.constructor_input.args, **given.constructor_input.kwargs)
                if given.forward_input is not None:
                    call(module, given)
            except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
                return
            raise AssertionError(f"no error where torch says {case.error_regex!r}")

        one(outcomes, failures, f"{cls.__name__} wrong arguments [{index}]", raises)


def run_file(path: Path) -> tuple[collections.Counter, list[str]]:
    """A test file of PyTorch's repository, with fastlm's classes under torch's names.

    What fails with torch's own classes too, as it may for a file of another version, is not counted.
    """
    _, by_torch = run_suite(path)
    with contextlib.ExitStack() as replaced:
        replaced.enter_context(torch.serialization.safe_globals([getattr(fastlm.nn, n) for n in fastlm.nn.__all__]))
        # Tests are named after these, and what fails for torch's classes too is known by its name.
        names = {cls: MODULE_CLASS_NAMES[theirs] for theirs, cls in OURS.items() if theirs in MODULE_CLASS_NAMES}
        replaced.enter_context(mock.patch.dict(MODULE_CLASS_NAMES, names))
        for theirs, cls in OURS.items():
            replaced.enter_context(mock.patch.object(nn, theirs.__name__, cls))
        for info in [info for info in module_db if info.module_cls in OURS]:
            replaced.enter_context(mock.patch.object(info, "module_cls", OURS[info.module_cls]))
        run, by_ours = run_suite(path)
    failures = {name: reason for name, reason in by_ours.items() if name not in by_torch}
    outcomes = collections.Counter(
        passed=run.testsRun - len(by_ours) - len(run.skipped),
        failed=len(failures),
        skipped=len(run.skipped) + len(by_ours) - len(failures),
    )
    return outcomes, [f"{name}: {reason}" for name, reason in failures.items()]


def run_suite(path: Path) -> tuple[unittest.TestResult, dict[str, str]]:
    """(what unittest says, the reason of each failure)."""
    sys.modules["upstream"] = module = types.ModuleType("upstream")
    module.__file__ = str(path)
    every = module_db[:]
    module_db[:] = [info for info in every if info.module_cls in (*OURS, *OURS.values())]
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module.__dict__)
    module_db[:] = every
    suite = unittest.defaultTestLoader.loadTestsFromModule(module)
    result = unittest.TextTestRunner(stream=io.StringIO()).run(suite)
    return result, {test.id(): reason(trace) for test, trace in result.failures + result.errors}


def reason(trace: str) -> str:
    """The line of a traceback that names the error."""
    lines = [line for line in trace.splitlines() if re.match(r"[\w.]*(Error|Exception|Warning)\b", line)]
    return (lines or trace.strip().splitlines())[-1]


def fetch(folder: str) -> list[Path]:
    """The test files of the installed version, from PyTorch's repository."""
    found = []
    for name in FETCHED:
        path = Path(folder) / Path(name).name
        url = RAW.format(version=torch.__version__.split("+")[0], name=name)
        with urllib.request.urlopen(url, timeout=60) as answer:
            path.write_bytes(answer.read())
        found.append(path)
    return found


def report(title: str, outcomes: collections.Counter, failures: list[str]) -> int:
    print(f"{title:<28}{outcomes['passed']:>8} passed{outcomes['failed']:>6} failed{outcomes['skipped']:>6} skipped")
    for line in failures:
        print(f"  {line}")
    sys.stdout.flush()
    return outcomes["failed"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--only", nargs="*", default=[], metavar="CLASS", help="of the database, such as LayerNorm")
    parser.add_argument("--fetch", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    failed = run_database(options.only)
    with tempfile.TemporaryDirectory() as folder:
        files = options.tests + (fetch(folder) if options.fetch else [])
        for path in files:
            failed += report(path.name, *run_file(path))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
