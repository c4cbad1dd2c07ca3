"""Configuration, data order, evaluation, the loop's promises: exact resume, clear failures, full records."""

import itertools
import json
import math
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data import PrepareConfig, load_manifest, load_tokens, prepare
from fastlm.data.loader import Loader, in_order
from fastlm.data.windows import ShiftedWindows, Windows
from fastlm.errors import CheckpointError, ConfigError, DataError
from fastlm.formats.checkpoint import load_checkpoint
from fastlm.models.gpt import GPT, GPTConfig
from fastlm.objectives import Causal
from fastlm.runtime import choose_device, choose_dtype, choose_threads, cpu_bfloat16_feature
from fastlm.training import DivergenceError, TrainConfig, train
from fastlm.training.evaluation import evaluate
from fastlm.training.metrics import read_metrics
from fastlm.training.optimizer import build_optimizer
from fastlm.training.progress import ConsoleReporter, Reporter, clock

SMALL = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "context_length": 16,
    "batch_size": 4,
    "warmup_steps": 4,
    "max_steps": 20,
    "eval_interval": 8,
    "log_interval": 3,
    "device": "cpu",
    "threads": 1,
    "dtype": "float32",
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """About 12 kB of sentences over a small vocabulary, é among them so that bytes and characters differ."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = ["the", "a", "king", "queen", "café", "rides", "to", "from", "old", "new", "town", "and"]
    text = "".join(" ".join(rng.choice(words, 8)) + ".\n" for _ in range(300))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    out = folder / "prepared"
    prepare(PrepareConfig(inputs=(folder / "text.txt",), out=out, tokenizer="characters", val_fraction=0.1))
    return out


def config(data, out, **changes):
    return TrainConfig(**{**SMALL, "data": str(data), "out": str(out), **changes})


class Recorder(Reporter):
    """Keeps what it is told, and interrupts the run after a step or in an evaluation."""

    def __init__(self, interrupt_after=None):
        self.interrupt_after = interrupt_after
        self.steps, self.evaluations, self.messages, self.closed = [], [], [], 0

    def step(self, report):
        self.steps.append(report)
        if report.step == self.interrupt_after:
            signal.raise_signal(signal.SIGINT)

    def evaluation(self, step, result, best):
        self.evaluations.append((step, result, best))

    def message(self, text):
        self.messages.append(text)

    def close(self):
        self.closed += 1


def tensors(out, name="last.safetensors"):
    return load_checkpoint(out / name).tensors


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class TestConfig:
    def test_toml_round_trip(self, tmp_path):
        made = TrainConfig(data='a "quoted" Ordner/ü', learning_rate=3e-05, compile=True, schedule="linear")
        made.save(tmp_path / "config.toml")
        assert TrainConfig.load(tmp_path / "config.toml") == made

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("n_layers = 2", "unknown key 'n_layers'; did you mean 'n_layer'?"),
            ("lerning-rate = 1", "unknown key 'lerning-rate'; did you mean 'learning_rate'?"),
            ("zzzz = 1", "unknown key 'zzzz'"),
            ("n_layer = 2.0", "n_layer is 2.0 (float), expected int"),
            ('n_layer = "2"', "n_layer is '2' (str), expected int"),
            ("n_layer = true", "n_layer is True (bool), expected int"),
            ("compile = 1", "compile is 1 (int), expected bool"),
            (
                "schedule = 'cosin'",
                "expected one of cosine, linear, constant, inverse_sqrt; did you mean 'cosine'?",
            ),
            ("dtype = []", "dtype is [], expected one of auto"),
            ("max_steps = 0", "max_steps is 0, expected at least 1"),
            ("dropout = 1.0", "dropout is 1.0, expected at least 0 and below 1"),
            ("learning_rate = 0", "learning_rate is 0.0, expected more than 0"),
            ("grad_clip = nan", "grad_clip is nan, expected a finite number"),
            ("min_lr_ratio = 1.5", "min_lr_ratio is 1.5, expected from 0 to 1"),
            ("n_head = 5", "n_head is 5, expected a divisor of n_embd = 384"),
            ("n_layer = ", "not valid TOML"),
        ],
    )
    def test_bad_toml_is_refused_by_name(self, tmp_path, line, message):
        path = tmp_path / "bad.toml"
        path.write_text(line + "\n", encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            TrainConfig.load(path)
        assert message in str(caught.value)
        assert str(path) in str(caught.value)

    def test_missing_file(self, tmp_path):
        with pytest.raises(ConfigError, match=r"none\.toml does not exist"):
            TrainConfig.load(tmp_path / "none.toml")

    def test_a_whole_number_may_stand_for_a_float(self):
        assert TrainConfig.from_dict({"learning_rate": 1}).learning_rate == 1.0

    def test_float16_needs_cuda(self):
        with pytest.raises(ConfigError, match="'float16', which needs a CUDA device"):
            choose_dtype("float16", torch.device("cpu"))

    @pytest.mark.parametrize("name", ["gpu", "meta", "cuda:99", "cpu:x"])
    def test_unknown_device(self, name):
        with pytest.raises(ConfigError, match=f"device is '{name}'"):
            choose_device(name)

    def test_auto_dtype_on_a_cpu_follows_its_instruction_sets(self):
        capabilities = getattr(torch.cpu, "get_capabilities", lambda: None)()
        if not capabilities or capabilities["architecture"] != "x86_64" or not sys.platform.startswith("linux"):
            pytest.skip("PyTorch does not tell this CPU's instruction sets")
        fast = capabilities["avx512_bf16"] or capabilities["amx_bf16"]
        dtype, why = choose_dtype("auto", torch.device("cpu"))
        assert dtype == (torch.bfloat16 if fast else torch.float32)
        assert bool(cpu_bfloat16_feature()) == fast
        assert ("the CPU has" in why) == fast

    @pytest.mark.parametrize(
        ("asked", "limits", "threads"),
        [(0, "200000 100000", 2), (0, "50000 100000", 1), (0, "max 100000", 8), (0, None, 8), (5, "200000 100000", 5)],
    )
    def test_threads_stay_within_a_containers_share(self, tmp_path, monkeypatch, asked, limits, threads):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        file = tmp_path / "cpu.max"
        if limits is not None:
            file.write_text(limits + "\n", encoding="utf-8")
        assert choose_threads(asked, 8, file) == threads
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        assert choose_threads(asked, 7, file) == (asked or 7)


def loader_of(tokens, batch, context, seed):
    return Loader(ShiftedWindows(tokens, context), batch, seed, Causal().collate)


class TestLoader:
    @given(
        n=st.integers(2, 300),
        context=st.integers(1, 20),
        batch=st.integers(1, 7),
        seed=st.integers(0, 2**40),
    )
    @settings(max_examples=60, deadline=None)
    def test_every_window_once_an_epoch_each_followed_by_its_targets(self, n, context, batch, seed):
        tokens = np.arange(n, dtype=np.uint16)
        if n < context + 1:
            with pytest.raises(DataError, match=f"has {n} tokens.*needs {context + 1}"):
                loader_of(tokens, batch, context, seed)
            return
        loader = loader_of(tokens, batch, context, seed)
        per_epoch = len(loader.examples)
        # As many windows as fit whatever the offset; at least one.
        assert per_epoch == max(1, (n - context) // context)
        starts = []
        for k in range(math.ceil(2 * per_epoch / batch)):
            x, y = loader.batch(k).tensors.values()
            assert x.shape == y.shape == (batch, context)
            assert x.dtype == y.dtype == torch.int64
            assert torch.equal(x, x[:, :1] + torch.arange(context))
            assert torch.equal(y, x + 1)
            starts += x[:, 0].tolist()
        for epoch in (starts[:per_epoch], starts[per_epoch : 2 * per_epoch]):
            offset = min(epoch)
            assert sorted(epoch) == [offset + i * context for i in range(per_epoch)]
            assert 0 <= offset < context

    def test_a_batch_depends_on_seed_and_number_alone(self):
        tokens = np.random.default_rng(0).integers(0, 99, 1000).astype(np.uint32)
        first = loader_of(tokens, 3, 8, 1)
        later = [first.batch(k)["tokens"] for k in range(90)]  # more than two epochs
        again = loader_of(tokens, 3, 8, 1)
        for k in (89, 0, 41, 42):
            assert torch.equal(again.batch(k)["tokens"], later[k])
        assert not torch.equal(loader_of(tokens, 3, 8, 2).batch(0)["tokens"], later[0])

    def test_epochs_differ_in_order_and_offset(self):
        loader = loader_of(np.arange(1000, dtype=np.uint16), loader_batch := 30, 32, 0)
        assert len(loader.examples) == loader_batch
        epochs = [loader.batch(k)["tokens"][:, 0] for k in range(6)]
        assert len({int(e.min()) for e in epochs}) > 2
        assert len({tuple((e - e.min()).tolist()) for e in epochs}) == 6

    @given(n=st.integers(2, 200), context=st.integers(1, 20), batch=st.integers(1, 5), cap=st.integers(0, 250))
    @settings(max_examples=60, deadline=None)
    def test_evaluation_predicts_each_token_once(self, n, context, batch, cap):
        tokens = np.arange(n, dtype=np.uint16)
        targets = []
        for found in in_order(Windows(tokens, context, cap), batch, Causal().collate):
            x, y = found["tokens"], found["targets"]
            kept = y != -100
            assert found.targets == kept.sum()
            assert torch.equal(y[kept], x[kept] + 1)
            assert x.shape[1] <= context
            targets += y[kept].tolist()
        assert targets == list(range(1, 1 + min(n - 1, cap or n)))


class TestEvaluation:
    def test_equals_the_formula_over_logits_in_float64(self, data):
        tokens = load_tokens(data, "val")
        split = load_manifest(data).splits["val"]
        torch.manual_seed(0)
        model = GPT(GPTConfig(load_manifest(data).vocab_size, 16, 2, 2, 32, dropout=0.3))
        objective = Causal(split["tokens"] / split["bytes"], split["tokens"] / split["chars"])
        result = evaluate(model, objective, in_order(Windows(tokens, 16), 5, objective.collate))
        assert model.training
        ids = torch.from_numpy(tokens.astype(np.int64))
        reference = model.double().eval()
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(ids) - 1, 16):
                window = ids[start : start + 17]
                total += F.cross_entropy(reference(window[None, :-1])[0], window[1:], reduction="sum").item()
        loss = total / (len(ids) - 1)
        assert result.tokens == len(ids) - 1
        assert result.loss == pytest.approx(loss, rel=1e-5)
        assert result.bits_per_byte == pytest.approx(loss * split["tokens"] / split["bytes"] / math.log(2), rel=1e-5)
        assert result.bits_per_char == pytest.approx(loss * split["tokens"] / split["chars"] / math.log(2), rel=1e-5)
        assert result.bits_per_char > result.bits_per_byte


class TestOptimizer:
    def test_only_matrices_and_embeddings_decay(self):
        model = GPT(GPTConfig(11, 8, 1, 2, 16))
        names = {id(p): name for name, p in model.named_parameters()}
        groups = build_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
        decay = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
        rest = {names[id(p)] for g in groups if not g["weight_decay"] for p in g["params"]}
        assert decay | rest == set(names.values())
        assert all(name.endswith("bias") or "ln_" in name for name in rest)
        assert not any(name.endswith("bias") or "ln_" in name for name in decay)
        assert {g["weight_decay"] for g in groups} == {0.3, 0.0}


@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory):
    """Twenty steps with dropout and accumulation in one go, and what was reported."""
    out = tmp_path_factory.mktemp("whole")
    reporter = Recorder()
    result = train(config(data, out, dropout=0.2, gradient_accumulation=2), reporter=reporter)
    return out, result, reporter


class TestResume:
    # 10 lies between evaluations and log lines, 8 is an evaluation, 9 a log line, 19 the step before the end.
    @pytest.mark.parametrize("stop", [1, 8, 9, 10, 19])
    def test_continues_bit_for_bit(self, data, tmp_path, whole_run, stop):
        settings = config(data, tmp_path, dropout=0.2, gradient_accumulation=2)
        stopped = train(settings, reporter=Recorder(interrupt_after=stop))
        assert stopped.interrupted
        assert stopped.step == stop
        torch.manual_seed(99)  # what the process drew in between must not matter
        result = train(settings, resume=True)
        assert (result.reason, result.step) == ("max_steps", 20)
        assert_same_tensors(tensors(tmp_path), tensors(whole_run[0]))
        assert_same_tensors(tensors(tmp_path, "best.safetensors"), tensors(whole_run[0], "best.safetensors"))
        assert curve(tmp_path) == curve(whole_run[0])

    def test_more_steps_may_be_added(self, data, tmp_path, whole_run):
        settings = {"dropout": 0.2, "gradient_accumulation": 2, "decay_steps": 20}
        train(config(data, tmp_path, max_steps=10, **settings))
        train(config(data, tmp_path, max_steps=20, **settings), resume=True)
        stored, wanted = load_checkpoint(tmp_path).part("model"), load_checkpoint(whole_run[0]).part("model")
        assert_same_tensors(stored, wanted)

    def test_a_killed_run_repeats_no_line_of_metrics(self, data, tmp_path, whole_run):
        settings = config(data, tmp_path, dropout=0.2, gradient_accumulation=2)
        train(settings, reporter=Recorder(interrupt_after=10))
        with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write('{"kind": "train", "step": 12, "loss": 1.0}\n{"kind": "validation", "step": 16, "loss"')
        train(settings, resume=True)
        assert curve(tmp_path) == curve(whole_run[0])

    def test_resuming_a_finished_run_changes_nothing(self, data, tmp_path, whole_run):
        settings = config(data, whole_run[0], dropout=0.2, gradient_accumulation=2)
        before = (whole_run[0] / "last.safetensors").read_bytes()
        assert train(settings, resume=True).step == 20
        assert (whole_run[0] / "last.safetensors").read_bytes() == before

    def test_another_model_is_refused(self, data, whole_run):
        before = (whole_run[0] / "metrics.jsonl").read_bytes()
        with pytest.raises(CheckpointError, match="its model has n_head = 2, the configuration 4"):
            train(config(data, whole_run[0], n_head=4), resume=True)
        assert (whole_run[0] / "metrics.jsonl").read_bytes() == before

    def test_data_of_another_tokenizer_is_refused(self, tmp_path, whole_run):
        (tmp_path / "t.txt").write_text("completely other characters! " * 80, encoding="utf-8")
        other = tmp_path / "other"
        prepare(PrepareConfig(inputs=(tmp_path / "t.txt",), out=other, tokenizer="characters"))
        with pytest.raises(CheckpointError, match=r"trained with tokenizer \w{12}, but that of .* is \w{12}"):
            train(config(other, whole_run[0]), resume=True)

    def test_nothing_to_resume(self, data, tmp_path):
        with pytest.raises(CheckpointError, match=r"last\.safetensors: no such checkpoint"):
            train(config(data, tmp_path), resume=True)


def curve(out):
    """Lines of metrics without what depends on the clock."""
    timing = ("seconds", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in timing} for line in read_metrics(out / "metrics.jsonl")]


class TestRun:
    def test_the_folder_is_complete(self, data, whole_run):
        out, result, reporter = whole_run
        names = {
            "best.safetensors",
            "config.toml",
            "last.safetensors",
            "loss.png",
            "metrics.jsonl",
            "previous.safetensors",
            "tokenizer.json",
        }
        assert {p.name for p in out.iterdir()} == names
        assert (out / "tokenizer.json").read_bytes() == (data / "tokenizer.json").read_bytes()
        assert TrainConfig.load(out / "config.toml").gradient_accumulation == 2
        assert (out / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert reporter.closed == 1
        assert result.parameters == sum(t.numel() for t in load_checkpoint(out).part("model").values())

    def test_one_line_of_metrics_an_interval(self, whole_run):
        out, _, reporter = whole_run
        lines = [json.loads(text) for text in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        train_lines = [line for line in lines if line["kind"] == "train"]
        assert [line["step"] for line in train_lines] == [3, 6, 9, 12, 15, 18]
        assert [line["step"] for line in lines if line["kind"] == "validation"] == [8, 16, 20]
        losses = [report.loss for report in reporter.steps]
        for line in train_lines:
            assert line["loss"] == pytest.approx(np.mean(losses[line["step"] - 3 : line["step"]]), rel=1e-6)
            assert line["tokens"] == line["step"] * 4 * 2 * 16

    def test_the_loss_falls_and_the_best_is_kept(self, data, tmp_path):
        result = train(config(data, tmp_path, max_steps=60, learning_rate=1e-2, eval_interval=20))
        losses = {
            line["step"]: line["loss"]
            for line in read_metrics(tmp_path / "metrics.jsonl")
            if line["kind"] == "validation"
        }
        assert result.best_loss == min(losses.values()) == losses[result.best_step]
        assert losses[60] < math.log(load_manifest(data).vocab_size) - 0.5
        assert load_checkpoint(tmp_path / "best.safetensors").step == result.best_step

    def test_accumulation_is_a_larger_batch(self, data, tmp_path):
        """Two batches of 4 added up are one of 8, but for the order of additions."""
        small = config(data, tmp_path / "a", batch_size=4, gradient_accumulation=2, max_steps=3, grad_clip=0.0)
        large = config(data, tmp_path / "b", batch_size=8, gradient_accumulation=1, max_steps=3, grad_clip=0.0)
        reports = []
        for each in (small, large):
            reporter = Recorder()
            train(each, reporter=reporter)
            reports.append([report.loss for report in reporter.steps])
        assert reports[0] == pytest.approx(reports[1], rel=1e-5)

    def test_the_seed_decides_everything(self, data, tmp_path):
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            train(config(data, tmp_path / name, seed=seed, max_steps=3, dropout=0.1))
        assert_same_tensors(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
        assert not torch.equal(tensors(tmp_path / "a")["model.wte.weight"], tensors(tmp_path / "c")["model.wte.weight"])

    def test_bfloat16_keeps_weights_in_float32(self, data, tmp_path):
        result = train(config(data, tmp_path, dtype="bfloat16", max_steps=40, learning_rate=1e-2))
        assert result.dtype == "bfloat16"
        assert result.best_loss < math.log(load_manifest(data).vocab_size) - 0.3
        floating = {t.dtype for name, t in tensors(tmp_path).items() if name.startswith(("model", "optimizer"))}
        assert floating == {torch.float32}

    def test_patience_stops_early(self, data, tmp_path):
        # A rate this small changes nothing that float32 could show as better for long.
        settings = config(data, tmp_path, learning_rate=1e-12, eval_interval=1, patience=2, max_steps=50)
        result = train(settings)
        assert result.reason == "patience"
        assert result.step == result.best_step + 2 < 50

    def test_max_minutes_stops_and_the_schedule_has_run_its_course(self, data, tmp_path, monkeypatch):
        ticks = itertools.count()  # a clock that no other process can hold up
        monkeypatch.setattr("fastlm.training.loop.time", SimpleNamespace(monotonic=lambda: 0.005 * next(ticks)))
        reporter = Recorder()
        settings = config(data, tmp_path, max_minutes=0.05, max_steps=10**6, min_lr_ratio=0.1, eval_tokens=20)
        result = train(settings, reporter=reporter)
        assert result.reason == "max_minutes"
        rates = [report.learning_rate for report in reporter.steps]
        assert max(rates) == rates[settings.warmup_steps] or max(rates) == rates[settings.warmup_steps - 1]
        assert rates[settings.warmup_steps :] == sorted(rates[settings.warmup_steps :], reverse=True)
        assert rates[-1] < 0.5 * settings.learning_rate

    def test_a_run_that_diverges_says_where_and_leaves_the_checkpoint(self, data, tmp_path):
        train(config(data, tmp_path, max_steps=5))
        before = (tmp_path / "last.safetensors").read_bytes()
        weights = load_checkpoint(tmp_path)
        weights.tensors["model.ln_f.weight"].fill_(math.nan)
        with pytest.raises(DivergenceError, match=r"for 3 steps in a row \(steps 6 to 8, last loss nan"):
            resume_with(weights, config(data, tmp_path, max_bad_steps=3))
        assert (tmp_path / "last.safetensors").read_bytes() == before

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_data_cut_short_is_refused_before_the_folder_is_made(self, data, tmp_path, split):
        copy = tmp_path / "copy"
        copy.mkdir()
        for path in data.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        (copy / f"{split}.bin").write_bytes((data / f"{split}.bin").read_bytes()[:-2])
        with pytest.raises(DataError, match=rf"{split}\.bin"):
            train(config(copy, tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    def test_a_corpus_shorter_than_a_window(self, data, tmp_path):
        count = load_manifest(data).splits["train"]["tokens"]
        with pytest.raises(DataError, match=rf"has {count} tokens, .* context_length = 65536 needs 65537"):
            train(config(data, tmp_path / "out", context_length=65536))

    def test_a_folder_with_a_checkpoint_is_not_overwritten_unasked(self, data, tmp_path):
        train(config(data, tmp_path, max_steps=2))
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        with pytest.raises(ConfigError, match="add --resume to continue it or --overwrite to start afresh"):
            train(config(data, tmp_path, max_steps=2, seed=5))
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
        assert train(config(data, tmp_path, max_steps=3, seed=5), overwrite=True).step == 3

    def test_a_second_interrupt_is_not_held_back(self, data, tmp_path):
        class Impatient(Recorder):
            def step(self, report):
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

        reporter = Impatient()
        # A process that a shell started in the background ignores SIGINT.
        inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                train(config(data, tmp_path), reporter=reporter)
            assert reporter.closed == 1
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        finally:
            signal.signal(signal.SIGINT, inherited)

    def test_an_interrupted_evaluation_is_made_up_for(self, data, tmp_path, whole_run):
        """The signal comes between step 8 and its evaluation, which the resumed run does first."""
        settings = config(data, tmp_path, dropout=0.2, gradient_accumulation=2)
        train(settings, reporter=Recorder(interrupt_after=8))
        assert not [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "validation"]
        reporter = Recorder()
        train(settings, resume=True, reporter=reporter)
        assert [step for step, _, _ in reporter.evaluations] == [8, 16, 20]


def resume_with(checkpoint, settings):
    """Resume from tensors that were changed in memory."""
    from fastlm.runtime import Interrupt
    from fastlm.training.loop import Trainer

    trainer = Trainer(settings, Recorder())
    trainer._resume(checkpoint)
    return trainer.run(Interrupt())


class TestReport:
    def test_plain_lines_where_there_is_no_terminal(self, data, tmp_path, capsys):
        train(config(data, tmp_path, max_steps=6), reporter=ConsoleReporter())
        lines = capsys.readouterr().out.splitlines()
        assert any(line.startswith("step 3/6  loss ") and line.endswith(" left") for line in lines)
        assert any(line.startswith("step 6: validation loss ") and "bits/character" in line for line in lines)
        assert not any("\x1b" in line for line in lines)

    def test_a_live_bar_on_a_terminal(self, data, tmp_path):
        import io

        from rich.console import Console

        stream = io.StringIO()
        console = Console(file=stream, force_terminal=True, width=120)
        train(config(data, tmp_path, max_steps=6), reporter=ConsoleReporter(console))
        assert "step 6/6  loss" in stream.getvalue()
        assert "tokens/s" in stream.getvalue()
        assert "\x1b[" in stream.getvalue()

    @pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (65, "1:05"), (3700, "1:01:40")])
    def test_clock(self, seconds, text):
        assert clock(seconds) == text
