"""`fastlm prepare`: files of many formats to a tokenizer and memory-mapped token files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from ..data import Manifest, PrepareConfig, prepare
from ..data.clean import steps
from ..data.documents import WORKING, totals
from ..data.pipeline import recipes
from ..data.scan import Progress as Report
from ..errors import ConfigError, shown
from ..formats.tokenizer import tokenizer_of
from .flags import parse, value_of

_STAGES = {"documents": "cleaning", "scan": "reading", "tokenizer": "training the tokenizer", "tokens": "encoding"}


@dataclass
class Arguments(PrepareConfig):
    """Turn text, tables and crawls into a tokenizer and memory-mapped token files for training.

    Killed, it goes on where it was when it is run again. Memory: 300 MB, and for each worker 60 MB and a dozen times
    the longest document.
    """

    inputs: tyro.conf.Positional[tuple[Path, ...]]
    """Files, folders that are searched recursively, patterns such as 'dumps/*.jsonl.gz', or folders that the datasets
    library saved."""
    list_steps: bool = False
    """List the steps that a recipe may have, with their options, and end."""


def main(argv: list[str]) -> int | None:
    """Run `fastlm prepare` with these arguments and print what was made. Returns 0, or 130 after Ctrl-C."""
    if "--list-steps" in argv:  # alone: what is otherwise required is not
        return _list_steps()
    if value_of(argv, "--out") == "":  # as a path it would be the current folder
        raise ConfigError("out names no folder; give one to write to")
    config = parse(Arguments, "fastlm prepare", argv, config=(tyro.conf.FlagCreatePairsOff,))
    path = Path(config.tokenizer)
    existing = tokenizer_of(path) if path.suffix == ".gguf" and path.is_file() else None
    try:
        with _progress() as report:
            manifest = prepare(config, report, existing)
    except KeyboardInterrupt:
        if not (config.out / WORKING).is_dir():
            raise
        print("fastlm prepare: interrupted; the same command goes on from there", file=sys.stderr)
        return 130
    _summarise(manifest, config.out)
    return 0


def _list_steps() -> int:
    for info in steps():
        print(f"{info.name}: {info.summary}")
        for name, option in info.options.items():
            print(f"    {name} = {shown(option.default)}   {option.wanted}")
        if info.reasons:
            print(f"    drops: {', '.join(info.reasons)}")
    print("contamination: Drop documents that share text with evaluation files.")
    print("    files, text_column, ngram = 13, shortest = 8")
    print("module:function: A step of your own; the function gets the options and gives a step.")
    print(f"recipes that come along: {', '.join(recipes())}")
    return 0


@contextmanager
def _progress() -> Iterator[Report]:
    """A bar for each stage on a terminal; nothing elsewhere."""
    console = Console(stderr=True)
    text = TextColumn("{task.description:<24}")
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(text, *columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(_STAGES[stage], total=total)
            bars.update(tasks[stage], completed=done)

        yield report


def _summarise(manifest: Manifest, out: Path) -> None:
    table = Table(title=f"{out}: {len(manifest.sources)} files, {manifest.vocab_size} token ids, {manifest.dtype}")
    for column in ("split", "tokens", "documents", "bytes", "characters", "bytes/token"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, entry in manifest.splits.items():
        counts = [f"{entry[key]:,}" for key in ("tokens", "documents", "bytes", "chars")]
        table.add_row(split, *counts, f"{entry['bytes'] / max(entry['tokens'], 1):.3f}")
    console = Console(file=sys.stdout)
    console.print(table)
    for line in _remarks(manifest.preparation):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _remarks(done: dict) -> Iterator[str]:
    if "documents" in done:
        yield from _cleaned(done["documents"], totals(done))
    yield f"validation: {'whole documents' if done['split'] == 'documents' else 'a span of each document'}"
    if done["files_skipped"]:
        skipped = done["files_skipped"]
        yield f"skipped {len(skipped)} files that do not decode, first {skipped[0]}"
    if done["unknown_tokens"] or done["characters_lost"]:
        yield _losses(done)
    if done["forced_cuts"]:
        yield f"{done['forced_cuts']} cuts where tokens may differ from encoding the whole text"


def _losses(done: dict) -> str:
    lost = f"{done['unknown_tokens']} unknown tokens, {done['characters_lost']} characters that do not come back"
    if done["only_case_and_blanks"]:
        return f"{lost}: only case and blanks differ"
    if done["first_unknown"]:
        return f"{lost}; the first unknown is {done['first_unknown']}"
    return f"{lost}, first {done['first_lost']}"


def _cleaned(counts: dict, total: dict[str, int]) -> Iterator[str]:
    emptied = f", {total['emptied']:,} of repeated lines alone" if total["emptied"] else ""
    yield (
        f"documents: {total['read']:,} read, {total['dropped']:,} dropped by steps,"
        f" {total['duplicates']:,} dropped as duplicates{emptied}, {total['left']:,} left"
    )
    for step in counts["steps"]:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(step["dropped"].items()))
        if dropped or step["changed"]:
            yield f"  {step['name']}: {step['changed']:,} changed" + (f", dropped {dropped}" if dropped else "")
    for reason, count in counts["duplicates"].items():
        yield f"  {reason}: {count:,}"
    if counts["bad"]:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts["bad"].items()))
        yield f"could not read {kinds}; first {counts['bad_listed'][0]}"
