"""Fixtures that every test file shares."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import fastlm

sys.path.insert(0, str(Path(__file__).parent))  # for `import tolerances`; importlib mode adds nothing itself

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Fills every torch.empty with NaN, so that an output a kernel leaves unwritten fails the comparison."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1000).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


# Most kernels have one version per vector width; what adds a version above avx512 has its own fixture.
WIDTHS = [name for name in fastlm.cpu_isas() if name in ("baseline", "avx2", "avx512")]


@pytest.fixture(params=WIDTHS or [pytest.param(None, marks=pytest.mark.skip("no CPU extension"))])
def isa(request):
    """Every vector width that this machine has, in turn."""
    before = fastlm.cpu_isa()
    fastlm.set_cpu_isa(request.param)
    yield request.param
    fastlm.set_cpu_isa(before)


@pytest.fixture
def threads():
    """A setter of torch's thread count that is undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
