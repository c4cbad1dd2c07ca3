"""`pytest benchmarks/`: the small cases of `fastlm bench --quick` through pytest-benchmark."""

import pytest

from fastlm.benchmarks import registry
from fastlm.benchmarks.case import Unavailable

DEVICE = "cpu"
ENGINE = ("train", "generate")
QUICK = registry.select("all", DEVICE, [], [], [], quick=True)
CASES = [(case, which) for case in QUICK if case.op not in ENGINE for which in case.passes]


@pytest.mark.parametrize("provider", ["fastlm-cpu", "torch"])
@pytest.mark.parametrize(("case", "which"), CASES, ids=lambda v: v if isinstance(v, str) else v.describe())
def test_op(benchmark, case, which, provider):
    benchmark.group = f"{case.describe()} {which}"
    try:
        built = registry.BENCHMARKS[case.op].session(case, DEVICE).build(provider)
    except Unavailable as reason:
        pytest.skip(str(reason))
    benchmark(built.run[which])
