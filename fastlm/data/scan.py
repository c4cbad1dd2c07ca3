"""The corpus of one `prepare`: scanned once, then read anew for each pass."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import DataError
from . import reading
from .pieces import PieceCutter
from .pipeline.duplicates import Kept
from .pipeline.shards import read_shard
from .splitting import Plan
from .tokenizer import Tokenizer, byte_level_words
from .tokenizers.special import TRAINED

if TYPE_CHECKING:
    from .config import PrepareConfig

TRAINING_PIECE = 1 << 11
UNBROKEN = 1 << 21  # characters; training takes 80 bytes for each where no word occurs twice

# Called as progress(stage, bytes done, bytes in all); the stages are "documents", "scan", "tokenizer" and
# "tokens".
Progress = Callable[[str, int, int], None]


class Source(NamedTuple):
    """A document: its file, and which one of that it is, from 1 on."""

    path: Path
    document: int


class TextInput:
    """A file of plain text, of which a document is read in pieces."""

    def __init__(self, path: Path, config: PrepareConfig) -> None:
        self.path, self._config = path, config

    def events(self, on_bytes: Callable[[bytes], None]) -> reading.Events:
        """Its documents."""
        config = self._config
        errors = "replace" if config.errors == "replace" else "strict"
        texts = reading.read_text(self.path, config.encoding, errors, config.chunk_bytes, on_bytes)
        if config.line_endings == "lf":
            texts = reading.unix_line_endings(texts)
        if config.normalize != "none":
            texts = reading.normalized(texts, "NFC" if config.normalize == "nfc" else "NFKC")
        return reading.cut(texts, config.document_separator)

    def place(self, number: int) -> Source:
        """Where the document came from whose text was read last, the one of this number."""
        return Source(self.path, number)


class ShardInput:
    """A shard of cleaned documents.

    Args:
        first: the number in the corpus of its first document.
        kept: what was found of duplicates.
    """

    def __init__(self, path: Path, first: int = 0, kept: Kept | None = None) -> None:
        self.path, self._first, self._kept = path, first, kept
        self._place = Source(path, 0)

    def events(self, on_bytes: Callable[[bytes], None]) -> reading.Events:
        """Its documents that stay, each in one piece."""
        for number, found in enumerate(read_shard(self.path, on_bytes), start=self._first):
            text = found.text if self._kept is None else self._kept.text(number, found.text)
            if text is not None:
                self._place = Source(Path(found.source), found.row)
                yield text
                yield None

    def place(self, number: int) -> Source:
        """Where the document came from whose text was read last."""
        return self._place


@dataclass
class Corpus:
    """The inputs of one `prepare`, what the scan found, and their documents read anew for each pass."""

    config: PrepareConfig
    inputs: Sequence[TextInput | ShardInput]
    progress: Progress
    plan: Plan = field(init=False)
    files: list[TextInput | ShardInput] = field(default_factory=list)
    sources: list[dict] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # for each file, the number of documents up to its end
    alphabet: set[str] = field(default_factory=set)
    skipped: list[str] = field(default_factory=list)
    empty: int = 0

    def __post_init__(self) -> None:
        config = self.config
        self.plan = Plan(config.val_fraction, config.seed, config.split, _existing(config.out))

    def close(self) -> None:
        """Remove what was kept of the scan."""
        self.plan.close()

    def scan(self) -> None:
        """Read everything once: check that it decodes, hash it, and plan the split."""
        paths = [found.path for found in self.inputs]
        self._sizes = {path: path.stat().st_size for path in paths}
        self._starts = dict(zip(paths, accumulate(self._sizes.values(), initial=0), strict=False))
        self._total = sum(self._sizes.values())
        for found in self.inputs:
            self._scan_file(found)
        self.empty = self.plan.documents - self.plan.kept
        self.plan.resolve()
        if not self.plan.kept:
            raise DataError(f"no text in {len(paths)} files ({len(self.skipped)} skipped): nothing to prepare")

    def _scan_file(self, file: TextInput | ShardInput) -> None:
        path, first = file.path, self.plan.documents
        alphabet: set[str] = set()
        digest = hashlib.sha256()
        try:
            for texts in reading.documents(self._events("scan", file, digest.update)):
                self._scan_document(texts, alphabet)
        except DataError:
            if self.config.errors != "skip-file" and self.config.on_error != "skip":
                raise
            self.plan.truncate(first)
            self.skipped.append(str(path))
            return
        self.files.append(file)
        self.sources.append({"path": str(path), "bytes": self._sizes[path], "sha256": digest.hexdigest()})
        self.ends.append(self.plan.documents)
        self.alphabet |= alphabet

    def _scan_document(self, texts: Iterator[str], alphabet: set[str]) -> None:
        digest, chars, blank = hashlib.blake2b(digest_size=16), 0, True
        for text in texts:
            digest.update(text.encode("utf-8", "surrogatepass"))
            chars += len(text)
            blank = blank and (not text or text.isspace())
            if self.config.tokenizer == "characters":
                alphabet.update(text)
        self.plan.add(digest.digest(), chars, not blank)

    def make_tokenizer(self) -> Tokenizer:
        """Train on the training split, or take every character that occurs."""
        config = self.config
        special = TRAINED["causal" if config.special == "auto" else config.special]
        if config.tokenizer == "characters":
            return Tokenizer.characters(self.alphabet, special)
        # Training takes the square of a word's length: 3 minutes for 262,144 letters without a break.
        cutter = PieceCutter(byte_level_words, TRAINING_PIECE)
        train = (texts for _, split, texts in self.segments("tokenizer") if split == "train")
        pieces = for_training(chain.from_iterable(map(cutter, train)))
        # A merge needs a pair of bytes; the library makes room for all of vocab_size before it looks at the text.
        most = 256 + len(special) + 4 * self.plan.chars
        train_kind = getattr(Tokenizer, f"train_{config.tokenizer}")
        return train_kind(pieces, min(config.vocab_size, most), special=special)

    def segments(self, stage: str) -> Iterator[tuple[Source, str, Iterator[str]]]:
        """All text as (where it is from, split, texts), each to be read before the next.

        Raises:
            DataError: a file is no longer what the scan read.
        """
        first, rows = 0, self.plan.rows()
        for file, source, end in zip(self.files, self.sources, self.ends, strict=True):
            digest = hashlib.sha256()
            events = self._events(stage, file, digest.update)
            found = zip(reading.documents(events), islice(rows, end - first), strict=False)
            for number, (texts, row) in enumerate(found, start=1):
                for split, segment in self.plan.segments(row, texts):
                    yield file.place(number), split, segment
            if digest.hexdigest() != source["sha256"]:
                raise DataError(f"{file.path}: the file changed while it was being prepared")
            first = end

    def _events(self, stage: str, file: TextInput | ShardInput, on_bytes: Callable[[bytes], None]) -> reading.Events:
        return file.events(self._reporter(stage, file.path, on_bytes))

    def _reporter(self, stage: str, path: Path, on_bytes: Callable[[bytes], None]) -> Callable[[bytes], None]:
        done = self._starts[path]

        def report(data: bytes) -> None:
            nonlocal done
            on_bytes(data)
            done += len(data)
            self.progress(stage, min(done, self._total), self._total)

        return report


def for_training(pieces: Iterable[str]) -> Iterator[str]:
    """What a BPE is trained on: all pieces but those without a word's end, of which the first `UNBROKEN` characters."""
    unbroken = 0
    for piece in pieces:
        unbroken += len(piece) if len(piece) > 2 * TRAINING_PIECE else 0
        if len(piece) <= 2 * TRAINING_PIECE or unbroken <= UNBROKEN:
            yield piece


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there: where the output will be, there is room."""
    return next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), Path("."))
