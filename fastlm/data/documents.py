"""The first stage of a `prepare` that is more than plain text: sources and steps to shards of documents."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from .._core.files import remove_leftovers, staging, still_at, try_lock
from ..errors import DataError
from .config import PrepareConfig
from .manifest import Manifest
from .pipeline.duplicates import Kept, find_duplicates
from .pipeline.local import LocalExecutor, cores
from .pipeline.recipe import Recipe, StepSpec
from .pipeline.shards import Shard
from .pipeline.stage import Executor, Job, make_shards
from .report import Report, StepReport
from .scan import Progress, ShardInput
from .sources import File

# Of the counts, what is for the report and not for the manifest.
REPORTED = ("kept_examples", "balance_read", "balance_cleaned")
SOURCES_LISTED = 1000
WORKING = "documents"  # the folder of shards, in the output folder


@dataclass
class Documents:
    """Cleaned documents in shards, and what was counted of them."""

    config: PrepareConfig
    recipe: Recipe
    shards: list[Shard]
    counts: dict[str, Any]
    sources: list[dict[str, Any]]
    documents: list[int]  # of each shard
    kept: Kept

    @property
    def inputs(self) -> list[ShardInput]:
        """The shards, for `Corpus`."""
        firsts = accumulate(self.documents, initial=0)
        return [ShardInput(shard.path, first, self.kept) for shard, first in zip(self.shards, firsts, strict=False)]

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        source = asdict(self.config.source_options())
        del source["chunk_bytes"]
        counts = {name: value for name, value in self.counts.items() if name not in REPORTED}
        counts["steps"] = [
            {name: value for name, value in step.items() if not name.endswith("_examples")} for step in counts["steps"]
        ]
        return {
            "recipe": self.recipe.name,
            "steps": self.recipe.to_json(),
            "duplicates": self.recipe.duplicates.to_json(),
            "source": source,
            "on_error": self.config.on_error,
            "documents": counts | {"duplicates": self.kept.counts},
        }

    def report(self, manifest: Manifest) -> Report:
        """For the page of the report."""
        counts = self.counts
        return {
            "title": self.config.out.name,
            "inputs": {
                "files": len(self.sources),
                "documents": counts["documents_read"],
                "bytes": counts["bytes_read"],
            },
            "totals": totals(manifest.preparation),
            "problem_count": sum(counts["bad"].values()),
            "problems": [{"message": line} for line in counts["bad_listed"]],
            "steps": [_step_report(spec, step) for spec, step in zip(self.recipe.steps, counts["steps"], strict=True)],
            "masked": counts["masked"],
            "duplicates": [{"kind": kind, "documents": count} for kind, count in self.kept.counts.items()],
            "splits": {
                name: {key: split[key] for key in ("documents", "tokens", "bytes", "chars")}  # type: ignore[misc]
                for name, split in manifest.splits.items()
            },
            "read": counts["balance_read"],
            "cleaned": counts["balance_cleaned"],
            "notes": [
                f"recipe: {self.recipe.name or 'none'}",
                f"tokenizer: {self.config.tokenizer}, {manifest.vocab_size} ids",
            ],
        }


def make_documents(
    config: PrepareConfig, recipe: Recipe, files: Sequence[File], folder: Path, progress: Progress
) -> Documents:
    """Clean the documents of all files into shards in `folder`.

    Raises:
        DataError: a row that cannot be read, unless `config.on_error` is skip, with file and row; nothing is left.
    """
    skip = config.on_error == "skip" or config.errors == "skip-file"
    keys = ("source", "language", "label") if len(files) <= SOURCES_LISTED else ("language", "label")
    job = Job(recipe.steps, config.source_options(), folder, skip, recipe.duplicates, keys)
    shards, counts, sources, documents = make_shards(
        job, files, _executor(config), lambda done, total: progress("documents", done, total)
    )
    if not counts["documents_cleaned"]:
        bad = f", {sum(counts['bad'].values())} rows could not be read" if counts["bad"] else ""
        raise DataError(f"no text in {len(files)} files: {counts['documents_read']} documents read, none kept{bad}")
    kept = find_duplicates(recipe.duplicates, shards, documents, config.duplicate_pairs)
    return Documents(config, recipe, shards, counts, sources, documents, kept)


def totals(preparation: dict[str, Any]) -> dict[str, int]:
    """Where the documents went, of a manifest's preparation: "read" is the sum of all others.

    "dropped" are those that steps dropped or left empty, "duplicates" those dropped for another, "emptied" those of
    repeated lines alone, and "left" those with tokens.
    """
    counts, left = preparation["documents"], preparation["documents_left"]
    read, cleaned = counts["documents_read"], counts["documents_cleaned"]
    duplicates = preparation["duplicates_dropped"]
    emptied = cleaned - duplicates - left
    return {"read": read, "dropped": read - cleaned, "duplicates": duplicates, "emptied": emptied, "left": left}


def _step_report(spec: StepSpec, counts: dict[str, Any]) -> StepReport:
    dropped = [
        {"source": source, "row": row, "reason": reason, "before": before}
        for reason, examples in sorted(counts["dropped_examples"].items())
        for _, source, row, before, _ in examples
    ]
    changed = [
        {"source": source, "row": row, "before": before, "after": after}
        for _, source, row, before, after in counts["changed_examples"]
    ]
    step = {name: counts[name] for name in ("name", "documents", "changed", "dropped", "bytes_in", "bytes_out")}
    return {**step, "options": spec.options, "examples": [*dropped, *changed]}  # type: ignore[typeddict-item]


@contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Hold a folder, made if need be, against every other `prepare`; one that was made is gone after a failure.

    The lock is the system's, on the folder itself: a killed process leaves none. Where the file system knows no locks
    there is none.

    Raises:
        DataError: another process holds it.
    """
    descriptor, lock, created = _open_folder(folder)
    try:
        if lock is False:
            raise DataError(f"{folder}: another process prepares documents there")
        try:
            yield
        except BaseException:
            if created:
                with suppress(OSError):  # something to go on from is in it
                    folder.rmdir()
            raise
    finally:
        os.close(descriptor)


def _open_folder(folder: Path) -> tuple[int, bool | None, bool]:
    """A folder's descriptor, what `try_lock` says of it, and whether the folder was made."""
    while True:
        created = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another process made it, failed, and has just removed it
            continue
        lock = try_lock(descriptor)
        if lock is False or still_at(descriptor, folder):
            return descriptor, lock, created
        os.close(descriptor)


@contextmanager
def working_folder(folder: Path, keep: bool) -> Iterator[Path]:
    """The folder of shards; gone afterwards, unless a failure ends it."""
    remove_leftovers(folder.parent, folder.name)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except BaseException:
        with suppress(OSError):  # something to go on from is in it
            folder.rmdir()
        raise
    if not keep:
        with staging(folder) as temporary:  # gone at once: one that is killed here leaves nothing to go on from
            os.replace(folder, temporary / folder.name)


def _executor(config: PrepareConfig) -> Executor:
    if config.executor == "ray":
        from .pipeline.distributed import RayExecutor

        return RayExecutor(config.ray_address)
    return LocalExecutor(config.workers or cores())
