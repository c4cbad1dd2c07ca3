"""Every objective has all that one should have, and its settings come from its own file alone."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest

from fastlm.cli.spelling import spelled
from fastlm.cli.train import Arguments
from fastlm.errors import ConfigError, ConfigFileError
from fastlm.objectives.common.models import MODELS
from fastlm.objectives.masked import MaskedSettings
from fastlm.objectives.registry import SEAM, Registered, Settings, objectives
from fastlm.training import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
GUIDE = "docs/guides/objectives.md"


def undocumented(settings: type[Settings]) -> list[str]:
    """Fields without a comment behind them, which `--help` would show."""
    lines = inspect.getsource(settings).splitlines()
    return [
        field.name
        for field in dataclasses.fields(settings)
        if not any(line.strip().startswith(f"{field.name}:") and "  # " in line for line in lines)
    ]


def lacking(each: Registered) -> list[str]:
    """What an objective has not, in words."""
    stem = each.task.__module__.rpartition(".")[2]
    found = [] if (ROOT / f"tests/objectives/test_{stem}.py").exists() else [f"no tests/objectives/test_{stem}.py"]
    if f"`--objective {each.name}`" not in (ROOT / GUIDE).read_text(encoding="utf-8"):
        found.append(f"no place in {GUIDE}: `--objective {each.name}`")
    found += [f"setting {name} has no comment" for name in undocumented(each.settings)]
    if not each.settings.__doc__:
        found.append("its settings have no docstring")
    found += [f"no model is called {name}" for name in each.models if name not in MODELS]
    return found if each.models else [*found, "no model"]


@pytest.mark.parametrize("name", objectives())
def test_an_objective_lacks_nothing(name):
    assert not (found := lacking(objectives()[name])), "\n".join([f"{name}:", *found])


def test_every_file_registers_one():
    files = {path.stem for path in (ROOT / "fastlm/objectives").glob("[!_]*.py")} - set(SEAM)
    assert files == {each.task.__module__.rpartition(".")[2] for each in objectives().values()}


def test_what_is_missing_is_said():
    @dataclasses.dataclass(frozen=True)
    class Bare(Settings):
        rate: float = 0.5

    other = Registered("other", "nothing", ("hal",), Bare, test_what_is_missing_is_said, False)
    assert len(lacking(dataclasses.replace(other, models=()))) == 4
    assert lacking(other)[-1] == "no model is called hal"


def test_no_list_elsewhere_names_objectives():
    """A table of several of them would have to be kept in step."""
    names = set(objectives()) - {"causal"}
    for path in [*(ROOT / "fastlm/training").glob("*.py"), *(ROOT / "fastlm/cli").glob("*.py")]:
        if path.name in ("finetune.py", "prepare.py"):  # whose default is one; whose special tokens have these names
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not names & texts, path.name


def test_settings_of_an_objective_are_a_table(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('objective = "masked"\nmax_steps = 3\n[masked]\nprobability = 0.3\nwhole_word = "pretokens"\n')
    config = TrainConfig.load(file)
    assert config.options == MaskedSettings(probability=0.3, whole_word="pretokens")
    config.save(tmp_path / "again.toml")
    assert TrainConfig.load(tmp_path / "again.toml") == config
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_a_file_of_an_earlier_version_loads(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text('data = "corpus"\nn_layer = 2\nkeep_freed_memory = false\n')
    assert TrainConfig.load(file) == TrainConfig(data="corpus", n_layer=2, keep_freed_memory=False)
    assert "[causal]" not in TrainConfig().to_toml()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective": "maskd"}, "objective is 'maskd', expected one of .*; did you mean 'masked'"),
        ({"objective": 3}, r"objective is 3 \(int\), expected str"),
        ({"model": "brt"}, "model is 'brt', expected one of gpt, bert, .*; did you mean 'bert'"),
        ({"masked": {"probability": 0.2}}, "there are settings of masked, but objective is 'causal'"),
        ({"objective": "masked", "masked": 3}, r"masked is 3 \(int\), expected a table of settings"),
        ({"objective": "masked", "masked": {"probabilty": 1}}, "unknown key 'masked.probabilty'; did you mean 'prob"),
        ({"objective": "masked", "masked": {"probability": 2}}, "masked.probability is 2.0, expected above 0 and at"),
        ({"objective": "masked", "masked": {"probability": "a"}}, r"masked.probability is 'a' \(str\), expected float"),
        ({"objective": "masked", "masked": {"random": 0.3}}, "masked.random is 0.3, expected from 0 to 0.2"),
        ({"objective": "masked", "masked": {"whole_word": "x"}}, "masked.whole_word is 'x', expected one of none, pre"),
        ({"objective": "masked", "masked": {"mask": float("nan")}}, "masked.mask is nan, expected a finite number"),
    ],
)
def test_wrong_settings_are_named(values, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(values)


def test_a_setting_of_an_objective_is_spelled_as_its_flag():
    text = "masked.whole_word is 'x', and masked.probability is 2, expected n_layer"
    assert spelled(text, Arguments) == "--masked.whole-word is 'x', and --masked.probability is 2, expected --n-layer"


def test_a_wrong_table_names_the_file(tmp_path):
    (tmp_path / "a.toml").write_text('objective = "masked"\n[masked]\nmask = 7\n')
    with pytest.raises(ConfigFileError, match=r"a.toml: masked.mask is 7.0"):
        TrainConfig.load(tmp_path / "a.toml")
