"""`fastlm.train`: one call from Python, and what it tells on the way."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastlm
from fastlm.errors import ConfigError
from fastlm.training import Reporter
from runs import SMALL, Listening, prepared, same_bits

EXAMPLE = Path(__file__).parents[2] / "examples" / "classify_reviews.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("api"))


def test_functions_are_told_what_happens(data, tmp_path):
    steps, evaluations, messages, other = [], [], [], Listening()
    result = fastlm.train(
        data, out=tmp_path / "run", objective="masked", masked={"probability": 0.3}, on_step=steps.append,
        on_evaluation=lambda *told: evaluations.append(told), on_message=messages.append, reporter=other, **SMALL,
    )  # fmt: skip
    assert [report.step for report in steps] == list(range(1, 9))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [report.loss for report in steps] == [line["loss"] for line in lines if line["kind"] == "train"]
    assert [step for step, _, _ in evaluations] == [4, 8]
    assert evaluations[0][2]
    assert evaluations[-1][1] == result.evaluation
    assert messages == other.messages
    assert "training tokens" in messages[0]
    assert "probability = 0.3" in (tmp_path / "run" / "config.toml").read_text()


def test_telling_changes_nothing_and_a_run_is_resumed(data, tmp_path):
    settings = SMALL | {"objective": "masked", "dropout": 0.1}
    fastlm.train(data, out=tmp_path / "whole", **settings)
    fastlm.train(
        data, out=tmp_path / "parts", on_step=lambda report: None, **settings | {"max_steps": 4, "decay_steps": 8}
    )
    fastlm.train(data, out=tmp_path / "parts", resume=True, **settings)
    assert same_bits(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(ConfigError, match="add --resume to continue it or --overwrite"):
        fastlm.train(data, out=tmp_path / "parts", **settings)


def test_a_reporter_is_closed_when_a_function_raises(data, tmp_path):
    class Closing(Reporter):
        closed = False

        def close(self):
            self.closed = True

    def fail(report):
        raise KeyError("mine")

    reporter = Closing()
    with pytest.raises(KeyError, match="mine"):
        fastlm.train(data, out=tmp_path / "run", objective="masked", on_step=fail, reporter=reporter, **SMALL)
    assert reporter.closed


def test_an_unknown_setting_is_named(data, tmp_path):
    with pytest.raises(ConfigError, match="unknown key 'max_step'; did you mean 'max_steps'"):
        fastlm.train(data, out=tmp_path / "run", max_step=3)


def test_the_name_is_there_without_what_training_needs():
    code = "import sys, fastlm; fastlm.train; sys.exit('tokenizers' in sys.modules or 'rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    done = subprocess.run([sys.executable, str(EXAMPLE), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a witty book is good" in done.stdout
