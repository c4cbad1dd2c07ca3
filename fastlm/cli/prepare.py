"""`fastlm prepare`: text files to a tokenizer and memory-mapped token files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..data import Manifest, PrepareConfig, prepare
from ..data.scan import Progress as Report
from ..formats.tokenizer import tokenizer_of
from .flags import parse

_STAGES = {"scan": "reading", "tokenizer": "training the tokenizer", "tokens": "encoding"}


@dataclass
class Arguments(PrepareConfig):
    """Turn text files into a tokenizer and memory-mapped token files for training."""

    inputs: tyro.conf.Positional[tuple[Path, ...]]
    """Text files, or folders that are searched recursively."""


def main(argv: list[str]) -> int | None:
    """Run `fastlm prepare` with these arguments and print what was made."""
    config = parse(Arguments, "fastlm prepare", argv, config=(tyro.conf.FlagCreatePairsOff,))
    path = Path(config.tokenizer)
    existing = tokenizer_of(path) if path.suffix == ".gguf" and path.is_file() else None
    with _progress() as report:
        manifest = prepare(config, report, existing)
    _summarise(manifest, config.out)
    return 0


@contextmanager
def _progress() -> Iterator[Report]:
    """A bar for each stage on a terminal; nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<24}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
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
    yield f"validation: {'whole documents' if done['split'] == 'documents' else 'a span of each document'}"
    if done["files_skipped"]:
        skipped = done["files_skipped"]
        yield f"skipped {len(skipped)} files that do not decode, first {skipped[0]}"
    if done["duplicates_dropped"]:
        yield f"dropped {done['duplicates_dropped']} duplicate documents"
    if done["unknown_tokens"] or done["characters_lost"]:
        unknown, lost = done["unknown_tokens"], done["characters_lost"]
        yield f"{unknown} unknown tokens, {lost} characters that do not come back, first {done['first_lost']}"
    if done["forced_cuts"]:
        yield f"{done['forced_cuts']} cuts where tokens may differ from encoding the whole text"
