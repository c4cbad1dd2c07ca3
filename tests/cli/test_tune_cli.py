"""fastlm tune as a command: what it says without a GPU, of bad arguments, of wrong kernels, and its file."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

import fastlm.cli
from fastlm._core import dispatch, proofs
from fastlm._core.architecture import SM90
from fastlm._core.proofs import Entry, Properties
from fastlm.cli import doctor, main
from fastlm.proving import devices, tuner

without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
H200 = Properties("NVIDIA H200", "sm_90", "570.86.10", "CUDA 13.0")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLM_PROOFS", str(tmp_path / "proofs"))
    monkeypatch.setattr(proofs, "on_unproved", None)
    dispatch.clear_cache()
    yield tmp_path / "proofs"
    dispatch.clear_cache()


@pytest.fixture
def quick(monkeypatch):
    """A verdict for every job at once, "right" but for gelu's, which is the fixture's value."""
    verdicts = {"gelu": "right"}

    def run_job(job, device, limits, result):
        verdict = verdicts.get(job.op, "right")
        reason = "" if verdict == "right" else "gradient: dx: error 3.0e-02 > 1.0e-03"
        return Entry(*job.name, verdict, "2026-11-29", 8, reason, "fastlm verify --seed 3" if reason else "")

    monkeypatch.setattr(tuner, "run_job", run_job)
    return verdicts


@without_a_gpu
def test_without_a_gpu_it_says_what_it_would_do(capsys, folder):
    assert main(["tune"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "fastlm tune: no GPU here: tune would check 12 ops x their Triton and CUDA kernels x bfloat16, float16, "
        f"float32 against fp64, time them, and write the proof to {folder}"
    ]
    assert main(["tune", "--ops", "gelu,swiglu"]) == 2
    assert "would check 2 ops" in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ops", "softmax"], "--ops is 'softmax', expected some of scaled_dot_product_attention, "),
        (["--ops", "linear"], "--ops is 'linear', expected some of"),
        (["--minutes", "0"], "--minutes is 0.0, expected a finite number above 0"),
        (["--minutes", "nan"], "--minutes is nan, expected a finite number above 0"),
        (["--device", "tpu"], "--device is 'tpu', expected auto, cuda, cuda:N or interpreter"),
        (["--json", "/nowhere/x.json"], "/nowhere/x.json: the folder /nowhere is not there"),
    ],
)
def test_bad_arguments(capsys, arguments, said):
    assert main(["tune", *arguments]) == 1
    assert said in capsys.readouterr().err


def test_the_table_the_file_and_the_status(capsys, folder, quick, tmp_path):
    file = tmp_path / "h200.json"
    command = ["tune", "--device", "interpreter", "--ops", "gelu,swiglu", "--json", str(file)]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert [line.split(" s ")[1] for line in err.splitlines()][:2] == [
        "gelu on triton, float32",
        "swiglu on triton, float32",
    ]
    assert out.count(" right ") == 4
    kept = folder / devices.interpreter().key.file_name
    assert out.splitlines()[-1] == f"proof      {kept}"
    assert file.read_text() == kept.read_text()
    quick["gelu"] = "wrong"
    assert main(command) == 0  # all is proved already
    capsys.readouterr()
    assert main([*command, "--fresh"]) == 1
    out = capsys.readouterr().out
    assert (
        "WRONG gelu on triton, float32, plain: gradient: dx: error 3.0e-02 > 1.0e-03\n  fastlm verify --seed 3" in out
    )
    assert {e["verdict"] for e in json.loads(file.read_text())["entries"] if e["op"] == "gelu"} == {"wrong"}


def test_an_interrupt_ends_with_its_status(capsys, quick, monkeypatch):
    monkeypatch.setattr(tuner, "run_job", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["tune", "--device", "interpreter", "--ops", "gelu"]) == 130
    assert "interrupted: what was proved before that is kept; the same command continues" in capsys.readouterr().err


def test_what_cannot_be_kept_is_said_once(capsys, quick, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTLM_PROOFS", str(tmp_path / "file" / "proofs"))
    file = tmp_path / "here.json"
    assert main(["tune", "--device", "interpreter", "--ops", "gelu", "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert err.count("the proof cannot be kept: ") == 1
    assert "proof      " not in out
    assert {entry.dtype for entry in proofs.load(file).entries.values()} == {"float32", "float16"}


def test_a_forced_backend_does_not_change_the_plan(quick, monkeypatch, capsys):
    with fastlm.backend("reference"):
        assert main(["tune", "--device", "interpreter", "--ops", "attention_varlen"]) == 0
    assert " several " in capsys.readouterr().out


def test_help_names_every_flag_and_status(capsys):
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("--ops", "--minutes", "--device", "--fresh", "--json", "FASTLM_PROOFS", "130 after Ctrl-C"):
        assert words in text


# ---- the hint and the doctor -----------------------------------------------------------------------------------------


@pytest.fixture
def verb(monkeypatch):
    """A verb of the command that asks for a kernel on a GPU."""
    asked = dispatch.Request("cuda", torch.bfloat16)
    module = type(sys)("fastlm.cli.bench")
    module.main = lambda argv: dispatch.choose("layer_norm", asked) == "no backend"
    monkeypatch.setitem(sys.modules, "fastlm.cli.bench", module)
    monkeypatch.setattr(dispatch, "oldest_architecture", lambda: SM90)
    return "bench"


def test_an_unproved_gpu_is_hinted_at_once_ever(capsys, verb, folder):
    key = proofs.key_of(H200)
    hint = "fastlm: its GPU kernels are left out here, unproved: run `fastlm tune`\n"
    said = []
    for at in (key, key, key._replace(driver="2"), key._replace(driver="2")):
        with proofs.pretend(at):
            dispatch.clear_cache()
            assert main([verb]) == 0
        said.append(capsys.readouterr().err)
    assert said == [hint, "", hint, ""]


def test_no_hint_where_there_is_a_proof(capsys, verb):
    key = proofs.key_of(H200)
    proofs.add(key, [Entry("gelu", "triton", "bfloat16", "plain", "right", "2026-11-29", 8)])
    with proofs.pretend(key):
        dispatch.clear_cache()
        assert main([verb]) == 0
    assert capsys.readouterr().err == ""


def test_no_hint_without_a_gpu_nor_where_it_cannot_be_remembered(capsys, verb, monkeypatch, tmp_path):
    with proofs.pretend():
        dispatch.clear_cache()
        assert main([verb]) == 0
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTLM_PROOFS", str(tmp_path / "file" / "x"))
    with proofs.pretend(proofs.key_of(H200)):
        dispatch.clear_cache()
        assert main([verb]) == 0
    assert capsys.readouterr().err == ""


def test_no_hint_of_an_import(folder):
    """A library says nothing; here to a GPU that is pretended."""
    code = f"""
import torch, fastlm
from fastlm._core import dispatch, proofs
from fastlm._core.architecture import SM90
dispatch.oldest_architecture = lambda: SM90
with proofs.pretend(proofs.key_of(proofs.Properties(*{tuple(H200)!r}))):
    print(dispatch.choose("layer_norm", dispatch.Request("cuda", torch.bfloat16)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr) == ("torch\n", "")
    assert not folder.exists()


def test_the_doctor_shows_what_is_proved(capsys):
    key = proofs.key_of(H200)
    right = Entry("gelu", "triton", "bfloat16", "plain", "right", "2026-11-28", 8)
    wrong = dataclasses.replace(right, op="swiglu", verdict="wrong", date="2026-11-29")
    assert doctor._proof(proofs.read_state(key)) == "unproved: run `fastlm tune`"
    proofs.add(key, [right, wrong])
    text = "1 right, 1 wrong, by 2026-11-29; refused: swiglu on triton"
    assert doctor._proof(proofs.read_state(key)) == text
    assert "the proof is of driver 570.86.10" in doctor._proof(proofs.read_state(key._replace(driver="3")))
    report = doctor.collect()
    report["cuda"]["devices"] = [{"name": "NVIDIA H200", "arch": "sm_90", "memory_gib": 139.0, "proof": text}]
    doctor._print(report)
    assert f"           proof of GPU 0: {text}\n" in capsys.readouterr().out
