"""Text files to memory-mapped token files, in three bounded passes: scan, tokenizer, tokens."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np

from .._core.files import naming, staging, sync, was_interrupted
from ..errors import DataError
from .config import TRAINED_KINDS, PrepareConfig
from .documents import WORKING, Documents, held_folder, make_documents, working_folder
from .losses import Losses, Piece
from .manifest import SPLITS, Manifest
from .pieces import PieceCutter
from .pipeline.duplicates import NO_DUPLICATES
from .report import write_report
from .scan import Corpus, Progress, ShardInput, TextInput
from .sources import find
from .tokenizer import Tokenizer

FILES = ("train.bin", "val.bin", "tokenizer.json", "manifest.json")
BATCH_CHARS = 1 << 19  # of one byte each, encoded at once, so that every thread has pieces to work on
PIECE_COST = 256  # as many characters does a piece count for beside its own: one of a letter takes 1 KB until written
WRITE_TOKENS = 1 << 16
# What the manifest says of every preparation; one of documents has its sources and steps beside.
OPTIONS = (
    "allow_lossy", "deduplicate", "document_separator", "encoding", "errors", "line_endings", "normalize", "seed",
    "special", "split", "tokenizer", "val_fraction", "vocab_size",
)  # fmt: skip


def prepare(
    config: PrepareConfig,
    progress: Progress = lambda stage, done, total: None,
    tokenizer: Tokenizer | None = None,
) -> Manifest:
    """Turn files into a tokenizer and memory-mapped token files.

    Plain text is read in chunks, whatever its size. Where there is a recipe or a file of another format, documents are
    first cleaned into shards in the folder `documents` of `config.out`, by `config.workers` processes; after a failure
    or an interruption these stay, and the same call goes on from there.

    The tokens of a document equal those of encoding it whole, as far as `PieceCutter` says; each document, and each
    part of one that was cut, is followed by the tokenizer's end-of-text token. A tokenizer must give the text back, up
    to canonical equivalence (NFC) and a blank before it, or have an unknown token for what it lacks; `allow_lossy`
    takes any, and the manifest counts what is lost. Equal input gives equal bytes. The four files are written to a
    temporary folder inside `config.out` and moved into place when all are complete, so a failure leaves an earlier
    prepared folder as it was.

    Args:
        config: what to do.
        progress: told how far each stage is.
        tokenizer: an existing one, in place of what `config.tokenizer` names.

    Raises:
        ConfigError: an option is out of range.
        DataError: nothing to read, undecodable text (with file and byte offset), a tokenizer that does not give the
            text back (with the first character lost and its place), a split without text, a prepared folder in
            the way, or another process that prepares there.
        OSError: a file cannot be read or written.
    """
    config.check()
    _check_out(config)
    existing = tokenizer
    if existing is None and config.tokenizer not in (*TRAINED_KINDS, "characters"):
        existing = Tokenizer.load(config.tokenizer)
    if existing is not None and config.special != "auto":
        existing.special_ids(config.special)  # before all the reading
    files = find(config.inputs, config.glob, config.format)
    recipe = config.steps()
    with held_folder(config.out):
        _check_out(config)  # again: another may have finished there meanwhile
        if recipe.steps or recipe.duplicates != NO_DUPLICATES or not all(file.is_text for file in files):
            with working_folder(config.out / WORKING, config.keep_documents) as folder:
                documents = make_documents(config, recipe, files, folder, progress)
                return _prepare(config, documents.inputs, existing, documents, progress)
        return _prepare(config, [TextInput(file.path, config) for file in files], existing, None, progress)


def _prepare(
    config: PrepareConfig,
    inputs: Sequence[TextInput | ShardInput],
    existing: Tokenizer | None,
    documents: Documents | None,
    progress: Progress,
) -> Manifest:
    with closing(Corpus(config, inputs, progress)) as corpus:
        corpus.scan()
        with staging(config.out / "prepare") as temporary:
            tokenizer = existing or corpus.make_tokenizer()
            if config.special != "auto":
                tokenizer.eot_id = tokenizer.special_ids(config.special)["end"]
            manifest = _write(corpus, tokenizer, temporary, documents)
            reports = write_report(documents.report(manifest), temporary) if documents else ()
            for name in (*(path.name for path in reports), *FILES):  # the manifest last: with another's token files
                os.replace(temporary / name, config.out / name)  # it would be refused
    return manifest


class SplitWriter:
    """One split's token file, and its entry in the manifest."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self.path = path
        self.entry: dict[str, Any] = {"tokens": 0, "documents": 0, "bytes": 0, "chars": 0, "sha256": ""}
        self._eot = np.array([] if tokenizer.eot_id is None else [tokenizer.eot_id], tokenizer.dtype)
        self._pending: list[np.ndarray] = []
        self._count = 0  # of the tokens that are pending
        self._digest = hashlib.sha256()
        self._file = open(path, "wb")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with naming(self.path):
            self._file.close()

    def add(self, text: str, ids: np.ndarray) -> None:
        """Append a piece of a document."""
        self.entry["bytes"] += utf8_length(text)
        self.entry["chars"] += len(text)
        self._append(ids)

    def end_document(self) -> None:
        """Append the end-of-text token, if there is one."""
        self.entry["documents"] += 1
        self._append(self._eot)

    def finish(self) -> dict:
        """Flush to the disk and return the manifest's entry."""
        self._write()
        with naming(self.path):
            sync(self._file)
        self.entry["sha256"] = self._digest.hexdigest()
        return self.entry

    def _append(self, ids: np.ndarray) -> None:
        self._pending.append(ids)
        self._count += len(ids)
        if self._count >= WRITE_TOKENS or len(self._pending) >= WRITE_TOKENS:
            self._write()

    def _write(self) -> None:
        data = np.concatenate(self._pending).tobytes() if self._pending else b""
        self._digest.update(data)
        self.entry["tokens"] += self._count
        with naming(self.path):
            self._file.write(data)
        self._pending, self._count = [], 0


def utf8_length(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def _write(corpus: Corpus, tokenizer: Tokenizer, folder: Path, documents: Documents | None) -> Manifest:
    dtype = tokenizer.dtype.name
    cutter = PieceCutter(lambda text: _probe(tokenizer, text))
    losses = Losses(tokenizer, corpus.config)
    with ExitStack() as stack:
        writers = {split: stack.enter_context(SplitWriter(folder / f"{split}.bin", tokenizer)) for split in SPLITS}
        for batch in _batches(corpus, cutter):
            for piece, ids in zip(batch, losses.encode(batch), strict=True):
                writers[piece.split].add(piece.text, ids)
                if piece.last:
                    writers[piece.split].end_document()
        splits = {split: writer.finish() for split, writer in writers.items()}
    _check_splits(splits, corpus)
    manifest = Manifest(
        dtype=dtype,
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        eot_id=tokenizer.eot_id,
        splits=splits,
        sources=documents.sources if documents else corpus.sources,
        preparation=_preparation(corpus, cutter, documents) | losses.report(),
    )
    tokenizer.save(folder / "tokenizer.json")
    with naming(folder / "manifest.json"), open(folder / "manifest.json", "w", encoding="utf-8") as file:
        file.write(manifest.to_json())
        sync(file)
    return manifest


def _probe(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode_arrays([text])[0].tolist()
    except DataError:  # said of the whole piece, with its place
        return []


def _batches(corpus: Corpus, cutter: PieceCutter) -> Iterator[list[Piece]]:
    """Pieces, about BATCH_CHARS at a time."""
    batch: list[Piece] = []
    cost = start = 0
    before = None
    for source, split, texts in corpus.segments("tokens"):
        start = start if source == before else 0
        before, begun = source, start
        for text in cutter(texts):
            batch.append(Piece(source, start, split, text, False))
            start += len(text)
            cost += utf8_length(text) + PIECE_COST
            if cost >= BATCH_CHARS:
                # the last piece stays behind: whether its document ends is not known yet
                yield batch[:-1]
                batch, cost = batch[-1:], 0
        if start > begun:
            batch[-1] = batch[-1]._replace(last=True)
    yield batch


def _check_splits(splits: dict[str, dict], corpus: Corpus) -> None:
    fraction = corpus.config.val_fraction
    for split in SPLITS:
        if splits[split]["chars"] == 0 and not (split == "val" and fraction == 0):
            raise DataError(
                f"no text for the {split} split: {corpus.plan.kept} documents of"
                f" {corpus.plan.chars} characters at val_fraction={fraction}, split={corpus.plan.rule}"
            )


def _preparation(corpus: Corpus, cutter: PieceCutter, documents: Documents | None) -> dict:
    config = corpus.config
    return {name: getattr(config, name) for name in OPTIONS} | {
        "glob": list(config.glob),
        "split": corpus.plan.rule,
        "documents_read": corpus.plan.documents,
        "documents_left": corpus.plan.kept,
        "duplicates_dropped": documents.kept.dropped if documents else 0,
        "empty_dropped": corpus.empty,
        "files_skipped": corpus.skipped,
        "forced_cuts": cutter.forced,
        **(documents.to_json() if documents else {}),
    }


def _check_out(config: PrepareConfig) -> None:
    if config.out.exists() and not config.out.is_dir():
        raise DataError(f"{config.out}: is a file, expected a folder to write into")
    present = [name for name in FILES if (config.out / name).exists()]
    if present and FILES[-1] not in present and was_interrupted(config.out / "prepare"):
        return  # of a run that was killed while it moved its files there
    if present and not config.overwrite:
        raise DataError(f"{config.out}: already holds {', '.join(present)}; add --overwrite to replace them")
