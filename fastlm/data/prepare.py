"""Text files to memory-mapped token files, in three bounded passes: scan, tokenizer, tokens."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .._core.files import naming, staging, sync
from ..errors import ConfigError, DataError, shown
from . import reading
from .losses import Losses, Piece
from .manifest import SPLITS, Manifest
from .pieces import PieceCutter
from .scan import TRAINED_KINDS, Corpus, Progress
from .tokenizer import Tokenizer

FILES = ("train.bin", "val.bin", "tokenizer.json", "manifest.json")
BATCH_CHARS = 1 << 19  # of one byte each, encoded at once, so that every thread has pieces to work on
PIECE_COST = 256  # as many characters does a piece count for beside its own: one of a letter takes 1 KB until written
WRITE_TOKENS = 1 << 16
MOST_CHUNK_BYTES = 1 << 30


@dataclass
class PrepareConfig:
    """What to read, how to clean and split it, and where to write."""

    inputs: tuple[Path, ...]
    """Text files, or folders that are searched recursively."""
    out: Path
    """Folder to write: train.bin, val.bin, tokenizer.json and manifest.json."""
    tokenizer: str = "bpe"
    """bpe, wordpiece or unigram (trained on the training split), characters, or the path of an existing one:
    tokenizer.json, vocab.txt, GPT-2's files, SentencePiece's .model, a .tiktoken or GGUF file, or a folder with one."""
    vocab_size: int = 8192
    """The most tokens of a trained tokenizer."""
    special: Literal["auto", "causal", "masked", "seq2seq", "chat"] = "auto"
    """What the special tokens are for, which an existing tokenizer must have; auto: causal for a trained one."""
    val_fraction: float = 0.05
    """Share of the text kept for validation."""
    seed: int = 0
    """Chooses the validation text."""
    split: Literal["auto", "documents", "spans"] = "auto"
    """Validate on whole documents, or on a span of each; auto: documents if that holds out at least ten."""
    glob: tuple[str, ...] = ("*.txt",)
    """Which files of a folder to read."""
    encoding: str = "utf-8"
    """Encoding of the files; utf-8-sig drops a byte order mark."""
    errors: Literal["strict", "replace", "skip-file"] = "strict"
    """Text that cannot be decoded: stop, put U+FFFD, or leave the file out."""
    document_separator: str = "none"
    r"""none (a file is one document), blank-line, or a string to cut at (\n and \t are understood)."""
    normalize: Literal["none", "nfc", "nfkc"] = "none"
    """Unicode normalisation."""
    line_endings: Literal["keep", "lf"] = "keep"
    """lf turns CR LF and CR into LF."""
    allow_lossy: bool = False
    """Take a tokenizer that does not give the text back, and count what is lost."""
    deduplicate: Literal["none", "exact"] = "none"
    """exact drops documents equal to an earlier one."""
    overwrite: bool = False
    """Replace an earlier prepared folder."""
    chunk_bytes: int = 1 << 20
    """How much of a file is read at once; the result does not depend on it."""

    def __post_init__(self) -> None:
        self.inputs = tuple(map(Path, [self.inputs] if isinstance(self.inputs, (str, Path)) else self.inputs))
        self.out = Path(self.out)
        self.glob = (self.glob,) if isinstance(self.glob, str) else tuple(self.glob)

    def check(self) -> None:
        """Raise ConfigError if an option is out of range."""
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(f"val_fraction={self.val_fraction}, expected at least 0 and less than 1")
        if not self.inputs:
            raise ConfigError(
                "inputs is empty, expected PATH, text files or folders (before --glob, which takes all that follow it)"
            )
        if self.chunk_bytes < 1:
            raise ConfigError(f"chunk_bytes={self.chunk_bytes}, expected at least 1")
        if self.chunk_bytes > MOST_CHUNK_BYTES:
            raise ConfigError(f"chunk_bytes={shown(self.chunk_bytes)}, expected at most {MOST_CHUNK_BYTES}")
        if not -(2**63) <= self.seed < 2**64:
            raise ConfigError(f"seed={shown(self.seed)}, expected an integer of 64 bits")
        if self.document_separator == "":
            raise ConfigError("document_separator is empty, expected none, blank-line or a string")
        if self.tokenizer == "bpe" and self.vocab_size < 257:
            raise ConfigError(f"vocab_size={self.vocab_size}, expected at least 257 (256 bytes and an end of text)")
        if self.tokenizer in TRAINED_KINDS and self.vocab_size < 16:
            raise ConfigError(f"vocab_size={self.vocab_size}, expected at least 16")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r}, expected one of {', '.join(known)}")
        reading.check_encoding(self.encoding)


_CHOICES = {
    "special": ("auto", "causal", "masked", "seq2seq", "chat"),
    "split": ("auto", "documents", "spans"),
    "errors": ("strict", "replace", "skip-file"),
    "normalize": ("none", "nfc", "nfkc"),
    "line_endings": ("keep", "lf"),
    "deduplicate": ("none", "exact"),
}


def prepare(
    config: PrepareConfig,
    progress: Progress = lambda stage, done, total: None,
    tokenizer: Tokenizer | None = None,
) -> Manifest:
    """Turn text files into a tokenizer and memory-mapped token files.

    Files of any size are read in chunks. The tokens of a document equal those of encoding it whole, as far as
    `PieceCutter` says; each document, and each part of one that was cut, is followed by the tokenizer's
    end-of-text token. A tokenizer must give the text back, up to canonical equivalence (NFC) and a blank before it, or
    have an unknown token for what it lacks; `allow_lossy` takes any, and the manifest counts what is lost. Equal input
    gives equal bytes. The four files are written to a temporary folder inside
    `config.out` and moved into place when all are complete, so a failure leaves an earlier prepared folder as
    it was.

    Args:
        config: what to do.
        progress: told how far each stage is.
        tokenizer: an existing one, in place of what `config.tokenizer` names.

    Raises:
        ConfigError: an option is out of range.
        DataError: nothing to read, undecodable text (with file and byte offset), a tokenizer that does not give the
            text back (with the first character lost and its place), a split without text, or a prepared folder in
            the way.
        OSError: a file cannot be read or written.
    """
    config.check()
    _check_out(config)
    existing = tokenizer
    if existing is None and config.tokenizer not in (*TRAINED_KINDS, "characters"):
        existing = Tokenizer.load(config.tokenizer)
    if existing is not None and config.special != "auto":
        existing.special_ids(config.special)  # before all the reading
    with closing(Corpus(config, progress)) as corpus:
        corpus.scan()
        created = not config.out.exists()
        config.out.mkdir(parents=True, exist_ok=True)
        try:
            with staging(config.out / "prepare") as temporary:
                tokenizer = existing or corpus.make_tokenizer()
                if config.special != "auto":
                    tokenizer.eot_id = tokenizer.special_ids(config.special)["end"]
                manifest = _write(corpus, tokenizer, temporary)
                for name in FILES:  # the manifest last: with another's token files it would be refused
                    os.replace(temporary / name, config.out / name)
        except BaseException:
            if created:
                with suppress(OSError):  # not ours alone any more
                    config.out.rmdir()
            raise
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


def _write(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> Manifest:
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
        sources=corpus.sources,
        preparation=_preparation(corpus, cutter) | losses.report(),
    )
    tokenizer.save(folder / "tokenizer.json")
    with naming(folder / "manifest.json"), open(folder / "manifest.json", "w", encoding="utf-8") as file:
        file.write(manifest.to_json())
        sync(file)
    return manifest


def _probe(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode_lossy([text])[0]
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


def _preparation(corpus: Corpus, cutter: PieceCutter) -> dict:
    options = asdict(corpus.config) | {"glob": list(corpus.config.glob)}
    for name in ("inputs", "out", "overwrite", "chunk_bytes"):
        del options[name]
    return options | {
        "split": corpus.plan.rule,
        "documents_read": corpus.plan.documents,
        "duplicates_dropped": corpus.plan.duplicates,
        "empty_dropped": corpus.empty,
        "files_skipped": corpus.skipped,
        "forced_cuts": cutter.forced,
    }


def _check_out(config: PrepareConfig) -> None:
    if config.out.exists() and not config.out.is_dir():
        raise DataError(f"{config.out}: is a file, expected a folder to write into")
    present = [name for name in FILES if (config.out / name).exists()]
    if present and not config.overwrite:
        raise DataError(f"{config.out}: already holds {', '.join(present)}; add --overwrite to replace them")
