"""The corpus of one `prepare`: scanned once, then read anew for each pass."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError
from . import reading
from .pieces import PieceCutter
from .splitting import Plan
from .tokenizer import Tokenizer, byte_level_words

if TYPE_CHECKING:
    from .prepare import PrepareConfig

# Called as progress(stage, bytes done, bytes in all); the stages are "scan", "tokenizer" and "tokens".
Progress = Callable[[str, int, int], None]


@dataclass
class Corpus:
    """The files of one `prepare`, what the scan found, and their documents read anew for each pass."""

    config: PrepareConfig
    progress: Progress
    files: list[Path] = field(default_factory=list)
    sources: list[dict] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # for each file, the number of documents up to its end
    alphabet: set[str] = field(default_factory=set)
    skipped: list[str] = field(default_factory=list)
    duplicates: int = 0
    empty: int = 0

    def scan(self) -> None:
        """Read everything once: check that it decodes, hash it, and plan the split."""
        config = self.config
        self.plan = Plan(config.val_fraction, config.seed, config.split)
        self._seen: set[bytes] = set()
        found = reading.find_files(config.inputs, config.glob)
        self._sizes = {path: path.stat().st_size for path in found}
        self._starts = dict(zip(found, accumulate(self._sizes.values(), initial=0), strict=False))
        self._total = sum(self._sizes.values())
        for path in found:
            self._scan_file(path)
        self.plan.settle()
        if not any(self.plan.kept):
            raise DataError(f"no text in {len(found)} files ({len(self.skipped)} skipped): nothing to prepare")

    def _scan_file(self, path: Path) -> None:
        first, new = len(self.plan.kept), _Counts()
        alphabet: set[str] = set()
        digest = hashlib.sha256()
        try:
            for texts in reading.documents(self._events("scan", path, digest.update)):
                self._scan_document(texts, new, alphabet)
        except DataError:
            if self.config.errors != "skip-file":
                raise
            self.plan.truncate(first)
            self.skipped.append(str(path))
            return
        self.files.append(path)
        self.sources.append({"path": str(path), "bytes": self._sizes[path], "sha256": digest.hexdigest()})
        self.ends.append(len(self.plan.kept))
        self.alphabet |= alphabet
        self._seen |= new.seen
        self.duplicates += new.duplicates
        self.empty += new.empty

    def _scan_document(self, texts: Iterator[str], new: _Counts, alphabet: set[str]) -> None:
        digest, chars, blank = hashlib.blake2b(digest_size=16), 0, True
        for text in texts:
            digest.update(text.encode("utf-8", "surrogatepass"))
            chars += len(text)
            blank = blank and (not text or text.isspace())
            if self.config.tokenizer == "characters":
                alphabet.update(text)
        key = digest.digest()
        twin = self.config.deduplicate == "exact" and not blank and (key in self._seen or key in new.seen)
        if self.config.deduplicate == "exact":
            new.seen.add(key)
        new.duplicates += twin
        new.empty += blank
        self.plan.add(key, chars, not (blank or twin))

    def make_tokenizer(self) -> Tokenizer:
        """Train a BPE on the training split, or take every character that occurs."""
        if self.config.tokenizer == "characters":
            return Tokenizer.characters(self.alphabet)
        # Training takes the square of a word's length: 3 minutes for 262,144 letters without a break.
        cutter = PieceCutter(byte_level_words, size=1 << 11)
        train = (texts for _, split, texts in self.stretches("tokenizer") if split == "train")
        return Tokenizer.train_bpe(chain.from_iterable(map(cutter, train)), self.config.vocab_size)

    def stretches(self, stage: str) -> Iterator[tuple[Path, str, Iterator[str]]]:
        """All text as (file, split, texts), each to be read before the next.

        Raises:
            DataError: a file is no longer what the scan read.
        """
        first = 0
        for path, source, end in zip(self.files, self.sources, self.ends, strict=True):
            digest = hashlib.sha256()
            events = self._events(stage, path, digest.update)
            for texts, index in zip(reading.documents(events), range(first, end), strict=False):
                for split, stretch in self.plan.stretches(index, texts):
                    yield path, split, stretch
            if digest.hexdigest() != source["sha256"]:
                raise DataError(f"{path}: the file changed while it was being prepared")
            first = end

    def _events(self, stage: str, path: Path, on_bytes: Callable[[bytes], None]) -> reading.Events:
        config = self.config
        report = self._reporter(stage, path, on_bytes)
        errors = "replace" if config.errors == "replace" else "strict"
        texts = reading.read_text(path, config.encoding, errors, config.chunk_bytes, report)
        if config.line_endings == "lf":
            texts = reading.unix_line_endings(texts)
        if config.normalize != "none":
            texts = reading.normalized(texts, "NFC" if config.normalize == "nfc" else "NFKC")
        separator = config.document_separator.replace("\\n", "\n").replace("\\t", "\t")
        return reading.split_documents(texts, None if separator == "none" else reading.Separator(separator))

    def _reporter(self, stage: str, path: Path, on_bytes: Callable[[bytes], None]) -> Callable[[bytes], None]:
        done = self._starts[path]

        def report(data: bytes) -> None:
            nonlocal done
            on_bytes(data)
            done += len(data)
            self.progress(stage, min(done, self._total), self._total)

        return report


@dataclass
class _Counts:
    """What one file adds to a scan, kept apart until the file is known to be readable."""

    seen: set[bytes] = field(default_factory=set)
    duplicates: int = 0
    empty: int = 0
