"""`fastlm tune` without a GPU: the interpreter and the emulation of CUDA stand in for one, and kernels are broken."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastlm._core import dispatch, proofs, registry
from fastlm._core.architecture import SM90
from fastlm.backends import cuda as _native_cuda
from fastlm.errors import ConfigError
from fastlm.proving import devices, jobs, tuner, worker
from fastlm.proving.jobs import Job
from fastlm.proving.tuner import Limits

pytest.importorskip("triton", reason="triton is not installed")
broken_kernels = pytest.importorskip("proving.broken_kernels")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU, and there is one")

TESTS = Path(__file__).resolve().parents[1]
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """An empty folder of proofs, which is returned."""
    monkeypatch.setenv("FASTLM_PROOFS", str(tmp_path / "proofs"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    dispatch.clear_cache()
    yield tmp_path / "proofs"
    dispatch.clear_cache()


def device(prepare="", **more):
    """The interpreter, with what is broken in its workers."""
    prepare = f"proving.broken_kernels:{prepare}" if prepare else ""
    given = {"prepare": prepare, "path": (str(TESTS),), "samples": (2, 2)} | more
    return dataclasses.replace(devices.interpreter(), **given)


@pytest.fixture(scope="module")
def gelu():
    """The job of gelu on triton in float32."""
    return next(job for job in jobs.plan(["gelu"], devices.interpreter()) if job.dtype == "float32")


def prove(job, on, hang=300.0):
    result = tuner.begin(on, False)
    tuner.tune([job], on, Limits(hang=hang), result)
    return result


def events(job, name):
    """What a worker would tell of a job with a broken kernel, run in this process."""
    found = []
    with getattr(broken_kernels, name)():
        worker.run(job, device().to_dict(), 60.0, lambda kind, payload: found.append((kind, payload)))
    return found


def of_kind(found, wanted):
    return [payload for kind, payload in found if kind == wanted]


def test_every_kernel_has_a_job():
    """In every dtype that the device takes, plain calls first; every op is timed in one class at least."""
    on = dataclasses.replace(devices.stand_in("x", "x"), largest=None)
    planned = jobs.plan([], on)
    kernels = {(op.name, b) for op in registry.ops() for b in ("triton", "cuda") if op.backend(b)}
    for dtype in on.dtypes:
        assert {(job.op, job.backend) for job in planned if job.dtype == dtype} == kernels
    assert {job.op for job in planned if job.cases} == {op for op, _ in kernels}
    plain = [job.features == "plain" for job in planned]
    assert plain == sorted(plain, reverse=True)
    assert len({job.name for job in planned}) == len(planned)
    attention = {job.features for job in planned if job.op == "scaled_dot_product_attention"}
    assert attention == {"plain", "mask=bool", "mask=additive", "dropout", "window", "softcap", "several", "tiles"}
    assert {job.features for job in planned if job.op == "layer_norm"} == {"plain", "tiles"}


@pytest.mark.parametrize("op", [op.name for op in registry.ops() if op.backend("cuda")])
def test_kernels_that_are_not_built_are_no_jobs(op, monkeypatch):
    """Of a GPU that is pretended; each op's own conditions say so."""
    monkeypatch.setattr(dispatch, "oldest_architecture", lambda: SM90)
    monkeypatch.setattr(_native_cuda, "unusable", lambda: "it was not built")
    on = devices.Device("cuda:0", proofs.key_of(proofs.Properties("NVIDIA H200", "sm_90", "1", "CUDA 13.0")))
    assert jobs.absent(op, "cuda", on) == "it was not built"
    assert jobs.absent(op, "triton", on) is None
    assert {job.backend for job in jobs.plan([op], on)} == {"triton"}


def test_a_job_survives_its_way_to_a_worker(gelu):
    import json

    assert Job.from_dict(json.loads(json.dumps(dataclasses.asdict(gelu)))) == gelu


def test_a_right_kernel_is_proved_and_timed(gelu, folder, monkeypatch):
    monkeypatch.setattr(tuner, "Worker", lambda order, environment: InProcess(order))
    result = prove(gelu, device())
    (entry,) = result.fresh
    assert (entry.verdict, entry.samples, result.wrong, result.unwritten) == ("right", 2, [], "")
    assert {t.which for t in entry.timings} == {"fwd", "bwd"}
    assert all(set(t.seconds) == {"triton", "torch"} for t in entry.timings)
    kept = proofs.load(folder / result.proof.key.file_name)
    assert kept == result.proof
    assert [path.name for path in folder.iterdir()] == [result.proof.key.file_name]  # no lock is left


REFUSED = {
    "wrong": r"(value|exact): output 0: ",
    "wrong_gradient": r"(gradient|exact): dx: ",
    "not_repeatable": "repeat: output 0: two runs differ in their bits",
    "out_of_bounds": "guard: the memory after a tensor from empty_like was written to",
    "unwritten": r"(unwritten|exact): output 0: ",
    "illegal_access": "error: RuntimeError: CUDA error: an illegal memory access was encountered",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_broken_kernel_is_refused_with_its_reason(gelu, name):
    found = events(gelu, name)
    ((reason, command),) = of_kind(found, "wrong")
    assert re.match(REFUSED[name], reason)
    assert command.startswith("fastlm verify --op gelu --backend triton --seed ")
    assert command == of_kind(found, "step")[-1]  # nothing was tried after it
    assert not of_kind(found, "timing")


def test_the_command_repeats_what_was_wrong(gelu, capsys):
    from fastlm.cli import main

    ((reason, command),) = of_kind(events(gelu, "wrong_gradient"), "wrong")
    words = command.split()[1:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastlm.cli.verify._survive_crashes", lambda work: work(lambda command: None))
        with broken_kernels.wrong_gradient():
            assert main(words) == 1
        assert reason.partition(": ")[2] in capsys.readouterr().out
        assert main(words) == 0


def test_a_kernel_that_is_wrong_at_the_timed_shape_is_refused(gelu):
    found = events(gelu, "wrong_where_timed")
    ((reason, command),) = of_kind(found, "wrong")
    assert reason.startswith("value: output 0: error ")
    assert command == "fastlm bench gelu --dtype float32 --shape 24x24"
    assert of_kind(found, "checked") == [2]


def test_a_case_out_of_memory_is_skipped_and_named(gelu):
    found = events(gelu, "out_of_memory")
    skipped = of_kind(found, "skipped")
    assert len(skipped) == sum(case.shape == (24, 24) for case in gelu.cases) > 0
    assert all(text.startswith("gelu ") and text.endswith("24x24 float32: out of memory") for text in skipped)
    assert of_kind(found, "timing")  # the others are timed
    assert not of_kind(found, "wrong")


def test_without_memory_for_any_call_there_is_no_verdict(gelu):
    with broken_kernels.no_memory_at_all(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "SEEDS", 4)
        patch.setattr(tuner, "Worker", lambda order, environment: InProcess(order))
        result = prove(gelu, device())
    assert result.fresh == []
    assert any("out of memory" in text for text in result.skipped)
    assert "no random call" in result.skipped[-1]


class InProcess:
    """A worker that is none: its job runs in this process."""

    def __init__(self, order):
        self.order = order

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        pass

    def events(self, hang):
        found = [("started", None)]
        job = Job.from_dict(self.order["job"])
        worker.run(job, self.order["device"], 60.0, lambda *event: found.append(event))
        return found


@pytest.mark.parametrize(
    ("name", "verdict", "reason"),
    [
        pytest.param("crash", "crashed", "SIGSEGV", marks=pytest.mark.gpu_code),
        ("crash_where_timed", "crashed", "SIGABRT"),
        pytest.param("killed", "crashed", "SIGKILL, as of a system out of memory", marks=pytest.mark.gpu_code),
        pytest.param("ends", "crashed", "exit status 7: an unspecified launch failure", marks=pytest.mark.gpu_code),
        ("hang", "hung", "no sign of life for 3 s"),
    ],
)
def test_a_process_that_dies_or_hangs_is_a_verdict(gelu, name, verdict, reason):
    """And costs the jobs after it nothing; what it was at is the command that repeats it."""
    on = device(name)
    (entry,) = prove(gelu, on, hang=3.0 if name == "hang" else 300.0).fresh
    assert (entry.verdict, entry.reason) == (verdict, reason)
    where = "fastlm bench gelu --dtype float32 --shape 24x24" if "timed" in name else "fastlm verify --op gelu"
    assert entry.command.startswith(where)
    with proofs.pretend(on.key), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "oldest_architecture", lambda: SM90)
        dispatch.clear_cache()
        asked = dispatch.Request("cuda", torch.float32)
        row = next(row for row in dispatch.backends("gelu") if row.name == "triton")
        assert dispatch.held_back("gelu", row, asked) == f"{verdict} here: {reason} ({entry.command} repeats it)"
        assert dispatch.choose("gelu", asked) == "torch"


def test_a_slow_kernel_is_right_but_not_chosen(gelu, monkeypatch):
    found = events(gelu, "slow")
    timings = tuple(proofs.Timing(**timing) for timing in of_kind(found, "timing"))
    assert not of_kind(found, "wrong")
    key = devices.interpreter().key
    proofs.add(key, [proofs.Entry("gelu", "triton", "float32", "plain", "right", "2026-11-29", 2, timings=timings)])
    monkeypatch.setattr(dispatch, "oldest_architecture", lambda: SM90)
    with proofs.pretend(key):
        dispatch.clear_cache()
        assert dispatch.choose("gelu", dispatch.Request("cuda", torch.float32)) == "torch"
        assert (
            "slower here: 0.0"
            in dispatch.explain(lambda: dispatch.choose("gelu", dispatch.Request("cuda", torch.float32))).reasons[
                "triton"
            ]
        )


@pytest.mark.gpu_code
def test_a_device_that_does_not_start_is_an_error_and_no_verdict(gelu, folder):
    with pytest.raises(ConfigError, match=r"process did not start: exit status 1: .*no kernel image is available"):
        prove(gelu, device("not_there"))
    assert proofs.load(next(folder.iterdir())).entries == {}


def test_what_is_proved_is_not_proved_again(gelu, monkeypatch):
    on, ran = device(), []

    def begin(order, environment):
        ran.append(order["job"]["dtype"])
        return InProcess(order)

    monkeypatch.setattr(tuner, "Worker", begin)
    assert len(prove(gelu, on).fresh) == 1
    assert prove(gelu, on).fresh == []
    other = dataclasses.replace(gelu, dtype="float16", cases=())
    result = tuner.begin(on, False)
    tuner.tune([gelu, other], on, Limits(), result)
    assert len(result.proof.entries) == 2
    assert ran == ["float32", "float16"]
    tuner.tune([gelu], on, Limits(), tuner.begin(on, True))  # afresh
    assert ran == ["float32", "float16", "float32"]


def test_nothing_is_begun_after_the_deadline(gelu, monkeypatch):
    monkeypatch.setattr(tuner, "Worker", lambda order, environment: pytest.fail("a job was begun"))
    on = device()
    result = tuner.begin(on, False)
    tuner.tune([gelu, gelu], on, Limits(deadline=time.monotonic()), result)
    assert (result.left, result.fresh) == (2, [])


@pytest.mark.gpu_code
def test_two_processes_share_the_work(folder):
    """Each job is done once, by one of the two, and both end with the whole proof."""
    code = f"""
import sys
sys.path[:0] = [{str(TESTS)!r}]
from fastlm.proving import devices, jobs, tuner
on = devices.interpreter()
planned = [job for job in jobs.plan(["gelu", "swiglu"], on) if job.dtype == "float32" and job.features == "plain"]
planned = planned if sys.argv[1] == "a" else planned[::-1]
result = tuner.begin(on, False)
tuner.tune(planned, on, tuner.Limits(), result)
print(len(result.fresh), sorted(entry.op for entry in result.proof.entries.values()))
"""
    command = [sys.executable, "-c", code]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda name: subprocess.run([*command, name], capture_output=True, text=True), "ab"))
    assert [d.returncode for d in done] == [0, 0], done
    said = [d.stdout.split(maxsplit=1) for d in done]
    assert sum(int(count) for count, _ in said) == 2
    kept = proofs.load(next(folder.iterdir()))
    assert {entry.op for entry in kept.entries.values()} == {"gelu", "swiglu"}


def test_a_read_only_folder_is_said_and_the_run_goes_on(gelu, folder, monkeypatch):
    folder.parent.joinpath("file").touch()
    monkeypatch.setenv("FASTLM_PROOFS", str(folder.parent / "file" / "proofs"))  # so that root may not write either
    monkeypatch.setattr(tuner, "Worker", lambda order, environment: InProcess(order))
    result = prove(gelu, device())
    assert [entry.verdict for entry in result.fresh] == ["right"]
    assert "file" in result.unwritten


def test_a_damaged_proof_is_replaced(gelu, folder, monkeypatch):
    monkeypatch.setattr(tuner, "Worker", lambda order, environment: InProcess(order))
    on = device()
    folder.mkdir()
    (folder / on.key.file_name).write_text('{"format": "fastlm-proof", "vers')
    result = prove(gelu, on)
    assert proofs.load(folder / on.key.file_name) == result.proof


@pytest.mark.gpu_code
def test_the_emulation_of_cuda_stands_in_too(folder, emulated_module):
    """The same command's path, with a key and a proof of its own; the module is built for the CPU by the tests."""
    on = devices.stand_in(
        "emulation", "the emulation of CUDA", backends=("cuda",), prepare="proving.broken_kernels:emulation",
        path=(str(TESTS),), samples=(2, 2), largest=16,
    )  # fmt: skip
    job = next(job for job in jobs.plan(["rms_norm"], on) if job.dtype == "float32")
    (entry,) = prove(job, on).fresh
    assert (entry.verdict, entry.samples, entry.reason) == ("right", 2, "")
    assert entry.timings
    assert on.key != devices.interpreter().key


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "auto:1", "cpu", ""])
def test_a_device_of_another_name_is_refused(name):
    with pytest.raises(ConfigError, match="expected auto, cuda, cuda:N or interpreter"):
        devices.find(name)


def test_no_gpu_is_no_device():
    assert devices.find("auto") is None
    assert devices.find("cuda:3") is None


@pytest.mark.gpu_code
def test_an_interrupt_leaves_a_usable_proof(folder):
    """What was proved before it, and none of its processes."""
    # A shell's background ignores interrupts, and what is begun there does too.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from fastlm.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "tune", "--device", "interpreter", "--ops", "gelu,swiglu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONUNBUFFERED": "1"}, start_new_session=True)  # fmt: skip
    with process:
        for line in process.stderr:
            if line.startswith("2/"):
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted: what was proved before that is kept" in err
    assert re.search("gelu +triton +float32 +plain +right", out)
    assert len(proofs.load(next(folder.glob("*.json"))).entries) == 1
    assert not list(folder.glob("*.lock"))
    assert not list(folder.glob("*.busy"))
