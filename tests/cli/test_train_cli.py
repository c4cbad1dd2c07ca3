"""`fastlm train` and the engine's memory policy, as a user meets them."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import fastlm
from fastlm.cli import demo, main
from fastlm.cli.spelling import spelled
from fastlm.cli.train import Arguments
from fastlm.data import PrepareConfig, load_tokens, prepare
from fastlm.errors import CheckpointError, ConfigError
from fastlm.formats.checkpoint import load_checkpoint
from fastlm.training import TrainConfig, train
from fastlm.training.resume import describe_changes
from fastlm.training.state import State

FLAGS = ["--n-layer=1", "--n-head=2", "--n-embd=16", "--context-length=16", "--batch-size=2"]
FLAGS += ["--warmup-steps=2", "--eval-interval=50", "--log-interval=2"]
FLAGS += ["--device=cpu", "--dtype=float32", "--threads=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "t.txt").write_text("a stitch in time saves nine, they say.\n" * 200, encoding="utf-8")
    prepare(PrepareConfig(inputs=(folder / "t.txt",), out=folder / "prepared", tokenizer="characters"))
    return str(folder / "prepared")


@pytest.fixture(autouse=True)
def restore_threads(monkeypatch):
    # The allocator's policy is for the command's own process, not for this one.
    monkeypatch.setenv("FASTLM_KEEP_FREED_MEMORY", "0")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_trains_refuses_a_used_folder_and_resumes(data, tmp_path, capsys):
    out = str(tmp_path / "run")
    command = ["train", data, "--out", out, *FLAGS]
    assert main([*command, "--max-steps", "4"]) == 0
    shown = capsys.readouterr().out
    assert "n_embd = 16" in shown
    assert "max_steps after 4 steps" in shown

    assert main([*command, "--max-steps", "4"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "holds last.safetensors: add --resume to continue it or --overwrite" in error

    # Nothing but the folder: the rest comes from the run's own configuration, and flags win over it.
    assert main(["train", "--out", out, "--resume", "--max-steps", "6"]) == 0
    assert load_checkpoint(out).step == 6
    assert TrainConfig.load(f"{out}/config.toml").max_steps == 6
    assert TrainConfig.load(f"{out}/config.toml").n_embd == 16

    assert main([*command, "--max-steps", "3", "--overwrite"]) == 0
    assert load_checkpoint(out).step == 3


def test_an_export_in_the_way_is_refused_before_training(data, tmp_path, capsys):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "file").touch()
    for name, message in (("hf", "which holds config.json: give another folder"), ("file", "a file, expected")):
        folder = tmp_path / name
        assert main(["train", data, "--out", str(tmp_path / "new"), *FLAGS, "--export", str(folder)]) == 1
        assert f"fastlm train: --export is '{folder}', {message}" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_an_earlier_export_is_replaced_only_when_asked(data, tmp_path, capsys):
    out, folder = str(tmp_path / "run"), tmp_path / "hf"
    command = ["train", data, *FLAGS, "--max-steps=2", "--out"]
    assert main([*command, out, "--export", str(folder)]) == 0
    first = (folder / "model.safetensors").read_bytes()
    capsys.readouterr()
    for extra in ([], ["--resume"]):
        if extra:
            assert main([*command, str(tmp_path / "other")]) == 0
        capsys.readouterr()
        assert main([*command, str(tmp_path / "other"), "--seed=2", "--export", str(folder), *extra]) == 1
        shown = capsys.readouterr()
        assert f"fastlm train: --export is '{folder}', which holds config.json: give another folder" in shown.err
        assert shown.out == ""
        assert (folder / "model.safetensors").read_bytes() == first
    # A run that goes on replaces its own.
    assert main(["train", "--out", out, "--resume", "--max-steps=3"]) == 0
    assert (second := (folder / "model.safetensors").read_bytes()) != first
    assert main([*command, out, "--seed=2", "--overwrite", "--export", str(folder)]) == 0
    assert (folder / "model.safetensors").read_bytes() not in (first, second)


def test_flags_win_over_the_file(data, tmp_path, capsys):
    file = tmp_path / "small.toml"
    file.write_text("n_layer = 1\nn_head = 1\nn_embd = 8\nmax_steps = 9\nlearning_rate = 0.5\n", encoding="utf-8")
    out = str(tmp_path / "run")
    flags = ["--max-steps", "2", "--context-length=8", "--device", "cpu"]
    assert main(["train", data, "--out", out, "--config", str(file), *flags]) == 0
    config = TrainConfig.load(f"{out}/config.toml")
    assert (config.n_embd, config.max_steps, config.context_length, config.learning_rate) == (8, 2, 8, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "data names no folder"),
        (["no/such/folder"], "no/such/folder: "),
        (["{data}", "--resume"], "no run to resume"),
        (["{data}", "--config", "none.toml"], "none.toml does not exist"),
        (["{data}", "--n-head", "7"], "fastlm train: --n-head is 7, expected a divisor of --n-embd = 384"),
        (["{data}", "--dtype", "float16", "--device", "cpu"], "needs a CUDA device"),
        (["{data}", "--out="], "out names no folder"),
        (["{data}", "--threads", "100000"], "--threads is 100000, expected at most 1024"),
        (["{data}", "--config", "/dev/zero"], "/dev/zero: has more than 16384 bytes, too many for a file of settings"),
        (["{data}", "--context-length", "99999"], "a window of --context-length = 99999 needs 100000"),
    ],
)
def test_mistakes_are_one_clear_line(data, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *(a.format(data=data) for a in arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastlm train: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "runs").exists()


def test_a_run_is_resumed_from_the_last_out_that_is_given(data, tmp_path, capsys):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    for out, width in ((one, "8"), (two, "16")):
        assert main(["train", data, "--out", out, *FLAGS, "--n-embd", width, "--n-head", "1", "--max-steps", "1"]) == 0
    assert main(["train", f"--out={one}", "--out", two, "--resume", "--max-steps", "2"]) == 0
    assert TrainConfig.load(f"{two}/config.toml").n_embd == 16
    assert TrainConfig.load(f"{one}/config.toml").max_steps == 1


@pytest.mark.parametrize(("before", "now"), [("classification", "masked"), ("masked", "causal")])
def test_a_run_is_not_resumed_for_another_objective(before, now, tmp_path, capsys):
    (tmp_path / "table.csv").write_text("text,label\none,a\n")
    TrainConfig(objective=before, data=str(tmp_path / "table.csv"), out=str(tmp_path)).save(tmp_path / "config.toml")
    assert main(["train", "--out", str(tmp_path), "--resume", "--objective", now]) == 1
    wanted = f"fastlm train: {tmp_path}: trained for {before}, but --objective is '{now}'\n"
    assert capsys.readouterr().err == wanted
    with pytest.raises(CheckpointError, match=f"trained for {before}, but objective is '{now}'"):
        train(TrainConfig(objective=now, data=str(tmp_path / "table.csv"), out=str(tmp_path)), resume=True)


def test_changed_settings_of_the_objective_are_said(tmp_path):
    before = TrainConfig(objective="masked", out=str(tmp_path), data=str(tmp_path))
    now = TrainConfig(objective="masked", out=str(tmp_path), data=str(tmp_path), options={"probability": 0.5})
    (line,) = describe_changes(before.to_dict(), now, State(data={}))
    assert line == "changed since the checkpoint: masked.probability 0.15 -> 0.5"
    assert describe_changes(before.to_dict(), before, State(data={})) == []


def test_settings_of_many_dots_are_refused_in_little_time(tmp_path):
    """The parser takes the square of their number: half an hour for these."""
    (tmp_path / "dots.toml").write_text(".".join(["a"] * 250_000) + " = 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"dots\.toml: has more than 16384 bytes"):
        TrainConfig.load(tmp_path / "dots.toml")


def test_an_unknown_flag_names_the_nearest(data, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", data, "--n-layers", "3"])
    assert caught.value.code == 2
    assert "--n-layer" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_saves_and_says_how_to_resume(data, tmp_path, number):
    out = str(tmp_path / "a run")  # the space must survive in the printed command
    command = [sys.executable, "-m", "fastlm.cli", "train", data, "--out", out, *FLAGS]
    process = subprocess.Popen([*command, "--max-steps", "100000000"], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    metrics = os.path.join(out, "metrics.jsonl")
    while not (os.path.exists(metrics) and os.path.getsize(metrics)):
        assert time.monotonic() < deadline, "the run did not start"
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"to continue: fastlm train --out '{out}' --resume" in shown
    step = load_checkpoint(out).step
    assert step > 0
    assert f"interrupted after {step} steps" in shown
    with open(metrics, encoding="utf-8") as file:
        assert all(json.loads(line)["step"] <= step for line in file)
    assert main(["train", "--out", out, "--resume", "--max-steps", str(step + 3)]) == 0
    assert load_checkpoint(out).step == step + 3


class TestDemo:
    @pytest.fixture
    def corpus(self, tmp_path, monkeypatch):
        """A local text in place of the one that is fetched."""
        path = tmp_path / "play.txt"
        path.write_text("To be, or not to be: that is the question.\nWhether 'tis nobler\n" * 400, encoding="utf-8")
        monkeypatch.setattr(demo, "demo_corpus", lambda cache_dir: ("a play", [path]))
        return tmp_path / "demo"

    def test_leaves_everything_it_promises(self, corpus, capsys):
        arguments = ["demo", "--out", str(corpus), "--steps", "3", "--sample-tokens", "5", "--device", "cpu"]
        assert main([*arguments, "--prompt", "To be"]) == 0
        for name in ("loss.png", "metrics.jsonl", "sample.txt", "summary.json"):
            assert (corpus / name).stat().st_size > 0
        assert (corpus / "sample.txt").read_text(encoding="utf-8").startswith("To be")
        summary = json.loads((corpus / "summary.json").read_text(encoding="utf-8"))
        assert (summary["corpus"], summary["steps"], summary["device"]) == ("a play", 3, "cpu")
        assert summary["isa"] == fastlm.cpu_isa()
        assert summary["backend"] in fastlm._core.dispatch.NAMES
        assert summary["parameters"] == fastlm.load_with_tokenizer(corpus)[0].num_parameters()
        assert 0 < summary["train_seconds"] < 240
        assert summary["tokens_per_second"] > 0
        assert "bits per character on held-out text of a play" in capsys.readouterr().out

        # Bits per character again, from the text and the saved model alone.
        model, tokenizer = fastlm.load_with_tokenizer(corpus)
        tokens = torch.from_numpy(load_tokens(corpus / "data", "val").astype("int64"))
        windows = [tokens[i : i + 129] for i in range(0, len(tokens) - 1, 128)]
        with torch.no_grad():
            nats = sum(model(w[None, :-1], w[None, 1:]).item() * (len(w) - 1) for w in windows)
        text = "".join(tokenizer.decode(part.tolist()) for part in tokens.split(10**9))
        end = tokenizer.decode([tokenizer.eot_id])
        count = len(tokens) / (len(tokens) - 1)  # the first token is not predicted
        bits = nats * count / math.log(2) / len(text.replace(end, ""))
        # The run multiplied in bfloat16 where the CPU can, this in float32: 8 bits of mantissa.
        assert summary["bits_per_char"] == pytest.approx(bits, rel=2**-8)

        # A rerun starts afresh.
        assert main([*arguments, "--prompt", "Whether", "--seed", "2"]) == 0
        assert (corpus / "sample.txt").read_text(encoding="utf-8").startswith("Whether")
        assert load_checkpoint(corpus).step == 3
        assert TrainConfig.load(corpus / "config.toml").seed == 2

    def test_minutes_must_be_positive(self, corpus, capsys):
        assert main(["demo", "--out", str(corpus), "--minutes", "0"]) == 1
        assert capsys.readouterr().err == "fastlm demo: --minutes is 0.0, expected more than 0\n"
        assert not corpus.exists()


MEMORY = """
import os, torch
{before}
def faults():
    return int(open("/proc/self/stat").read().rsplit(")", 1)[1].split()[7])
for _ in range(3):  # until the heap has grown to hold what is asked for
    torch.empty(2**24).zero_()
start = faults()
for _ in range(5):
    torch.empty(2**24).zero_()  # 64 MB; up to 32 MB glibc learns by itself not to map blocks anew
print(faults() - start)
"""


def page_faults(before, **environment):
    code = MEMORY.format(before=before)
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "FASTLM_KEEP_FREED_MEMORY": "1", "OMP_NUM_THREADS": "1", **environment},
    )
    return int(run.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the policy is glibc's")
def test_kept_memory_is_not_faulted_in_again():
    call = "from fastlm.runtime import keep_freed_memory; keep_freed_memory()"
    pages = 5 * 2**26 // os.sysconf("SC_PAGE_SIZE")
    if page_faults("") < pages // 2:
        pytest.skip("this system does not fault each new page in (huge pages, or not glibc)")
    # The system may take free pages back when others need memory, so the best of a few runs counts.
    assert min(page_faults(call) for _ in range(3)) < pages // 20
    assert page_faults(call, FASTLM_KEEP_FREED_MEMORY="0") > pages // 2
    # A bare import leaves the allocator alone.
    assert page_faults("import fastlm, fastlm.training") > pages // 2


PIPED = {
    "help": ["--help"],
    "doctor": ["doctor"],
    "train --help": ["train", "--help"],
    "train": ["train", "{data}", "--out", "{out}", *FLAGS, "--max-steps", "100000000"],
    "generate": ["generate", "{run}", "--prompt", "a", "--max-new-tokens", "100000"],
    "prepare": ["prepare", "{text}", "--out", "{out}", "--tokenizer", "characters"],
}


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("run")
    assert main(["train", data, "--out", str(out), *FLAGS, "--max-steps", "2", "--no-keep-freed-memory"]) == 0
    return out


class TestOutput:
    @pytest.mark.parametrize(
        "name", [name if name == "train" else pytest.param(name, marks=pytest.mark.slow) for name in PIPED]
    )
    def test_a_reader_that_goes_away_is_no_traceback(self, data, run, tmp_path, name):
        """The pipe has no reader from the start, so that the first write fails, whenever it comes."""
        names = {"data": data, "run": run, "out": tmp_path / "out", "text": f"{data}/../t.txt"}
        read, write = os.pipe()
        os.close(read)
        command = [sys.executable, "-m", "fastlm.cli", *(word.format(**names) for word in PIPED[name])]
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=300)
        os.close(write)
        assert "Traceback" not in done.stderr
        assert "Broken pipe" not in done.stderr
        assert "BrokenPipe" not in done.stderr
        assert done.returncode in (1, 141)  # rich's tables end with 1
        if name.startswith("train"):
            assert done.returncode == 141
        assert not (tmp_path / "out" / ".lock").exists()

    @pytest.mark.parametrize(
        "arguments",
        [
            ["no/such/folder"],
            ["{data}", "--context-length", "99999"],
            ["{data}", "--out", "{run}"],
            ["{data}", "--device=x"],
        ],
    )
    def test_settings_are_not_printed_before_a_refusal(self, data, run, tmp_path, monkeypatch, capsys, arguments):
        monkeypatch.chdir(tmp_path)
        assert main(["train", *(a.format(data=data, run=run) for a in arguments)]) == 1
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize(
        ("verb", "arguments", "message"),
        [
            ("train", ["{data}", "--max-steps", "0"], "--max-steps is 0, expected at least 1"),
            (
                "train",
                ["{data}", "--seed", "99999999999999999999999"],
                "--seed is an integer of 77 bits, expected an i",
            ),
            ("train", ["{data}", "--seed=-1"], "--seed is -1, expected at least 0"),
            ("train", ["{data}", "--device", "gpu"], "--device is 'gpu', expected auto, cpu, cuda or cuda:N"),
            ("train", ["{data}", "--n-head=7"], "--n-head is 7, expected a divisor of --n-embd = 384"),
            ("train", ["{data}", "--context-length=9999"], "the train split has "),
            (
                "train",
                ["{data}", "--out={run}", "--resume", "--n-embd=8"],
                "{run}/last.safetensors: its model has --n-embd",
            ),
            ("demo", ["--steps", "0"], "--steps is 0, expected at least 1"),
            ("demo", ["--sample-tokens=-1"], "--sample-tokens is -1, expected at least 0"),
            ("demo", ["--device", "gpu"], "--device is 'gpu'"),
            ("demo", ["--seed=99999999999999999999999"], "--seed is an integer of 77 bits, expected an integer"),
            ("generate", ["{run}", "--max-new-tokens", "0"], "--max-new-tokens is 0, expected at least 1"),
            ("generate", ["{run}", "--top-p", "2", "--prompt=a"], "--top-p is 2.0, expected a number in (0, 1]"),
            ("generate", ["{run}", "--prompt=a", "--prompt-file=b"], "--prompt and --prompt-file are both given"),
            (
                "generate",
                ["{run}", "--prompt=a", "--seed=99999999999999999999999"],
                "--seed is an integer of 77 bits, e",
            ),
            (
                "generate",
                ["{run}", "--weights=bf16", "--dtype=float32"],
                "--weights is 'bf16', but --dtype is 'float32'",
            ),
            ("prepare", ["{data}", "--out=x", "--val-fraction=2"], "--val-fraction=2.0, expected at least 0"),
            ("prepare", ["{data}", "--out=x", "--encoding=klingon"], "--encoding='klingon' is not a text encoding"),
            ("verify", ["--seconds=0"], "--seconds is 0.0, expected a number above 0"),
            ("verify", ["--seconds=nan"], "--seconds is nan, expected a number above 0"),
            ("verify", ["--samples=0"], "--samples is 0, expected at least 1"),
            ("bench", ["--threads=0"], "--threads is 0, expected at least 1"),
            ("bench", ["--threads=100000"], "--threads is 100000, expected at most 1024"),
            ("bench", ["--device=gpu"], "--device is 'gpu', expected auto"),
        ],
    )
    def test_mistakes_name_the_flag(self, data, run, tmp_path, monkeypatch, capsys, verb, arguments, message):
        monkeypatch.chdir(tmp_path)
        names = {"data": data, "run": run}
        assert main([verb, *(a.format(**names) for a in arguments)]) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith(f"fastlm {verb}: {message.format(**names)}")
        assert shown.err.count("\n") == 1

    def test_a_file_of_settings_keeps_its_own_spelling(self, data, tmp_path, capsys):
        file = tmp_path / "n_layer.toml"
        file.write_text("n_layer = 2.5\n", encoding="utf-8")
        assert main(["train", data, "--config", str(file)]) == 1
        assert capsys.readouterr().err == f"fastlm train: {file}: n_layer is 2.5 (float), expected int\n"

    def test_a_message_of_plain_words_stays_as_it_is(self):
        text = "the model is good, and the data is in /runs/max_steps/seed: 'n_layer' and out of split are words"
        assert spelled(text, Arguments) == text

    @pytest.mark.parametrize("name", ["a\x7fb", 'a "quoted" name', "ünï", "back\\slash"])
    def test_any_name_of_a_folder_survives_a_resume(self, data, tmp_path, name):
        out = str(tmp_path / name)
        assert main(["train", data, "--out", out, *FLAGS, "--max-steps", "1"]) == 0
        assert main(["train", "--out", out, "--resume", "--max-steps", "2"]) == 0
        assert load_checkpoint(out).step == 2

    def test_a_name_that_is_not_utf8_is_refused(self, data, tmp_path, capsys):
        out = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
        assert main(["train", data, "--out", out, *FLAGS, "--max-steps", "1"]) == 1
        assert "--out is '" in (error := capsys.readouterr().err)
        assert "expected text in UTF-8" in error
