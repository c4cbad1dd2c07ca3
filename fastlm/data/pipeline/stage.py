"""The stage of documents: every unit of a corpus through the steps into its shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..._core.files import remove_leftovers
from ...errors import DataError
from ..document import Document, Dropped, Step
from ..files import sha256_file
from ..sources import Bad, File, SourceOptions, Unit, cut, read_file
from ..sources.base import is_missing
from .duplicates import NO_DUPLICATES, Duplicates
from .recipe import StepSpec
from .shards import Shard, shards
from .tally import Tally, merged

VERSION = 2  # of what shards hold
PERSONAL = "personal_data"


@dataclass(frozen=True)
class Job:
    """What every worker needs to know beside its unit.

    Args:
        folder: where the shards go; all workers must see it.
        skip: whether rows that cannot be read are counted and left out, instead of ending all.
        duplicates: what shards must hold signatures for.
        balance: what documents are counted by, see `Balance`.
    """

    steps: tuple[StepSpec, ...]
    source: SourceOptions
    folder: Path
    skip: bool = False
    duplicates: Duplicates = NO_DUPLICATES
    balance: tuple[str, ...] = ("language", "label")

    def key(self, unit: Unit) -> str:
        """Equal where the unit's shard would be equal."""
        source = asdict(self.source) | {"chunk_bytes": 0}
        steps = [(step.name, step.options) for step in self.steps]
        about = (VERSION, steps, source, self.skip, self.duplicates.key(), self.balance, unit.identity)
        return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def run_unit(job: Job, unit: Unit) -> dict[str, Any]:
    """Make a unit's shard; returns what was counted.

    Raises:
        DataError: a row that cannot be read, unless those are skipped, as those where a step fails; or a step that
            returns neither a document nor `Dropped`.
        OSError: a file cannot be read or written, with its name.
    """
    steps = _made(json.dumps(job.steps, sort_keys=True, default=str), job)
    tally = Tally([step.name for step in job.steps], job.balance, _mask(job, steps))
    shard = Shard(Path(job.folder), unit.number)
    kept = _through(steps, _rows(unit, job), tally, job)
    ends = [
        {"path": str(file.path), "bytes": file.path.stat().st_size, "sha256": sha256_file(file.path)}
        for file in unit.ends
    ]

    def finish() -> dict[str, Any]:
        job.duplicates.sign(shard)
        return {"key": job.key(unit), "unit": unit.number, "size": unit.size, "sources": ends, "tally": tally.report()}

    return shard.write(kept, finish)


_steps: dict[str, list[Step]] = {}


def _made(key: str, job: Job) -> list[Step]:
    if key not in _steps:
        _steps.clear()
        _steps[key] = [step.make() for step in job.steps]
    return _steps[key]


def _mask(job: Job, steps: Sequence[Step]) -> Callable[[str], str] | None:
    """What takes out of an example, of any step, the personal data that the recipe takes out of documents."""
    masks = [step for spec, step in zip(job.steps, steps, strict=True) if spec.name == PERSONAL]
    if not masks:
        return None

    def mask(text: str) -> str:
        for step in masks:
            found = step(Document(text, "", 0))
            text = "" if isinstance(found, Dropped) else found.text
        return text

    return mask


_CURES = {
    "too long": "raise --max-document-bytes, or ",
    "undecodable": "give the file's --encoding or --errors replace, or ",
}


def _cures(found: Bad, options: SourceOptions) -> str:
    """What to do about a row that cannot be read, in the flags of the command."""
    cure, left_out = _CURES.get(found.kind, ""), "such rows"
    if found.kind == "no column":
        columns = {
            "--text-column": (options.text_column,),
            "--meta-columns": options.meta_columns,
            "--id-column": (options.id_column,),
        }
        flags = [flag for flag, names in columns.items() if any(is_missing(found, name) for name in names)]
        cure = f"name what is there with {' or '.join(flags)}, or "
    if found.row == 0:
        left_out = "such files"
    elif found.kind in ("truncated", "damaged"):
        left_out = "what is lost of such files"
    return f"{cure}give --on-error skip to leave {left_out} out"


def _rows(unit: Unit, job: Job) -> Iterator[Document | Bad]:
    yield from unit.rows
    for span in unit.spans:
        yield from read_file(span.file, job.source, None, span.start, span.stop, span.first_row)


def _through(steps: Sequence[Step], rows: Iterable[Document | Bad], tally: Tally, job: Job) -> Iterator[Document]:
    for row in rows:
        found = row if isinstance(row, Bad) else _cleaned(steps, row, tally)
        if isinstance(found, Bad):
            if not job.skip:
                raise DataError(f"{found}; {_cures(found, job.source)}")
            tally.add_bad(found)
        elif found is not None:
            tally.add_kept(found)
            yield found


def _cleaned(steps: Sequence[Step], found: Document, tally: Tally) -> Document | Bad | None:
    tally.add_read(found)
    for step, counts in zip(steps, tally.steps, strict=True):
        try:
            result = step(found)
        except DataError:
            raise
        except (Exception, SystemExit) as error:
            reason = f"step {counts.name} failed: {type(error).__name__}: {' '.join(str(error).split())}"
            return Bad(found.source, found.row, "step failed", reason)
        if isinstance(result, Dropped):
            counts.add_dropped(found, result.reason)
            return None
        if not isinstance(result, Document) or not isinstance(result.text, str):  # wrong for all, so never skipped
            raise DataError(f"{found.source}: row {found.row}: step {counts.name} returned {_kind(result)}")
        counts.add(found, result)
        found = result
    if not found.text or found.text.isspace():
        tally.empty += 1
        return None
    return found


def _kind(result: object) -> str:
    if isinstance(result, Document):
        return f"a Document whose text is {type(result.text).__name__}, expected str"
    return f"{type(result).__name__}, expected Document or Dropped"


Executor = Callable[[Job, "Iterator[Unit]", "Callable[[Unit, dict[str, Any]], None]"], None]


def make_shards(
    job: Job, files: Sequence[File], run: Executor, progress: Callable[[int, int], None]
) -> tuple[list[Shard], dict[str, Any], list[dict[str, Any]], list[int]]:
    """Make the shards of a corpus, those that are there already left as they are.

    Args:
        run: an executor: calls `run_unit(job, unit)` for each unit of an iterator, wherever it likes and in any order,
            and then a function with the unit and the result.
        progress: called with the files' bytes that are done and all of them.

    Returns:
        The shards in order; what was counted in all; path, bytes and sha256 of each file; the documents of each shard.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(job.folder)
    total = sum(file.path.stat().st_size for file in files)
    records: dict[int, dict[str, Any]] = {}
    finished = 0

    def note(unit: Unit, record: dict[str, Any]) -> None:
        nonlocal finished
        records[unit.number] = record
        finished += unit.size
        progress(min(finished, total), total)

    def left() -> Iterator[Unit]:
        for unit in cut(files, job.source):
            record = Shard(job.folder, unit.number).load(job.key(unit))
            if record is None:
                yield unit
            else:
                note(unit, record)

    progress(0, total)
    run(job, left(), note)
    for shard in shards(job.folder):
        if shard.number not in records:  # of an earlier, longer corpus
            shard.remove()
    ordered = [records[number] for number in sorted(records)]
    sources = [source for record in ordered for source in record["sources"]]
    counted = merged(record["tally"] for record in ordered)
    _check_meta(counted, job.source)
    counts = [record["tally"]["documents_cleaned"] for record in ordered]
    return [Shard(job.folder, number) for number in sorted(records)], counted, sources, counts


def _check_meta(counted: dict[str, Any], options: SourceOptions) -> None:
    for column in options.meta_columns:
        if counted.get("documents_read") and counted["missing_meta"].get(column) == counted["documents_read"]:
            raise DataError(f"meta_columns is {column!r}, a column that no row has a value in")
