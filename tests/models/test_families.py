"""Every model family has all that one should have: what tests go over all models by a table has each of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fastlm.models
from fastlm.formats.hf.architectures import ARCHITECTURES
from fastlm.models import CausalLM, Llama

ROOT = Path(__file__).resolve().parents[2]
TABLES = (  # which name each model's configuration
    "tests/_core/test_modes.py",
    "tests/formats/test_fuzz_models.py",
    "tests/formats/test_load_save.py",
    "tests/models/test_forced_models.py",
)
CAUSAL_TABLES = ("tests/compression/test_quantize.py",)
FOLDERS = "tests/formats/test_untied_folders.py"  # makes transformers' model of each family
KINDS = {a.model: a.config for a in ARCHITECTURES}


def words(table: str) -> set[str]:
    """The names that a file uses and the texts in it, but for what it imports."""
    nodes = list(ast.walk(ast.parse((ROOT / table).read_text(encoding="utf-8"))))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {node.id for node in nodes if isinstance(node, ast.Name)} | texts


def lacking(model: type, config: type) -> list[str]:
    """What a model has not, in words."""
    names = (model.__name__, config.__name__)
    found = [f"fastlm/models/__init__.py does not export {name}" for name in names if name not in fastlm.models.__all__]
    stem = model.__module__.rpartition(".")[2]
    if not (ROOT / f"tests/models/test_{stem}.py").exists():
        found.append(f"no tests of its own: no tests/models/test_{stem}.py")
    for table in TABLES + (CAUSAL_TABLES if issubclass(model, CausalLM) else ()):
        if config.__name__ not in words(table):
            found.append(f"no line in the table of {table}")
    if not any(word.startswith(config.families) for word in words(FOLDERS)):
        found.append(f"no line in the table of {FOLDERS}")
    if f"`{model.__name__}`:" not in (ROOT / "README.md").read_text(encoding="utf-8"):
        found.append("no place in the README's table of models")
    return found


@pytest.mark.parametrize("model", KINDS, ids=lambda model: model.__name__)
def test_a_model_lacks_nothing(model):
    assert not (found := lacking(model, KINDS[model])), "\n".join([f"{model.__name__}:", *found])


def test_every_file_of_models_has_a_family():
    files = {path.stem for path in (ROOT / "fastlm/models").glob("[!_]*.py")}
    assert files == {model.__module__.rpartition(".")[2] for model in KINDS}


def test_a_family_is_one_that_its_configuration_names():
    assert [a.family for a in ARCHITECTURES if a.family not in a.config.families] == []
    assert {a.family for a in ARCHITECTURES} == {family for config in KINDS.values() for family in config.families}


def test_what_is_missing_is_said():
    class Other(Llama):
        pass

    class OtherConfig(KINDS[Llama]):
        families = ("other",)

    Other.__module__ = "fastlm.models.other"
    found = lacking(Other, OtherConfig)
    assert len(found) == len({*found}) == 2 + 1 + len(TABLES) + len(CAUSAL_TABLES) + 1 + 1
    assert all(any(path in line for line in found) for path in (*TABLES, *CAUSAL_TABLES, FOLDERS, "README"))
