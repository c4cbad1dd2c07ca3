"""The loop trains any model for any objective: other examples, and a number other than the loss that decides."""

import dataclasses
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from fastlm.data.loader import Fixed
from fastlm.errors import CheckpointError, ConfigError, DataError
from fastlm.formats.checkpoint import load_checkpoint
from fastlm.models import Phi3, Phi3Config
from fastlm.objectives import Batch, Evaluation, Objective
from fastlm.training import Task, TrainConfig, train
from fastlm.training.progress import Reporter

SETTINGS = {
    "batch_size": 4, "max_steps": 20, "eval_interval": 5, "warmup_steps": 0, "learning_rate": 0.2, "log_interval": 1,
    "device": "cpu", "threads": 1, "dtype": "float32", "schedule": "constant", "weight_decay": 0.0, "grad_clip": 0.0,
}  # fmt: skip


@dataclasses.dataclass
class Sizes:
    width: int

    def to_dict(self):
        return dataclasses.asdict(self)


class Line(nn.Module):
    """A logistic regression."""

    def __init__(self, width):
        super().__init__()
        self.config = Sizes(width)
        self.weight = nn.Parameter(torch.randn(width))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x @ self.weight + self.bias


@dataclasses.dataclass(frozen=True)
class Accuracy(Evaluation):
    accuracy: float


class Positive(Objective):
    """Is the sum positive; an example whose label is missing has no target. Inputs get noise of their position."""

    name = "positive"
    decides = "accuracy"
    higher_is_better = True
    units = "nats per row"

    def collate(self, examples, positions):
        noise = [np.random.default_rng((7, position)).normal(0, 0.01, 3) for position in positions]
        x = torch.from_numpy(np.stack([x for x, _ in examples]) + np.stack(noise)).float()
        y = torch.tensor([label for _, label in examples])
        return Batch({"x": x, "y": y}, int((y >= 0).sum()))

    def loss(self, model, batch):
        kept = batch["y"] >= 0
        return F.binary_cross_entropy_with_logits(model(batch["x"])[kept], batch["y"][kept].float())

    def score(self, model, batch):
        kept = batch["y"] >= 0
        right = ((model(batch["x"]) > 0) == (batch["y"] > 0))[kept].sum()
        return super().score(model, batch) | {"right": right.item()}

    def evaluation(self, totals, targets):
        return Accuracy(totals["loss"] / targets, totals["right"] / targets)


def examples(count, seed, unlabelled=0.3):
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, 3))
    missing = random.random(count) < unlabelled
    return [(row, -1 if gone else int(row.sum() > 0)) for row, gone in zip(x, missing, strict=True)]


def task(tmp_path, unlabelled=0.3, width=3):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")

    def made(config, device):
        train, held_out = examples(37, 0, unlabelled), examples(50, 1, 0.1)
        return Task(Line(width), Positive(), Fixed(train), held_out, "37 rows", 1, tokenizer, "none", {}, "rows")

    return made


class StopAfter(Reporter):
    def __init__(self, step):
        self.at = step

    def step(self, report):
        if report.step == self.at:
            signal.raise_signal(signal.SIGINT)


def run(tmp_path, name, reporter=None, resume=False, made=None, **changes):
    config = TrainConfig(**{**SETTINGS, "out": str(tmp_path / name), **changes})
    return train(config, reporter=reporter, resume=resume, task=made or task(tmp_path))


def test_it_learns_and_the_deciding_number_chooses_the_best(tmp_path):
    result = run(tmp_path, "run", max_steps=60)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    accuracies = [line["accuracy"] for line in lines if line["kind"] == "validation"]
    assert result.best == max(accuracies) > 0.9
    assert result.best_step == 5 * (1 + accuracies.index(max(accuracies)))
    assert result.evaluation.accuracy == accuracies[-1]
    assert result.parameters == 4


@pytest.mark.parametrize("stop", [1, 5, 12])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, stop):
    run(tmp_path, "whole", gradient_accumulation=3)
    run(tmp_path, "stopped", StopAfter(stop), gradient_accumulation=3)
    torch.manual_seed(99)
    run(tmp_path, "stopped", resume=True, gradient_accumulation=3)
    whole, stopped = (load_checkpoint(tmp_path / name / "last.safetensors").tensors for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_a_step_is_the_mean_over_its_targets_however_it_is_split(tmp_path):
    """Batches have different numbers of targets; in one batch or in three, the gradient and the loss are the same."""
    run(tmp_path, "one", batch_size=12, max_steps=3)
    run(tmp_path, "three", batch_size=4, gradient_accumulation=3, max_steps=3)
    one, three = (load_checkpoint(tmp_path / name / "last.safetensors").tensors for name in ("one", "three"))
    for name in ("model.weight", "model.bias"):
        torch.testing.assert_close(one[name], three[name], rtol=1e-5, atol=1e-6)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "three")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_number_below_zero_may_decide(tmp_path):
    class Negated(Positive):
        def evaluation(self, totals, targets):
            return Accuracy(totals["loss"] / targets, -totals["loss"] / targets)

    def negated(config, device):
        made = task(tmp_path)(config, device)
        made.objective = Negated()
        return made

    before = run(tmp_path, "run", made=negated, max_steps=10)
    after = run(tmp_path, "run", made=negated, resume=True)
    assert before.best < after.best < 0


def test_the_plot_names_the_units_of_the_loss(tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self) or save(self, *args, **kwargs)
    )
    run(tmp_path, "run", max_steps=5)
    (figure,) = drawn
    assert figure.axes[0].get_ylabel() == "loss (nats per row)"


def test_a_step_without_targets_is_refused(tmp_path):
    with pytest.raises(DataError, match="rows: step 1 has no target in 1 batches"):
        run(tmp_path, "run", made=task(tmp_path, unlabelled=1.0))


def test_held_out_examples_without_targets_are_refused(tmp_path):
    made = task(tmp_path)(None, None)
    made.held_out = [(np.zeros(3), -1)] * 5
    with pytest.raises(DataError, match="the held-out examples have no target"):
        run(tmp_path, "run", made=lambda *_: made)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": nn.Linear(3, 1)}, TypeError, r"model is a Linear without a config that has to_dict\(\)"),
        ({"objective": F.cross_entropy}, TypeError, "objective is a function, expected an Objective"),
        ({"examples": examples(9, 0)}, TypeError, r"examples is a list, expected e\.g\. Fixed\(sequence\)"),
        ({"examples": Fixed([])}, DataError, "rows: examples has no example, expected at least one"),
        ({"held_out": []}, DataError, "rows: held_out has no example, expected at least one"),
        ({"tokenizer": Path("nothing.json")}, DataError, "nothing.json: no such tokenizer"),
    ],
)
def test_what_a_run_would_stumble_over_is_said_first(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        run(tmp_path, "run", made=lambda *_: dataclasses.replace(task(tmp_path)(None, None), **changes))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_number_that_decides_and_is_not_there_is_named(tmp_path):
    class Typo(Positive):
        decides = "acuracy"

    with pytest.raises(ConfigError, match="objective positive: decides is 'acuracy', expected loss or accuracy"):
        run(tmp_path, "run", made=lambda *_: dataclasses.replace(task(tmp_path)(None, None), objective=Typo()))


def test_a_model_without_a_tokenizer_trains_and_resumes(tmp_path):
    def made(config, device):
        return dataclasses.replace(task(tmp_path)(config, device), tokenizer=None, fingerprint="")

    for name, stop in (("whole", 0), ("stopped", 7)):
        run(tmp_path, name, StopAfter(stop), made=made)
    run(tmp_path, "stopped", resume=True, made=made)
    whole, stopped = (load_checkpoint(tmp_path / name / "last.safetensors").tensors for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert not (tmp_path / "whole" / "tokenizer.json").exists()


def test_a_run_of_another_model_is_not_resumed(tmp_path):
    class Other(Line):
        pass

    def other(config, device):
        made = task(tmp_path)(config, device)
        made.model = Other(3)
        return made

    run(tmp_path, "run")
    with pytest.raises(CheckpointError, match="holds a Line, expected a Other"):
        run(tmp_path, "run", resume=True, made=other)
    with pytest.raises(CheckpointError, match="its model has width = 3, the configuration 4"):
        run(tmp_path, "run", resume=True, made=task(tmp_path, width=4))


def test_what_a_configuration_holds_in_tuples_may_be_resumed(tmp_path):
    factors = (1.0, 2.0)

    class NextToken(Objective):
        name = "next"

        def collate(self, examples, positions):
            tokens = torch.tensor(np.stack(examples))
            return Batch({"tokens": tokens}, tokens[:, 1:].numel())

        def loss(self, model, batch):
            return model(batch["tokens"][:, :-1], batch["tokens"][:, 1:])

    def phi3(dropout):
        def made(config, device):
            longrope = {"rope_scaling": "longrope", "rope_short_factors": factors, "rope_long_factors": factors}
            rates = {"dropout": dropout, "residual_dropout": dropout}
            model = Phi3(Phi3Config(20, 8, 1, 2, 8, 16, rope_original_context=4, **longrope, **rates))
            windows = list(np.random.default_rng(0).integers(0, 20, (9, 7)))
            made = task(tmp_path)(config, device)
            return dataclasses.replace(
                made, model=model, objective=NextToken(), examples=Fixed(windows), held_out=windows
            )

        return made

    run(tmp_path, "whole", made=phi3(0.1), max_steps=8)
    run(tmp_path, "stopped", StopAfter(3), made=phi3(0.1), max_steps=8)
    run(tmp_path, "stopped", resume=True, made=phi3(0.1), max_steps=8)
    whole, stopped = (load_checkpoint(tmp_path / name / "last.safetensors").tensors for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert run(tmp_path, "stopped", resume=True, made=phi3(0.2), max_steps=10).step == 10  # rates may change
    factors = (1.0, 3.0)
    with pytest.raises(CheckpointError, match=r"its model has rope_short_factors = \[1.0, 2.0\]"):
        run(tmp_path, "stopped", resume=True, made=phi3(0.1), max_steps=12)
