"""The search for tiles: what it tries, that the fastest right one wins, and that a proof's tile is what is launched."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from fastlm._core import dispatch, proofs
from fastlm._core.proofs import Entry, Properties
from fastlm.benchmarks.case import Case
from fastlm.ops import gelu as op

pytest.importorskip("triton", reason="triton is not installed")
tiles = pytest.importorskip("fastlm.proving.tiles")
from fastlm.kernels import _common, _norm, _tuned, gelu  # noqa: E402
from fastlm.kernels._tuned import Row  # noqa: E402
from fastlm.kernels.attention import backward_keys, backward_queries, decode, forward, tables  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU, and there is one")
CASE = Case("gelu", (24, 24), "float32", "tanh", ("fwd",))
ROW = Row("gelu.FORWARD", tuple(_common.tiles(gelu.FORWARD, _common.ASSUMED_ARCHITECTURE)[0]))
ROWS = [tuple(row) for table in (gelu.FORWARD, gelu.BACKWARD, _norm.FORWARD, _norm.BACKWARD)
        for rows in table.values() for row in rows]  # fmt: skip
BLOCKS = [tuple(blocks) for table in (forward.FORWARD, backward_keys.KEYS, backward_queries.QUERIES, decode.FEW)
          for blocking in table.values() for sizes in blocking if sizes for blocks in sizes.values()]  # fmt: skip


@pytest.fixture(autouse=True)
def _looked_up_anew():
    _tuned.forget()
    yield
    _tuned.forget()


@pytest.mark.parametrize(
    ("row", "names"),
    [
        *((row, _common.Tile._fields) for row in dict.fromkeys(ROWS)),
        *((b, tables.Blocks._fields) for b in dict.fromkeys(BLOCKS)),
    ],
    ids=str,
)
def test_candidates_are_neighbours_that_a_gpu_may_run(row, names):
    found = tiles.candidates(row, names)
    assert found
    assert row not in found
    assert len(set(found)) == len(found) <= 24
    for tile in found:
        given, shipped = dict(zip(names, tile, strict=True)), dict(zip(names, row, strict=True))
        assert 1 <= given["warps"] <= 16
        assert given["warps"] & (given["warps"] - 1) == 0
        assert given["stages"] >= 1
        if "block" in given:
            assert given["block"] == shipped["block"] <= given["elements"]
        else:
            assert 16 <= given["M"] <= shipped["M"]
            assert 16 <= given["N"] <= shipped["N"]


def test_the_fastest_wins_and_the_slow_ones_leave_early():
    calls = dict.fromkeys("abcdefgh", 0)

    def sampler(name, seconds):
        def sample():
            calls[name] += 1
            return seconds

        return sample

    run = {name: sampler(name, seconds) for name, seconds in zip("abcdefgh", (5, 8, 7, 2, 6, 3, 9, 4), strict=True)}
    assert tiles.halve(run, "a", time.monotonic() + 60, 0.0) == ("d", 2.5)
    assert calls["a"] == calls["d"] > calls["f"] > calls["g"]
    only = {name: run[name] for name in "ab"}
    assert tiles.halve(only, "a", time.monotonic() + 60, 0.0) == ("a", 1.0)
    assert tiles.halve(run, "a", time.monotonic() - 1, 0.0)[0] == "d"  # without time: one round of all


def launched() -> tuple:
    """The tile that a forward pass on rows of 24 is launched with."""
    return tuple(gelu._plan(24, False, False, _common.ASSUMED_ARCHITECTURE)[0])


def search(monkeypatch, slow, wrong=lambda tile: False, right=lambda row: True):
    """What the search finds for gelu where some tiles are slow, and some are wrong."""

    def forward(x, *args):
        time.sleep(0.004 if slow(launched()) else 0.0)
        y = torch.nn.functional.gelu(x, approximate="tanh")
        return y * 1.02 if wrong(launched()) else y

    monkeypatch.setitem(op.KERNELS, "triton", SimpleNamespace(gelu_fwd=forward))
    steps = []
    found = list(tiles.search([CASE], "cpu", right, 60.0, steps.append))
    assert all(f"with {ROW} as" in step for step in steps)
    assert steps
    return found


def test_a_better_tile_is_found(monkeypatch):
    ((name, tile),) = search(monkeypatch, lambda tile: tile[2] != 2)
    assert Row.named(name) == ROW
    assert tile[2] == 2  # two warps
    assert launched() == ROW.tile  # what is tried is not kept


def test_a_wrong_tile_is_not_chosen_however_fast(monkeypatch):
    found = search(monkeypatch, lambda tile: tile[2] != 2, wrong=lambda tile: tile[2] == 2)
    assert all(tile[2] != 2 for _, tile in found)


def test_a_tile_that_random_calls_find_wrong_is_not_chosen(monkeypatch):
    asked = []

    def right(row):
        asked.append((row, launched()[2]))
        return False

    assert search(monkeypatch, lambda tile: tile[2] != 2, right=right) == []
    assert asked == [(ROW, 2)]  # while it was set


def test_where_none_is_better_the_shipped_one_stays(monkeypatch):
    assert search(monkeypatch, lambda tile: tile != ROW.tile) == []


def test_a_proved_tile_is_launched_on_its_gpu_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLM_PROOFS", str(tmp_path))
    key = proofs.key_of(Properties("NVIDIA H200", "sm_90", "570.86.10", "CUDA 13.0"))
    better = (ROW.tile[0], ROW.tile[1] * 2, 8, *ROW.tile[3:])
    proofs.add(key, [Entry("gelu", "triton", "float32", proofs.TILES, "right", "2026-11-29", tiles={str(ROW): better})])
    assert launched() == ROW.tile
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(_common, "architecture", lambda device: _common.ASSUMED_ARCHITECTURE)
    with proofs.pretend(key):
        _tuned.forget()
        assert launched() == better
        assert tuple(gelu._plan(24, False, True, _common.ASSUMED_ARCHITECTURE)[0]) != better
    with proofs.pretend(key._replace(driver="2")):
        _tuned.forget()
        assert launched() == ROW.tile
    dispatch.clear_cache()


@pytest.mark.gpu_code
def test_a_tile_is_checked_by_all_that_share_its_table():
    """Found out by calling them: no list of these is kept."""
    from fastlm.proving import devices, worker

    device = devices.interpreter().to_dict()
    assert worker.users_of("gelu.FORWARD", device) == ["gelu", "bias_gelu"]
    assert worker.users_of("_norm.BACKWARD", device) == ["layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm"]
    assert worker.users_of("cross_entropy.FORWARD", device) == ["cross_entropy", "linear_cross_entropy"]


def test_every_table_of_the_kernels_has_a_name():
    names = _tuned._names()
    found = [
        gelu.FORWARD,
        gelu.BACKWARD,
        _norm.FORWARD,
        _norm.BACKWARD,
        forward.FORWARD,
        backward_keys.KEYS,
        decode.FEW,
    ]
    assert len({names[id(table)] for table in found}) == len(found)
    assert names[id(gelu.FORWARD)] == "gelu.FORWARD"
    assert Row.named(str(ROW)) == ROW


@pytest.mark.parametrize("values", [{"gelu.FORWARD 1024,2048,4,1,1": [1, 2]}, {"x": [4]}, {"gelu.FORWARD a,b": [1]}])
def test_a_tile_that_is_none_damages_the_proof(values, tmp_path, monkeypatch):
    import json

    monkeypatch.setenv("FASTLM_PROOFS", str(tmp_path))
    key = proofs.key_of(Properties("NVIDIA H200", "sm_90", "570.86.10", "CUDA 13.0"))
    path = proofs.add(key, [Entry("gelu", "triton", "float32", proofs.TILES, "right", "2026-11-29")])
    document = json.loads(path.read_text())
    document["entries"][0]["tiles"] = values
    path.write_text(json.dumps(document))
    with pytest.raises(proofs.DataError, match="damaged: a tile"):
        proofs.load(path)
