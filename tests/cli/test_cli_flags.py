"""Flags of every verb: several values add up however they are given, and `None` is a word like any other."""

import dataclasses
import importlib
import types
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

import pytest

pytest.importorskip("tyro")
import tyro

from fastlm.cli import VERBS, flags

DATACLASSES = [
    kind
    for verb in VERBS
    for kind in vars(importlib.import_module(f"fastlm.cli.{verb}")).values()
    if dataclasses.is_dataclass(kind) and kind.__module__ == f"fastlm.cli.{verb}"
]
REQUIRED = {"inputs": ["a.txt"], "out": ["--out", "o"], "model": ["m"], "before": ["a"], "after": ["b"],
            "readme": ["r"], "results": ["x"], "text": ["--text", "t"]}  # fmt: skip


def plain(hint):
    while get_origin(hint) is Annotated:
        hint = hint.__origin__
    return hint


def named(kind, wanted):
    """(dataclass, field, flag) of the fields whose type is wanted; positional ones have no flag."""
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, notes = hints[field.name], getattr(hints[field.name], "__metadata__", ())
        if wanted(plain(hint), notes) and field.default is not dataclasses.MISSING:
            name = next((note.name for note in notes if getattr(note, "name", None)), field.name)
            yield kind, field.name, "--" + name.replace("_", "-")


def is_several(hint, notes):
    return get_origin(hint) in (tuple, list) and "Positional" not in str(notes)


def is_commas(hint, notes):
    return hint is str and any((getattr(note, "metavar", None) or "").endswith(",...") for note in notes)


def is_optional_text(hint, notes):
    kinds = set(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else set()
    return kinds in ({str, type(None)}, {Path, type(None)})


def parsed(kind, *args):
    needed = [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
    required = [text for name in needed for text in REQUIRED[name]]
    options = {"config": (tyro.conf.PositionalRequiredArgs,)} if needed == ["model"] else {}
    return flags.parse(kind, "fastlm", [*required, *args], **options)


SEVERAL = [case for kind in DATACLASSES for case in named(kind, is_several)]
COMMAS = [case for kind in DATACLASSES for case in named(kind, is_commas)]
TEXTS = [case for kind in DATACLASSES for case in named(kind, is_optional_text)]


def ids(cases):
    return [f"{kind.__module__.rpartition('.')[2]} {flag}" for kind, _, flag in cases]


def test_the_flags_that_are_looked_at_are_those_there_are():
    assert {"prepare --glob"} <= set(ids(SEVERAL))
    assert {"verify --op", "verify --backend", "bench --dtype", "bench --pass", "bench --against"} <= set(ids(COMMAS))
    assert {"generate --prompt", "generate --prompt-file", "bench --json", "bench --csv"} <= set(ids(TEXTS))


@pytest.mark.parametrize(("kind", "name", "flag"), SEVERAL, ids=ids(SEVERAL))
@pytest.mark.parametrize(
    "args",
    [["F", "a", "F", "b", "F", "c"], ["F", "a", "b", "c"], ["F=a", "F=b", "F", "c"], ["F", "a", "b", "F=c"]],
    ids=" ".join,
)
def test_values_of_a_repeated_flag_add_up(kind, name, flag, args):
    number = get_args(plain(get_type_hints(kind, include_extras=True)[name]))[0] is int
    values = {"a": "1", "b": "2", "c": "3"} if number else {}
    given = [text.replace("F", flag, 1) if text[0] == "F" else text for text in args]
    given = [
        values.get(text, text) if "=" not in text else f"{flag}={values.get(text[-1], text[-1])}" for text in given
    ]
    assert list(getattr(parsed(kind, *given), name)) == ([1, 2, 3] if number else ["a", "b", "c"])


@pytest.mark.parametrize(("kind", "name", "flag"), COMMAS, ids=ids(COMMAS))
def test_lists_with_commas_of_a_repeated_flag_add_up(kind, name, flag):
    assert getattr(parsed(kind, flag, "a,b", f"{flag}=c", flag, "d"), name) == "a,b,c,d"
    assert getattr(parsed(kind, flag, "a,b"), name) == "a,b"


@pytest.mark.parametrize(("kind", "name", "flag"), TEXTS, ids=ids(TEXTS))
def test_none_is_a_word(kind, name, flag):
    assert str(getattr(parsed(kind, flag, "None"), name)) == "None"
    assert getattr(parsed(kind), name) is None


def test_what_stands_between_repeated_flags_stays_where_it_belongs():
    repeated = {"--glob": " ", "--op": ","}
    line = ["a", "--glob", "x", "--out", "o", "--glob=y", "b", "--op", "p", "c", "--op", "q", "--", "--glob", "z"]
    together = ["a", "--out", "o", "b", "c", "--glob", "x", "y", "--op", "p,q", "--", "--glob", "z"]
    assert flags.gather(line, repeated) == together
    once = ["a", "--glob", "x", "y", "--out", "o"]
    assert flags.gather(once, repeated) == once


def test_kinds_of_fields():
    @dataclasses.dataclass
    class Kinds:
        pair: tuple[int, int] = (1, 2)
        several_words: tuple[str, ...] = ()
        numbers: list[int] = dataclasses.field(default_factory=list)
        one: Literal["a", "b"] | None = None
        text: str | None = None

    assert flags.repeatable(Kinds) == {"--several-words": " ", "--numbers": " "}
    got = flags.parse(
        Kinds, "kinds", ["--numbers", "1", "--several_words", "a", "--numbers", "2", "--several-words", "b"]
    )
    assert (got.numbers, got.several_words) == ([1, 2], ("a", "b"))


def test_prepare_reads_the_files_of_every_glob(tmp_path, monkeypatch):
    from fastlm.cli import main
    from fastlm.data import load_manifest

    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.md", "c.rst", "d.log"):
        (tmp_path / "in" / name).write_text(f"text of {name}\n" * 50)
    args = ["prepare", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--tokenizer", "characters"]
    assert main([*args, "--glob", "*.txt", "--glob", "*.md", "--glob=*.rst"]) == 0
    names = sorted(Path(source["path"]).name for source in load_manifest(tmp_path / "out").sources)
    assert names == ["a.txt", "b.md", "c.rst"]


@pytest.mark.parametrize("verb", VERBS)
def test_errors_of_every_verb_with_flags_can_name_them(verb):
    """Which `main` finds by the name of the dataclass."""
    module = importlib.import_module(f"fastlm.cli.{verb}")
    its_own = {kind for kind in DATACLASSES if kind.__module__ == module.__name__}
    assert not its_own or its_own & {getattr(module, name, None) for name in ("Arguments", "Options")}
