"""Text to tokens on the disk: the text that all providers get, its tokenizer, and fastlm's side.

    python -m fastlm.benchmarks.prepare_tokens TEXT TOKENIZER WORK WORKERS

prints {"seconds", "tokens", "documents"}, as `prepare_peers` does; the tokens are without those that end documents.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastlm.data import PrepareConfig, prepare
from fastlm.data.tokenizer import Tokenizer
from fastlm.errors import DataError

VOCABULARY = 32_000
_BLANK_LINES = re.compile(r"\n\s*\n")


def write_text(files: Sequence[Path], path: Path, size: int) -> int:
    """Write documents a blank line apart, those of `files` over and over, until they are `size` bytes.

    Returns how many. A line of a table is a document; documents have no blanks around them, and no blank lines in them.

    Raises:
        DataError: if the files hold no text.
    """
    written = count = 0
    with open(path, "wb") as out:
        while written < size:
            before = written
            for document in _documents(files):
                data = document.encode()
                written += out.write(data if not count else b"\n\n" + data)
                count += 1
                if written >= size:
                    return count
            if written == before:
                raise DataError(f"{', '.join(map(str, files))}: no text")
    return count


def _documents(files: Sequence[Path]) -> Iterator[str]:
    for file in files:
        text = file.read_text(encoding="utf-8")
        for part in text.split("\n") if file.suffix == ".tsv" else _BLANK_LINES.split(text):
            if document := part.strip():
                yield document


def make_tokenizer(text: Path, path: Path, sample: int = 8 << 20) -> None:
    """Train a byte-level BPE of VOCABULARY tokens on the start of a text."""
    with open(text, encoding="utf-8") as opened:
        Tokenizer.train_bpe([opened.read(sample)], VOCABULARY).save(path)


def encode(text: Path, tokenizer: Path, work: Path, workers: int) -> dict[str, Any]:
    """`fastlm.data.prepare` with an existing tokenizer; its threads are RAYON_NUM_THREADS."""
    options: dict[str, Any] = {"document_separator": "blank-line", "split": "documents", "workers": workers}
    config = PrepareConfig((text,), work / "out", str(tokenizer), **options)
    start = time.perf_counter()
    manifest = prepare(config)
    seconds = time.perf_counter() - start
    tokens, documents = (sum(split[key] for split in manifest.splits.values()) for key in ("tokens", "documents"))
    ends = documents if manifest.eot_id is not None else 0
    return {"seconds": seconds, "tokens": tokens - ends, "documents": documents}


def main() -> None:
    text, tokenizer, work, workers = sys.argv[1:]
    print(json.dumps(encode(Path(text), Path(tokenizer), Path(work), int(workers))))


if __name__ == "__main__":
    main()
