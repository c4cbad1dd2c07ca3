"""fastlm doctor: what it reports agrees with what the package and torch say themselves."""

import json

import torch

import fastlm
from fastlm import _dispatch, _native
from fastlm.cli import doctor, main


def test_json_agrees_with_the_package(capsys, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["torch"] == torch.__version__
    assert report["cpu"]["isas"] == list(fastlm.cpu_isas())
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert report["cpu"]["extension"] == (_native.missing_reason or "loaded")
    assert report["settings"]["MALLOC_ARENA_MAX"] == "3"
    assert set(report["backends"]) == set(_dispatch.ops())
    for rows in report["backends"].values():
        for states in rows.values():
            assert list(states.values()).count("selected") == 1


def test_text_names_every_op_and_every_missing_peer_is_left_out(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(op in out for op in _dispatch.ops())
    assert doctor.cpu_model() in out
    assert "memory     " in out


def test_a_forced_backend_is_the_selected_one():
    with fastlm.backend("reference"):
        backends = doctor.collect()["backends"]
    states = [states for rows in backends.values() for states in rows.values()]
    assert {name for rows in states for name, state in rows.items() if state == "selected"} == {"reference"}


def test_advice_is_a_command():
    report = doctor.collect()
    report["cpu"]["extension"], report["packages"]["tokenizers"] = "missing", None
    advice = doctor._advice(report)
    assert any("FASTLM_CPU=1 pip install" in line for line in advice)
    assert any("pip install 'fastlm[train]'" in line for line in advice)


def test_no_driver_without_its_command(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert doctor.driver_version() is None
