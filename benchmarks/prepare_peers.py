"""Peers of `prepare_tokens`: run by an interpreter that has them, so it imports nothing of ours.

    python prepare_peers.py datasets|tokenizers TEXT TOKENIZER WORK WORKERS

Both cut the text at blank lines, encode each document and write what comes out. The last line printed is
{"seconds", "tokens", "documents"}: the seconds are from the first byte read to the last one written, without imports.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCH = 10_000  # documents


def with_datasets(text: Path, tokenizer: Path, work: Path, workers: int) -> Callable[[], tuple[int, int]]:
    """`datasets` as its guide has it: load, map in batches over processes, save."""
    from datasets import Features, Sequence, Value, disable_progress_bars, load_dataset, load_from_disk
    from tokenizers import Tokenizer

    disable_progress_bars()
    encoder = Tokenizer.from_file(str(tokenizer))

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [e.ids for e in encoder.encode_batch(batch["text"], add_special_tokens=False)]}

    def run() -> tuple[int, int]:
        loaded: Any = load_dataset(
            "text", data_files=str(text), sample_by="paragraph", split="train", cache_dir=str(work / "cache")
        )
        ids = Features({"ids": Sequence(Value("int32"))})
        encoded = loaded.map(encode, batched=True, num_proc=workers, remove_columns=["text"], features=ids)
        encoded.save_to_disk(str(work / "out"), num_proc=workers)
        return 0, len(encoded)

    def counted() -> tuple[int, int]:
        written = load_from_disk(str(work / "out")).with_format("arrow")
        return sum(len(table["ids"].combine_chunks().flatten()) for table in written.iter(BATCH)), len(written)

    run.counted = counted  # type: ignore[attr-defined]
    return run


def with_tokenizers(text: Path, tokenizer: Path, work: Path, workers: int) -> Callable[[], tuple[int, int]]:
    """`tokenizers` on batches of documents, and numpy to write them; its threads are RAYON_NUM_THREADS."""
    import numpy as np
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer))
    dtype = np.uint16 if encoder.get_vocab_size() <= 1 << 16 else np.uint32

    def run() -> tuple[int, int]:
        documents = text.read_text(encoding="utf-8").split("\n\n")
        tokens = 0
        with open(work / "tokens.bin", "wb") as out:
            for first in range(0, len(documents), BATCH):
                encoded = encoder.encode_batch(documents[first : first + BATCH], add_special_tokens=False)
                ids = np.concatenate([np.array(e.ids, dtype) for e in encoded])
                tokens += len(ids)
                out.write(ids.tobytes())
        return tokens, len(documents)

    return run


def main() -> None:
    name, text, tokenizer, work, workers = sys.argv[1:]
    Path(work).mkdir(parents=True)
    make = {"datasets": with_datasets, "tokenizers": with_tokenizers}[name]
    run = make(Path(text), Path(tokenizer), Path(work), int(workers))
    start = time.perf_counter()
    tokens, documents = run()
    seconds = time.perf_counter() - start
    if counted := getattr(run, "counted", None):
        tokens, documents = counted()
    print(json.dumps({"seconds": seconds, "tokens": tokens, "documents": documents}))


if __name__ == "__main__":
    main()
