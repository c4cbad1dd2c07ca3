"""`fastlm bench prepare`: the data pipeline beside its peers, on the same bytes, all in turns in one run.

    tokens     text to tokens on the disk, with one existing tokenizer: datasets, and tokenizers with numpy
    documents  filter, exact and near deduplication of JSON lines: datatrove's local pipeline
    memory     the peak of `fastlm prepare` with a recipe that cleans and drops near duplicates, by size of the corpus

Each runs in processes of its own, and is timed from the first byte read to the last one written, without imports, but
in `memory`, which is the whole command. Peers that are not there are named and left out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from . import deduplicate, prepare_tokens
from .harness import Timing
from .prepare_watch import CommandError, Measured, measured
from .results import Results, Row

PARTS = ("tokens", "documents", "memory")
PEERS = {"tokens": ("datasets", "tokenizers"), "documents": ("datatrove",)}
ALL_PEERS = tuple(peer for peers in PEERS.values() for peer in peers)
STEPS = ("web", "html_page")  # the recipe of `memory`, and its step that plain text has no use for


@dataclass
class Plan:
    """What to measure.

    Attributes:
        text: files of real text that the corpora are made of.
        megabytes: of the corpora of `tokens` and `documents`.
        memory_megabytes: of the corpora of `memory`, one after the other.
        pythons: the interpreter of each peer that is not to run under this one.
        tokenizer: a tokenizer.json; None to train one on the start of the text.
        work: where the corpora and what becomes of them are written; a dozen times the largest one.
    """

    text: Sequence[Path]
    megabytes: int
    memory_megabytes: Sequence[int]
    rounds: int
    workers: int
    parts: Sequence[str] = PARTS
    peers: Sequence[str] = ALL_PEERS
    pythons: Mapping[str, str] = field(default_factory=dict)
    tokenizer: Path | None = None
    work: Path | None = None


@dataclass
class _Provider:
    """Who takes part: its command up to what it works on, or why it cannot."""

    name: str
    label: str
    command: list[str]
    reason: str = ""


def run(plan: Plan, results: Results, note: Callable[[str], None] = lambda line: None) -> None:
    """Measure, and append a row for each provider of each part; of memory, for each size.

    Raises:
        DataError: if the text files hold no text.
    """
    with tempfile.TemporaryDirectory(prefix="fastlm-bench-", dir=plan.work) as folder:
        parts = {"tokens": _tokens, "documents": _documents, "memory": _memory}
        for part in PARTS:
            if part in plan.parts:
                parts[part](plan, results, Path(folder), note)


def _tokens(plan: Plan, results: Results, folder: Path, note: Callable[[str], None]) -> None:
    text, tokenizer = folder / "text.txt", plan.tokenizer or folder / "tokenizer.json"
    note(f"writing {plan.megabytes} MB of text")
    documents = prepare_tokens.write_text(plan.text, text, plan.megabytes * 10**6)
    if plan.tokenizer is None:
        note("training a tokenizer")
        prepare_tokens.make_tokenizer(text, tokenizer)
    peers = str(Path(__file__).with_name("prepare_peers.py"))
    providers = [_ours([sys.executable, "-m", "fastlm.benchmarks.prepare_tokens"])]
    providers += [_peer(plan, name, ["-I", peers, name]) for name in PEERS["tokens"] if name in plan.peers]
    arguments = [str(text), str(tokenizer), str(folder / "work"), str(plan.workers)]
    told: dict[str, dict[str, Any]] = {}

    rows = _in_turns(plan, "tokens", providers, arguments, folder / "work", told.__setitem__, note)
    size = text.stat().st_size
    text.unlink()
    for row in rows:
        row.bytes = size
        if found := told.get(row.provider):
            row.work |= {key: found[key] for key in ("tokens", "documents")}
    check_tokens(rows, documents)
    results.rows += rows


def check_tokens(rows: Sequence[Row], documents: int) -> None:
    """Take the time from each row whose tokens or documents are not those that were to come out.

    That is what `tokenizers` finds document by document, or, where it did not run, what the first of `rows` finds.
    """
    timed = sorted((row for row in rows if row.status == "ok"), key=lambda row: row.provider != "tokenizers")
    for row in timed:
        wanted = {"tokens": timed[0].work["tokens"], "documents": documents}
        wrong = [f"{row.work[key]:,} {key}, not {count:,}" for key, count in wanted.items() if row.work[key] != count]
        if wrong:
            row.status, row.reason = "wrong", ", ".join(wrong)
            row.median = row.p10 = row.p90 = None


def _documents(plan: Plan, results: Results, folder: Path, note: Callable[[str], None]) -> None:
    source, work = folder / "documents", folder / "work"
    note(f"writing {plan.megabytes} MB of documents")
    truth = deduplicate.write_corpus(plan.text, source, plan.megabytes * 10**6)
    settings = ["--filter", deduplicate.FILTER, "--workers", str(plan.workers), "--run", str(source), str(work)]
    theirs = str(Path(__file__).with_name("datatrove_pipeline.py"))
    providers = [_ours([sys.executable, "-m", "fastlm.benchmarks.deduplicate"])]
    providers += [_peer(plan, name, ["-I", theirs]) for name in PEERS["documents"] if name in plan.peers]
    scores: dict[str, dict[str, float]] = {}

    def finish(name: str, found: dict[str, Any]) -> None:
        scores[name] = deduplicate.score(work / "out", truth, work / "clean")

    rows = _in_turns(plan, "documents", providers, settings, work, finish, note)
    size = sum(file.stat().st_size for file in source.iterdir())
    shutil.rmtree(source)
    for row in rows:
        row.bytes = size
        if row.provider in scores:
            row.work |= {"documents": truth["documents"]} | scores[row.provider]
    results.rows += rows


def _memory(plan: Plan, results: Results, folder: Path, note: Callable[[str], None]) -> None:
    recipe, left_out = STEPS
    tokenizer = plan.tokenizer or folder / "tokenizer.json"
    if not tokenizer.exists():
        prepare_tokens.write_text(plan.text, folder / "text.txt", 8 << 20)
        prepare_tokens.make_tokenizer(folder / "text.txt", tokenizer)
    for megabytes in plan.memory_megabytes:
        source, out = folder / "documents", folder / "out"
        note(f"fastlm prepare on {megabytes} MB of documents")
        deduplicate.write_corpus(plan.text, source, megabytes * 10**6)
        command = [sys.executable, "-m", "fastlm.cli", "prepare", str(source), "--glob", "*.jsonl", "--out", str(out)]
        command += ["--recipe", recipe, "--without", left_out, "--workers", str(plan.workers)]
        row = _row(plan, "memory", _ours([]), f"{megabytes} MB")
        row.bytes = sum(file.stat().st_size for file in source.iterdir())
        try:
            found = measured([*command, "--tokenizer", str(tokenizer)], _environment(plan))
            _fill(row, [(found.seconds, found)])
            row.work |= {"tokens": json.loads((out / "manifest.json").read_text())["splits"]["train"]["tokens"]}
        except CommandError as error:
            row.status, row.reason = "failed", str(error)
        results.rows.append(row)
        for place in (source, out):
            shutil.rmtree(place, ignore_errors=True)


def _in_turns(
    plan: Plan,
    part: str,
    providers: Sequence[_Provider],
    arguments: Sequence[str],
    work: Path,
    finish: Callable[[str, dict[str, Any]], None],
    note: Callable[[str], None],
) -> list[Row]:
    """Rows of all providers, each round of one after that of the other.

    Args:
        arguments: what every command gets.
        work: the folder that each writes to, made by it and removed after it.
        finish: hears what each round told, while its folder is there.
    """
    rows = {provider.name: _row(plan, part, provider, f"{plan.megabytes} MB") for provider in providers}
    samples: dict[str, list[tuple[float, Measured]]] = {provider.name: [] for provider in providers}
    for number in range(plan.rounds):
        for provider in providers:
            row = rows[provider.name]
            if row.status != "ok":
                continue
            note(f"{part}, round {number + 1} of {plan.rounds}: {provider.name}")
            try:
                found = measured([*provider.command, *arguments], _environment(plan))
                told = json.loads(found.output.splitlines()[-1])
                samples[provider.name].append((told["seconds"], found))
                note(f"    {told['seconds']:.1f} s")
                finish(provider.name, told)
            except CommandError as error:
                row.status, row.reason = "failed", str(error).replace(f"{work.parent}/", "")
            finally:
                shutil.rmtree(work, ignore_errors=True)
    for name, row in rows.items():
        if row.status == "ok":
            _fill(row, samples[name])
    return list(rows.values())


def _row(plan: Plan, part: str, provider: _Provider, shape: str) -> Row:
    status = "unsupported" if provider.reason else "ok"
    label, reason = provider.label, provider.reason
    return Row("prepare", part, "", "", shape, provider.name, label, status, reason, threads=plan.workers)


def _fill(row: Row, samples: Sequence[tuple[float, Measured]]) -> None:
    timing = Timing(tuple(seconds for seconds, _ in samples))
    row.rounds, row.median = len(samples), timing.median
    row.p10, row.p90 = timing.quantile(0.1), timing.quantile(0.9)
    row.peak_bytes = int(median(found.peak_bytes for _, found in samples))
    row.work["cpu_seconds"] = round(median(found.cpu_seconds for _, found in samples), 2)


def _environment(plan: Plan) -> dict[str, str]:
    return dict(os.environ) | {"RAYON_NUM_THREADS": str(plan.workers), "HF_DATASETS_OFFLINE": "1"}


def _ours(command: list[str]) -> _Provider:
    return _Provider("fastlm", "fastlm", command)


def _peer(plan: Plan, name: str, command: list[str]) -> _Provider:
    """A peer, if its interpreter has it."""
    python = plan.pythons.get(name) or sys.executable
    look = f"import {name}; from importlib.metadata import version; print(version({name!r}))"
    try:
        said = subprocess.run([python, "-I", "-c", look], capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        return _Provider(name, name, [], f"its interpreter: {getattr(error, 'strerror', None) or 'no answer'}")
    if said.returncode:
        why = (said.stderr.strip().splitlines() or [f"status {said.returncode}"])[-1]
        hint = "" if name in plan.pythons else f"; --{name}-python names an interpreter that has it"
        return _Provider(name, name, [], why + (hint if name != "tokenizers" else ""))
    return _Provider(name, f"{name} {said.stdout.strip()}", [python, *command])
