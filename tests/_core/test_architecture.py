"""Architectures of GPUs are told apart by vendor, and tables are read by family."""

import types

import pytest
import torch

from fastlm._core import architecture as _architecture
from fastlm._core import dispatch as _dispatch
from fastlm._core import proofs
from fastlm._core.architecture import GFX942, GFX1100, SM80, SM90, SM100, newest, parse
from fastlm.backends import conditions
from fastlm.backends import cuda as _native_cuda

SM86 = parse("sm_86")
NAMES = ("sm_80", "sm_86", "sm_90", "sm_103", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")


@pytest.fixture
def gpu(monkeypatch):
    """A function that puts GPUs of some properties here, under ROCm or CUDA."""

    def put(*properties, hip=None):
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(properties))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: types.SimpleNamespace(**properties[i]))
        for cached in (_architecture.architecture, _dispatch.oldest_architecture):
            cached.cache_clear()
        _dispatch.clear_cache()

    yield put
    monkeypatch.undo()
    put_back = (_architecture.architecture, _dispatch.oldest_architecture)
    for cached in put_back:
        cached.cache_clear()
    _dispatch.clear_cache()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_read_as_it_is_written(name):
    assert str(parse(name)) == name


@pytest.mark.parametrize("name", ["", "90", "sm_", "gfx", "sm_9x", "gfx94g", "cuda:90"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="expected a name such as sm_90 or gfx942"):
        parse(name)


def test_rocms_device_is_no_nvidia_gpu(gpu, monkeypatch):
    """MI300X calls itself (9, 4): not sm_94, which would have Hopper's tiles and CUDA's kernels."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu({"name": "MI300X", "major": 9, "minor": 4, "gcnArchName": "gfx942:sramecc+:xnack-"}, hip="6.4.2")
    assert _architecture.architecture(0) == GFX942
    request = _dispatch.Request("cuda", torch.bfloat16)
    assert conditions.triton_unsupported(request) is None
    assert (
        _native_cuda.unserved(_dispatch.oldest_architecture())
        == "its kernels are for NVIDIA's GPUs, this one is gfx942"
    )
    row = next(row for row in _dispatch.backends("layer_norm") if row.name == "triton")
    assert _dispatch.held_back("layer_norm", row, request) == "unproved: run `fastlm tune`"
    key = proofs.state(0).key  # what a proof would have to be of
    assert key is not None
    assert key[:2] == ("MI300X", "gfx942")
    assert key.runtime == "ROCm 6.4.2"


@pytest.mark.parametrize(
    ("name", "needs"),
    [("sm_75", "sm_80"), ("gfx90a", "gfx942"), ("gfx1030", "gfx1100"), ("sm_80", None), ("sm_86", None),
     ("sm_120", None), ("gfx950", None), ("gfx1151", None), ("gfx1201", None)],
)  # fmt: skip
def test_what_is_too_old_is_refused(monkeypatch, name, needs):
    monkeypatch.setattr(_dispatch, "oldest_architecture", lambda: parse(name))
    reason = conditions.triton_unsupported(_dispatch.Request("cuda", torch.float32))
    assert reason == (needs and f"its kernels need {needs} or newer, this GPU is {name}")


def test_cudas_device(gpu):
    gpu({"major": 12, "minor": 0}, {"major": 8, "minor": 6})
    assert [str(_architecture.architecture(i)) for i in range(2)] == ["sm_120", "sm_86"]
    assert _dispatch.oldest_architecture() == SM86


@pytest.mark.parametrize(
    ("name", "rows"),
    [("sm_80", SM80), ("sm_86", SM86), ("sm_87", SM80), ("sm_89", SM86), ("sm_90", SM90), ("sm_100", SM100),
     ("sm_103", SM100), ("sm_120", SM86), ("sm_121", SM86), ("gfx942", GFX942), ("gfx950", GFX942),
     ("gfx1100", GFX1100), ("gfx1151", GFX1100), ("gfx1201", GFX1100)],
)  # fmt: skip
def test_rows_of_the_same_family(name, rows):
    """Of a table in any order; sm_120 lies between none: it has sm_86's shared memory and neither's products."""
    table = (SM80, SM100, GFX1100, SM86, GFX942, SM90)
    assert newest(table, parse(name)) == rows


def test_a_table_of_one_serves_all():
    assert all(newest([SM80], parse(name)) == SM80 for name in NAMES)


def test_the_tables_of_attention_have_rows_for_every_kind_of_compiler():
    """GPUs with 99 KB of shared memory take those of sm_80, which tests/backends/test_aot_compile.py holds to that."""
    pytest.importorskip("triton", reason="triton is not installed")
    from fastlm.kernels.attention import backward, decode, forward

    for table in (forward.FORWARD, backward.KEYS, backward.QUERIES, backward.MASK, decode.FEW, decode.MANY):
        assert {arch.family for arch in table} == {"nvidia", "cdna", "rdna"}
        assert newest(table, SM86) == SM80
