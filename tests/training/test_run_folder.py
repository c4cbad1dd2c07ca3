"""A run folder survives kills, damage, moves and a second run; each is a process or a file of its own here."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastlm
from fastlm._core.files import TEMPORARY, remove_leftovers, replace_text, replacing, staging
from fastlm.cli import main
from fastlm.data import PrepareConfig, prepare
from fastlm.errors import CheckpointError, ConfigError, DataError
from fastlm.formats.checkpoint import load_checkpoint
from fastlm.training import DivergenceError, TrainConfig, train
from fastlm.training.lock import run_lock
from fastlm.training.metrics import MetricsLog, read_metrics
from fastlm.training.progress import Reporter

SMALL = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "context_length": 16,
    "batch_size": 2,
    "warmup_steps": 2,
    "max_steps": 9,
    "eval_interval": 3,
    "log_interval": 2,
    "dropout": 0.1,
    "device": "cpu",
    "threads": 1,
    "dtype": "float32",
}
PATIENCE = 300  # seconds that a step of another process may take on a busy machine


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("FASTLM_KEEP_FREED_MEMORY", "0")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "t.txt").write_text("a stitch in time saves nine, they say.\n" * 200, encoding="utf-8")
    prepare(PrepareConfig(inputs=(folder / "t.txt",), out=folder / "prepared", tokenizer="characters"))
    return folder / "prepared"


@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory):
    """What an undisturbed run leaves."""
    out = tmp_path_factory.mktemp("whole")
    train(config(data, out))
    return out


def config(data, out, **changes):
    return TrainConfig(**{**SMALL, "data": str(data), "out": str(out), **changes})


class Recorder(Reporter):
    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)


class Interrupting(Recorder):
    """Ctrl-C after a step."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def step(self, report):
        if report.step == self.after:
            signal.raise_signal(signal.SIGINT)


def resumed(settings):
    """Resume and return what was said."""
    reporter = Recorder()
    train(settings, resume=True, reporter=reporter)
    return reporter.messages


def assert_same_run(out, other):
    for name in ("last", "best", "previous"):
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (out, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    timing = ("seconds", "tokens_per_second")
    curves = [
        [{k: v for k, v in line.items() if k not in timing} for line in read_metrics(folder / "metrics.jsonl")]
        for folder in (out, other)
    ]
    assert curves[0] == curves[1]


def copy_of(folder, place):
    shutil.copytree(folder, place)
    return place


def flip(path, at=-1, bit=3):
    """Flip a bit of a file in place."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def tensor_at(path, name):
    """Where a tensor's bytes begin in a file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return 8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]


def wait_for(path, process):
    end = time.monotonic() + PATIENCE
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.02)


# Trains in one forked child for each point: it is killed where it would take its k-th step of writing. Prints how many
# steps a whole run takes; the children's folders are OUT/0, OUT/1, ...
KILLED_AT_EVERY_WRITE = """
import json, os, signal, sys
import torch
import fastlm.training
from fastlm.training import TrainConfig, train

fastlm.training.loop.plot_losses = lambda *files: None
settings, out = json.loads(sys.argv[1]), sys.argv[2]
calls = 0
real = {"fsync": lambda file: None, "replace": os.replace}  # a kill loses nothing that is not synced


def run(k):
    def counted(name):
        def call(*args):
            global calls
            calls += 1
            if calls == k + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return real[name](*args)
        return call

    for name in real:
        setattr(os, name, counted(name))
    train(TrainConfig(**settings, out=f"{out}/{k}"))
    os._exit(0)


weight = torch.nn.Parameter(torch.zeros(1))
weight.grad = torch.zeros(1)
torch.optim.AdamW([weight]).step()  # imports a second's worth, once for all children; autograd may not be used here
k = 8  # the start's files lie before
while True:
    child = os.fork()
    if child == 0:
        run(k)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        sys.exit(0 if os.WEXITSTATUS(status) == 0 else "the run failed by itself")
    k += 1
"""


class TestKilled:
    @pytest.mark.slow
    def test_at_every_step_of_writing_it_resumes_bit_for_bit(self, data, tmp_path, monkeypatch):
        settings = {**SMALL, "data": str(data), "max_steps": 4, "eval_interval": 2}
        arguments = [sys.executable, "-c", KILLED_AT_EVERY_WRITE, json.dumps(settings), str(tmp_path)]
        ran = subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE)
        assert ran.returncode == 0, ran.stderr
        monkeypatch.setattr("fastlm.training.loop.plot_losses", lambda *files: None)  # half a second each
        monkeypatch.setattr("os.fsync", lambda file: None)
        points = sorted(int(path.name) for path in tmp_path.iterdir())
        whole = tmp_path / str(points[-1])  # was not killed
        assert len(points) > 12  # four checkpoints, each synced and moved, and its folder synced
        resumable = 0
        for k in points[:-1]:
            out = tmp_path / str(k)
            if not any((out / name).exists() for name in ("last.safetensors", "previous.safetensors")):
                with pytest.raises(CheckpointError, match="no such checkpoint"):
                    train(TrainConfig(**settings, out=str(out)), resume=True)
                train(TrainConfig(**settings, out=str(out)), overwrite=True)
            else:
                resumable += 1
                train(TrainConfig(**settings, out=str(out)), resume=True)
            assert_same_run(out, whole)
            assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
        assert resumable > 4

    def test_leftovers_go_at_the_next_start_and_a_living_writers_stays(self, data, tmp_path):
        train(config(data, tmp_path, max_steps=3))
        dead = [tmp_path / f".{name}.123.0123abcd" for name in ("last.safetensors", "best.safetensors", "loss.png")]
        for path in dead:
            path.write_bytes(b"x" * 100)
        strange = [tmp_path / name for name in (".notes", ".last.safetensors.bak", "mine.1.0123abcd")]
        for path in strange:
            path.touch()
        with replacing(tmp_path / "best.safetensors") as living:
            living.write_bytes((tmp_path / "best.safetensors").read_bytes())
            train(config(data, tmp_path, max_steps=6), resume=True)
            assert living.exists()
        assert not any(path.exists() for path in dead)
        assert all(path.exists() for path in strange)
        assert [path.name for path in tmp_path.iterdir() if TEMPORARY.fullmatch(path.name)] == []

    def test_a_killed_writer_of_a_file_or_folder_leaves_nothing_for_the_next(self, tmp_path):
        """Whatever is written: the next write of the same name removes what the killed one left."""
        script = textwrap.dedent("""
            import os, signal, sys
            from fastlm._core.files import replacing, staging
            with staging(sys.argv[1] + "/folder") as folder, replacing(sys.argv[1] + "/file") as file:
                (folder / "content").write_text("half")
                file.write_text("half")
                os.kill(os.getpid(), signal.SIGKILL)
        """)
        (tmp_path / "file").write_text("old", encoding="utf-8")
        assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=PATIENCE).returncode == -9
        assert (tmp_path / "file").read_text(encoding="utf-8") == "old"
        assert len(list(tmp_path.iterdir())) == 3
        replace_text(tmp_path / "file", "new")
        with staging(tmp_path / "folder"):
            pass
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_two_writers_at_once_leave_each_other_alone(self, tmp_path):
        with replacing(tmp_path / "file") as first, replacing(tmp_path / "file") as second:
            remove_leftovers(tmp_path)
            first.write_text("first", encoding="utf-8")
            second.write_text("second", encoding="utf-8")
        assert (tmp_path / "file").read_text(encoding="utf-8") == "first"  # the outer block ends last
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_without_locks_nothing_is_taken_for_a_leftover(self, tmp_path, monkeypatch):
        monkeypatch.setattr("fastlm._core.files.fcntl", None)
        (tmp_path / ".file.1.0123abcd").touch()
        replace_text(tmp_path / "file", "new")
        assert (tmp_path / ".file.1.0123abcd").exists()


class TestDamage:
    def test_every_kind_in_every_tensor_is_noticed_and_named(self, whole_run, tmp_path):
        """A flipped bit, a zeroed and an exchanged block, in each tensor; generators' and optimizer's too."""
        original = whole_run / "last.safetensors"
        content = original.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        del header["__metadata__"]
        path = tmp_path / "last.safetensors"
        rng = random.Random(0)
        for name, entry in header.items():
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            for kind in range(3):
                data = bytearray(content)
                at = rng.randrange(start, end)
                if kind == 0:
                    data[at] ^= 1 << rng.randrange(8)
                elif kind == 1:
                    data[at : min(at + 64, end)] = bytes(min(64, end - at))
                else:
                    half = (end - start) // 2
                    data[start : start + half], data[start + half : start + 2 * half] = (
                        data[start + half : start + 2 * half], data[start : start + half],
                    )  # fmt: skip
                if data == content:
                    continue
                path.write_bytes(data)
                with pytest.raises(CheckpointError, match=rf"last\.safetensors: damaged: the tensor {name} does not"):
                    load_checkpoint(path)

    def test_exchanged_tensors_of_one_shape_are_noticed(self, whole_run, tmp_path):
        content = (whole_run / "last.safetensors").read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        a, b = "optimizer.ln_f.weight.exp_avg", "optimizer.ln_f.bias.exp_avg"
        header[a], header[b] = header[b], header[a]
        text = json.dumps(header).encode()
        (tmp_path / "last.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
        with pytest.raises(CheckpointError, match=r"the tensor optimizer\.ln_f\.\w+\.exp_avg and 1 more tensors do"):
            load_checkpoint(tmp_path / "last.safetensors")

    @pytest.mark.parametrize("kind", ["flipped", "cut", "empty", "gone", "foreign"])
    def test_the_previous_checkpoint_takes_over_bit_for_bit(self, data, tmp_path, whole_run, kind):
        out = copy_of(whole_run, tmp_path / "out")
        last = out / "last.safetensors"
        if kind == "flipped":
            flip(last)
        elif kind == "cut":
            last.write_bytes(last.read_bytes()[:-100])
        elif kind == "empty":
            last.write_bytes(b"")
        elif kind == "foreign":
            last.write_bytes(b"PK\x03\x04" * 100)
        else:
            last.unlink()
        assert load_checkpoint(out / "previous.safetensors").step == 6
        messages = resumed(config(data, out))
        (line,) = [text for text in messages if "takes its place" in text]
        assert line.startswith(f"{last}: ")
        assert "\n" not in line
        assert f"resuming {out / 'previous.safetensors'} after step 6" in messages
        assert_same_run(out, whole_run)

    def test_the_damaged_one_never_takes_the_place_of_the_good(self, data, tmp_path, whole_run):
        """The run goes on from the older, is stopped again, and has two good ones."""
        out = copy_of(whole_run, tmp_path / "out")
        flip(out / "last.safetensors")
        train(config(data, out), resume=True, reporter=Interrupting(7))
        assert [load_checkpoint(out / f"{name}.safetensors").step for name in ("previous", "last")] == [6, 7]

    def test_both_damaged_is_one_line_on_each(self, data, tmp_path, whole_run):
        out = copy_of(whole_run, tmp_path / "out")
        for name in ("last", "previous"):
            flip(out / f"{name}.safetensors")
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        with pytest.raises(CheckpointError) as caught:
            train(config(data, out), resume=True)
        assert "last.safetensors: damaged" in str(caught.value)
        assert "previous.safetensors: damaged" in str(caught.value)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    def test_a_damaged_best_is_named_and_what_else_there_is(self, tmp_path, whole_run):
        out = copy_of(whole_run, tmp_path / "out")
        flip(out / "best.safetensors", tensor_at(out / "best.safetensors", "model.wte.weight"))
        message = r"best\.safetensors: damaged: the tensor model\.wte\.weight .*last\.safetensors can be given"
        with pytest.raises(CheckpointError, match=message):
            fastlm.load_with_tokenizer(out)
        fastlm.load_with_tokenizer(out / "last.safetensors")

    def test_a_damaged_best_is_written_anew(self, data, tmp_path, whole_run):
        out = copy_of(whole_run, tmp_path / "out")
        flip(out / "best.safetensors")
        messages = resumed(config(data, out, max_steps=12, decay_steps=9))
        assert any("best.safetensors: damaged" in text and "writes a new one" in text for text in messages)
        assert load_checkpoint(out / "best.safetensors").step == 12

    def test_files_without_checksums_still_load(self, data, tmp_path, whole_run):
        """As earlier versions wrote them, whose state has no hashes of the data either."""
        from safetensors import safe_open
        from safetensors.torch import save_file

        out = copy_of(whole_run, tmp_path / "out")
        with safe_open(out / "previous.safetensors", "pt") as file:
            metadata = file.metadata()
        del metadata["checksums"]
        state = json.loads(metadata["state"])
        del state["data"]
        tensors = load_file(out / "previous.safetensors")
        for name in ("last", "previous"):
            (out / f"{name}.safetensors").unlink()
        save_file(tensors, out / "last.safetensors", metadata | {"state": json.dumps(state)})
        messages = resumed(config(data, out))
        assert f"resuming {out / 'last.safetensors'} after step 6" in messages
        a, b = (load_file(folder / "last.safetensors") for folder in (out, whole_run))
        assert all(torch.equal(a[name], b[name]) for name in b)

    def test_a_full_disk_leaves_both(self, data, tmp_path, whole_run):
        """A child may write no more than 20 kB to a file, which the checkpoint exceeds."""
        out = copy_of(whole_run, tmp_path / "out")
        script = textwrap.dedent("""
            import resource, signal, sys
            from fastlm.cli import main
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
            sys.exit(main(["train", "--out", sys.argv[1], "--resume", "--max-steps", "12"]))
        """)
        before = {name: (out / f"{name}.safetensors").read_bytes() for name in ("last", "previous")}
        ran = subprocess.run([sys.executable, "-c", script, str(out)], capture_output=True, text=True, timeout=PATIENCE)
        assert ran.returncode == 1
        assert ran.stderr.count("\n") == 1
        assert "could not write" in ran.stderr
        assert {name: (out / f"{name}.safetensors").read_bytes() for name in before} == before
        assert not [path for path in out.iterdir() if path.name.startswith(".")]


class TestData:
    def copies(self, data, tmp_path, whole_run):
        return copy_of(data, tmp_path / "data"), copy_of(whole_run, tmp_path / "out")

    def test_another_text_of_equal_length_is_refused(self, data, tmp_path, whole_run):
        _, out = self.copies(data, tmp_path, whole_run)
        (tmp_path / "t.txt").write_text("a stitch in time saves nine, say they.\n" * 200, encoding="utf-8")
        other = tmp_path / "other"
        prepare(PrepareConfig(inputs=(tmp_path / "t.txt",), out=other, tokenizer=str(data / "tokenizer.json")))
        assert (other / "train.bin").stat().st_size == (data / "train.bin").stat().st_size
        with pytest.raises(CheckpointError, match="trained on other data: the sha256 of its train split"):
            train(config(other, out, max_steps=12), resume=True)

    @pytest.mark.parametrize("split", ["train", "val"])
    @pytest.mark.parametrize("resume", [True, False])
    def test_tokens_changed_in_place_are_refused(self, data, tmp_path, whole_run, split, resume):
        place, out = self.copies(data, tmp_path, whole_run)
        path = place / f"{split}.bin"
        content = path.read_bytes()
        path.write_bytes(content[2:] + content[:2])
        later = (place / "manifest.json").stat().st_mtime_ns + 1
        os.utime(path, ns=(later, later))
        with pytest.raises(DataError, match=rf"{split}\.bin: its sha256 is not the manifest's"):
            train(config(place, out if resume else tmp_path / "new", max_steps=12), resume=resume)

    def test_tokens_changed_in_place_under_their_old_time_are_refused(self, data, tmp_path, whole_run):
        place, out = self.copies(data, tmp_path, whole_run)
        path, times = place / "train.bin", (place / "train.bin").stat()
        content = path.read_bytes()
        path.write_bytes(content[2:] + content[:2])
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert path.stat().st_mtime_ns == times.st_mtime_ns
        with pytest.raises(DataError, match=r"train\.bin: its sha256 is not the manifest's"):
            train(config(place, out, max_steps=12), resume=True)

    def test_a_copy_with_later_times_is_as_good(self, data, tmp_path, whole_run):
        place, out = self.copies(data, tmp_path, whole_run)
        for name in ("train.bin", "val.bin"):
            later = (place / "manifest.json").stat().st_mtime_ns + 10**9
            os.utime(place / name, ns=(later, later))
        assert resumed(config(place, out))

    def test_a_run_resumes_from_another_folder_and_after_moves(self, data, tmp_path, monkeypatch, capsys):
        """Relative names on the command line; then run and data move, and data alone."""
        first, second = tmp_path / "first", tmp_path / "second"
        first.mkdir()
        second.mkdir()
        shutil.copytree(data, first / "data")
        monkeypatch.chdir(first)
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
        assert main(["train", "data", "--out", "run", *flags]) == 0
        monkeypatch.chdir(second)
        assert main(["train", "--out", "../first/run", "--resume", "--max-steps", "10"]) == 0
        (first / "run").rename(second / "moved")
        assert main(["train", "--out", "moved", "--resume", "--max-steps", "11"]) == 0
        assert not (first / "run").exists()
        assert load_checkpoint(second / "moved").step == 11

        (first / "data").rename(second / "elsewhere")
        capsys.readouterr()
        assert main(["train", "--out", "moved", "--resume", "--max-steps", "12"]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "no such folder; if the run's data moved, give their new place" in error
        assert main(["train", "elsewhere", "--out", "moved", "--resume", "--max-steps", "12"]) == 0
        assert TrainConfig.load("moved/config.toml").data == str(second / "elsewhere")

    def test_ids_beyond_the_vocabulary(self, data, tmp_path):
        """With the manifest's own hash, so that only the id itself tells."""
        place = copy_of(data, tmp_path / "data")
        tokens = bytearray((place / "train.bin").read_bytes())
        tokens[200:202] = (60000).to_bytes(2, "little")
        (place / "train.bin").write_bytes(tokens)
        manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
        manifest["splits"]["train"]["sha256"] = hashlib.sha256(tokens).hexdigest()
        (place / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        message = r"train\.bin: the id at 100 is 60000, expected below the vocabulary of \d+"
        with pytest.raises(DataError, match=message):
            train(config(place, tmp_path / "out", max_steps=1000))

    def test_a_vocabulary_that_is_not_the_tokenizers(self, data, tmp_path):
        place = copy_of(data, tmp_path / "data")
        text = (place / "manifest.json").read_text(encoding="utf-8")
        size = json.loads(text)["vocab_size"]
        (place / "manifest.json").write_text(
            text.replace(f'"vocab_size": {size}', '"vocab_size": 60000'), encoding="utf-8"
        )
        with pytest.raises(DataError, match=f"says vocab_size 60000, its tokenizer {size}"):
            train(config(place, tmp_path / "out"))


# Trains until a step, says so with a file, and waits there.
WAITS = """
import sys, threading
from pathlib import Path
from fastlm.training import TrainConfig, train
from fastlm.training.progress import Reporter

class Waiting(Reporter):
    def step(self, report):
        if report.step == int(sys.argv[2]):
            Path(sys.argv[3]).touch()
            threading.Event().wait()

train(TrainConfig.load(sys.argv[1] + "/config.toml"), resume=True, reporter=Waiting())
"""


class TestLock:
    def test_a_second_run_is_refused_and_a_killed_one_frees_the_folder(self, data, tmp_path, whole_run, capsys):
        out = copy_of(whole_run, tmp_path / "out")
        TrainConfig(**{**SMALL, "data": str(data), "out": str(out), "max_steps": 12}).save(out / "config.toml")
        arguments = [sys.executable, "-c", WAITS, str(out), "11", str(tmp_path / "ready")]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            wait_for(tmp_path / "ready", process)
            before = {path.name: path.read_bytes() for path in out.iterdir()}
            for command in (["--resume"], ["--overwrite"]):
                assert main(["train", str(data), "--out", str(out), *command]) == 1
                shown = capsys.readouterr()
                assert shown.err.count("\n") == 1
                assert f"{out}: in use by another run (process {process.pid} on " in shown.err
                assert shown.out == ""
            assert main(["demo", "--out", str(out)]) == 1
            assert f"process {process.pid} on " in capsys.readouterr().err
            assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        finally:
            process.kill()
            process.communicate()
        assert main(["train", "--out", str(out), "--resume"]) == 0
        assert load_checkpoint(out).step == 12
        steps = [(line["kind"], line["step"]) for line in read_metrics(out / "metrics.jsonl")]
        assert len(set(steps)) == len(steps)
        assert not (out / ".lock").exists()

    def test_a_lock_file_that_nobody_holds_is_no_lock(self, tmp_path):
        (tmp_path / ".lock").write_text("3", encoding="utf-8")
        with run_lock(tmp_path) as warning:
            assert warning == ""
            owner = json.loads((tmp_path / ".lock").read_text(encoding="utf-8"))
            assert owner["pid"] == os.getpid()
            with pytest.raises(ConfigError, match=f"process {os.getpid()} on "), run_lock(tmp_path):
                pass
            assert (tmp_path / ".lock").exists()
        assert not (tmp_path / ".lock").exists()

    def test_a_failed_run_frees_the_folder(self, tmp_path):
        with pytest.raises(KeyError), run_lock(tmp_path):
            raise KeyError
        with run_lock(tmp_path):
            pass

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
    def test_a_full_disk_is_an_error_that_names_the_file(self, tmp_path):
        for name in (".lock", "metrics.jsonl"):
            (tmp_path / name).symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"metrics\.jsonl"):
            MetricsLog(tmp_path / "metrics.jsonl").append("train", step=1)
        with pytest.raises(OSError, match=r"\.lock"), run_lock(tmp_path):
            raise AssertionError
        assert not (tmp_path / ".lock").is_symlink()

    def test_where_there_are_no_locks_it_warns_and_goes_on(self, data, tmp_path, monkeypatch):
        def unsupported(descriptor, operation):
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr("fcntl.flock", unsupported)
        reporter = Recorder()
        train(config(data, tmp_path / "out", max_steps=2), reporter=reporter)
        assert any("knows no locks" in text for text in reporter.messages)

    @pytest.mark.parametrize("verb", ["train", "demo"])
    def test_one_of_several_processes_is_refused(self, data, tmp_path, monkeypatch, capsys, verb):
        monkeypatch.setenv("WORLD_SIZE", "2")
        arguments = [str(data)] if verb == "train" else []
        assert main([verb, *arguments, "--out", str(tmp_path / "out")]) == 1
        shown = capsys.readouterr()
        assert (
            shown.err
            == f"fastlm {verb}: WORLD_SIZE is 2, but training runs in one process: start it without a launcher\n"
        )
        assert not (tmp_path / "out").exists()


class TestMetrics:
    def test_foreign_lines_do_not_block_a_resume(self, data, tmp_path, whole_run):
        out = copy_of(whole_run, tmp_path / "out")
        path = out / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()
        odd = [
            "3",
            '{"kind": "train", "loss": 1.0}',
            '{"kind": "train", "step": "x", "loss": 1}',
            "[" * 100_000,
            "null",
        ]
        path.write_text("\n".join([lines[0], *odd, *lines[1:], '{"kind": "trai']), encoding="utf-8")
        messages = resumed(config(data, out))
        assert f"{path}: line 2 and 4 more are not a line of metrics, and dropped" in messages
        assert path.read_text(encoding="utf-8").splitlines() == lines

    def test_a_torn_last_line_is_nothing_to_speak_of(self, data, tmp_path, whole_run):
        out = copy_of(whole_run, tmp_path / "out")
        with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write('{"kind": "train", "st')
        assert not any("metrics" in text for text in resumed(config(data, out)))


class TestEnd:
    @pytest.mark.parametrize("steps", [3, 4, 9])
    def test_a_run_that_ends_in_nan_fails_and_keeps_what_was_good(self, data, tmp_path, capsys, steps):
        """From a good checkpoint, with a learning rate that overflows: ends at an evaluation and between two."""
        out = tmp_path / "out"
        train(config(data, out, max_steps=2))
        before = {name: (out / f"{name}.safetensors").read_bytes() for name in ("last", "best")}
        arguments = ["--resume", "--learning-rate=1e30", "--max-bad-steps=100", f"--max-steps={steps}"]
        assert main(["train", "--out", str(out), *arguments]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "keeps last.safetensors of step 2 and best.safetensors of step 2" in error
        assert {name: (out / f"{name}.safetensors").read_bytes() for name in before} == before

    def test_a_run_whose_last_step_was_skipped_fails(self, data, tmp_path, monkeypatch):
        """The gradient alone is infinite, so that weights and validation are as they were."""
        monkeypatch.setattr("fastlm.training.adamw.AdamW.gradient_norm", lambda self: float("inf"))
        settings = config(data, tmp_path / "out", max_steps=3)
        with pytest.raises(
            DivergenceError, match=r"for 3 steps in a row \(steps 1 to 3, .* keeps last.safetensors of step 3"
        ):
            train(settings)

    def test_changed_settings_and_a_bent_learning_rate_are_said(self, data, tmp_path):
        out = tmp_path / "out"
        train(config(data, out, min_lr_ratio=0.1))
        messages = resumed(config(data, out, max_steps=18, min_lr_ratio=0.1, batch_size=3))
        assert "changed since the checkpoint: batch_size 2 -> 3, max_steps 9 -> 18" in messages
        (line,) = [text for text in messages if "learning rate" in text]
        # Cosine from step 2 to 9 ends at a tenth of 1e-3; of 2 to 18, after step 9 it is at 7/16 of its way.
        wanted = 1e-3 * (0.1 + 0.9 * (1 + torch.cos(torch.tensor(7 / 16 * torch.pi))) / 2)
        assert f"after step 9 goes from 0.0001 to {wanted:.3g}" in line
        assert "--decay-steps 9" in line

    def test_nothing_is_said_where_nothing_changed(self, data, tmp_path):
        out = tmp_path / "out"
        train(config(data, out), reporter=Interrupting(4))
        messages = resumed(config(data, out))
        assert [text for text in messages if "changed" in text or "learning rate" in text] == []

    def test_a_decay_that_is_kept_bends_nothing(self, data, tmp_path):
        out = tmp_path / "out"
        train(config(data, out))
        messages = resumed(config(data, out, max_steps=12, decay_steps=9))
        assert not any("learning rate" in text for text in messages)


class TestMemory:
    @pytest.mark.parametrize(
        "sizes", [{"n_layer": 10**12}, {"n_embd": 2**40}, {"batch_size": 2**50}, {"n_layer": 10**8}]
    )
    def test_sizes_that_no_machine_holds_are_refused_at_once(self, data, tmp_path, sizes):
        with pytest.raises(ConfigError, match=r"need at least .* GB, but cpu has"):
            train(config(data, tmp_path / "out", **sizes))
        assert not (tmp_path / "out").exists()
