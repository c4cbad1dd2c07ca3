"""The part `documents` of `prepare`: a corpus whose duplicates are known, fastlm's side, and how well copies are found.

Documents are drawn from the sentences of real English text; copies of some, and copies with a known share of words
replaced, are put among them. fastlm and datatrove read JSONL, filter, drop equal documents, then nearly equal ones at
0.8, and write JSONL, in two processes.

    python -m fastlm.benchmarks.deduplicate --run SOURCE WORK --workers N

writes what stays to WORK/out and prints {"seconds", "dropped"}.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import random
import re
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from fastlm.data.dedup import ExactOptions, NearOptions, Shards, resolve, save, signatures
from fastlm.data.document import Document
from fastlm.errors import DataError

THRESHOLD, NGRAM = 0.8, 5
FILTER = "gopher_quality"
SHARD_BYTES = 16 << 20
EQUAL, NEAR = 0.1, 0.1  # shares of the documents that are copies, and copies with words replaced
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"\w+")


def write_corpus(files: Sequence[Path], folder: Path, size: int, seed: int = 0) -> dict[str, Any]:
    """Write `size` bytes of JSONL in shards, and say which of their documents are copies.

    Raises:
        DataError: if the files hold no sentences.

    Returns:
        {"documents", "equal": [id, ...], "near": [[id, id of the original, Jaccard similarity], ...]}
    """
    rng = random.Random(seed)
    sentences = [s for file in files for s in _SENTENCE_END.split(file.read_text("utf-8")) if 40 < len(s) < 400]
    if not sentences:
        raise DataError(f"{', '.join(map(str, files))}: no sentences of 40 to 400 characters")
    vocabulary = sorted({word for sentence in sentences[::50] for word in _WORD.findall(sentence)})
    truth: dict[str, Any] = {"documents": 0, "equal": [], "near": []}
    recent: list[tuple[int, str]] = []  # a sample of those before, to copy
    folder.mkdir(parents=True)
    written = 0
    for shard in range(-(-size // SHARD_BYTES)):
        with open(folder / f"{shard:05d}.jsonl", "w", encoding="utf-8") as out:
            while written < min(size, (shard + 1) * SHARD_BYTES):
                number, draw = truth["documents"], rng.random()
                if recent and draw < EQUAL + NEAR:
                    original, text = rng.choice(recent)
                    if draw < EQUAL:
                        truth["equal"].append(number)
                    else:
                        copy = _edited(rng, text, vocabulary)
                        truth["near"].append([number, original, _similarity(text, copy)])
                        text = copy
                else:
                    text = " ".join(rng.choices(sentences, k=rng.randrange(5, 40)))
                    recent.append((number, text))
                    if len(recent) > 2000:
                        recent[rng.randrange(2000)] = recent.pop()
                written += out.write(json.dumps({"text": text, "id": str(number)}) + "\n")
                truth["documents"] += 1
    return truth


def _edited(rng: random.Random, text: str, vocabulary: Sequence[str]) -> str:
    """A text with some words replaced: about half of the results are above the threshold."""
    share = rng.uniform(0.001, 0.035)
    return _WORD.sub(lambda word: rng.choice(vocabulary) if rng.random() < share else word[0], text)


def _similarity(one: str, other: str) -> float:
    sets = []
    for text in (one, other):
        words = _WORD.findall(text.lower())
        sets.append({tuple(words[at : at + NGRAM]) for at in range(len(words) - NGRAM + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


class Pipeline:
    """fastlm's side: what `fastlm prepare` does with documents, without tokens."""

    def __init__(self, source: Path, work: Path, step: str) -> None:
        self.files, self.work = sorted(source.glob("*.jsonl")), work
        self.step = None if step == "none" else importlib.import_module("fastlm.data.clean").make_step(step)
        self.exact, self.near = ExactOptions(), NearOptions(THRESHOLD, ngram=NGRAM)

    def run(self, workers: int) -> dict[str, int]:
        """Write what stays to `work`/out."""
        for name in ("clean", "signatures", "out"):
            (self.work / name).mkdir(parents=True)
        shards = range(len(self.files))
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            counts = pool.map(self.clean, shards, chunksize=1)
            kept = [self.work / "signatures" / f"{shard}.npy" for shard in shards]
            with open(self.work / "pairs.jsonl", "w") as pairs:
                texts = Shards(self.texts, counts)
                found = resolve(kept, texts, self.exact, self.near, folder=self.work, pairs=pairs)
            firsts = accumulate(counts, initial=0)
            cut = [(n, found.reasons[first : first + count]) for n, first, count in zip(shards, firsts, counts)]  # noqa: B905
            pool.starmap(self.write, cut, chunksize=1)
        return found.counts

    def clean(self, shard: int) -> int:
        """Filter a shard, and make its signatures."""
        texts: list[str] = []
        with open(self.work / "clean" / self.files[shard].name, "wb") as out:
            for row, line in enumerate(_lines(self.files[shard]), 1):
                document = Document(json.loads(line)["text"], self.files[shard].name, row)
                if self.step is None or isinstance(self.step(document), Document):
                    out.write(line)
                    texts.append(document.text)
        save(self.work / "signatures" / f"{shard}.npy", signatures(texts, self.exact, self.near))
        return len(texts)

    def texts(self, shard: int) -> Iterator[str]:
        """The texts of a cleaned shard."""
        for line in _lines(self.work / "clean" / self.files[shard].name):
            yield json.loads(line)["text"]

    def write(self, shard: int, reasons: Any) -> None:
        """Write what stays of a shard."""
        with open(self.work / "out" / self.files[shard].name, "wb") as out:
            lines = _lines(self.work / "clean" / self.files[shard].name)
            out.writelines(line for line, reason in zip(lines, reasons, strict=True) if not reason)


def _lines(file: Path) -> Iterator[bytes]:
    with open(file, "rb") as opened:
        yield from opened


def score(out: Path, truth: dict[str, Any], before: Path | None = None) -> dict[str, float]:
    """How well the documents that stay agree with what is known.

    Args:
        before: the documents that the filter left; None if it left all.
    """
    kept = _ids(out)
    there = _ids(before) if before else set(range(truth["documents"]))
    near = [(a, b, s) for a, b, s in truth["near"] if a in there and b in there]
    alike = [(a, b) for a, b, s in near if s >= THRESHOLD]
    apart = [a for a, b, s in near if s < THRESHOLD - 0.02]  # the two count words in ways that differ a little
    equal = [a for a in truth["equal"] if a in there]
    fine = {number for pair in truth["near"] for number in pair[:2]} | set(truth["equal"])
    fresh = there - fine
    return {
        "filtered": truth["documents"] - len(there),
        "near pairs": len(alike),
        "recall of near pairs": sum(not (a in kept and b in kept) for a, b in alike) / max(1, len(alike)),
        "recall of equal ones": sum(a not in kept for a in equal) / max(1, len(equal)),
        "dropped though below the threshold": sum(a not in kept for a in apart) / max(1, len(apart)),
        "others dropped": len(fresh - kept),
    }


def _ids(folder: Path) -> set[int]:
    return {int(json.loads(line)["id"]) for file in sorted(folder.glob("*.jsonl")) for line in _lines(file)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, nargs=2, metavar=("SOURCE", "WORK"), required=True)
    parser.add_argument("--filter", default=FILTER)
    parser.add_argument("--workers", type=int, required=True)
    options = parser.parse_args()
    source, work = options.run
    pipeline = Pipeline(source, work, options.filter)
    start = time.perf_counter()
    counts = pipeline.run(options.workers)
    print(json.dumps({"seconds": time.perf_counter() - start, "dropped": counts}))


if __name__ == "__main__":
    main()
