"""The memory of deduplication does not grow with the corpus: measured as a process's peak."""

import subprocess
import sys

import pytest

# Resolves a corpus of one size, then one of five times that size, of which a third of the documents are copies.
CHILD = """if True:
    import random, resource, sys
    from pathlib import Path
    from fastlm.data.dedup import *
    folder, size = Path(sys.argv[1]), int(sys.argv[2])
    words = [f"{number:x}" for number in range(1 << 17)]
    random.Random(0).shuffle(words)
    pool = " ".join(words)
    exact, near, lines = ExactOptions(), NearOptions(), LineOptions(most=2)

    def texts(shard):
        rng = random.Random(shard)
        for number in range(size):
            start = rng.randrange(len(pool) - 2000)
            yield pool[start : start + 2000] + "\\nmenu\\n" + rng.choice(["a", "b"]) * (number % 3)
            if number % 3 == 2:
                yield pool[start : start + 2000 - number % 50]
                yield pool[start : start + 2000 - number % 50]

    peaks = []
    for shards in (2, 10):
        files = [folder / f"{shard}.npy" for shard in range(shards)]
        found = [folder / f"{shard}.lines.npy" for shard in range(shards)]
        counts = []
        for shard, (file, line) in enumerate(zip(files, found)):
            save(file, signatures(texts(shard), exact, near))
            save(line, line_hashes(texts(shard), lines))
            counts.append(sum(1 for _ in texts(shard)))
        result = resolve(files, Shards(texts, counts), exact, near, folder=folder)
        assert min(result.counts.values()) > shards * size // 4, result.counts
        assert repeated_lines(found, counts, lines, folder / "repeated.npy") > 0
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(*peaks)
"""


def grown(folder, size):
    done = subprocess.run([sys.executable, "-c", CHILD, str(folder), str(size)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = map(float, done.stdout.split())
    print(before, after)
    return after - before


def test_peak_does_not_grow_with_the_corpus(tmp_path):
    """From 2 to 10 MB, of which the n-grams of the copies alone are more than what it may grow by."""
    assert grown(tmp_path, 400) < 8


@pytest.mark.slow
def test_peak_does_not_grow_with_a_large_corpus(tmp_path):
    """From 80 to 400 MB, of which 100 bytes a document are expected."""
    assert grown(tmp_path, 12_000) < 60
