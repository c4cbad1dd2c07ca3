"""datatrove's side of the part `documents` of `prepare`.

An interpreter that has datatrove runs it, so that it imports nothing of ours: pip install datatrove orjson spacy.
Its own defaults decide, 14 bands of 8 rows: they find 0.92 of the pairs at 0.8, with a little more hashes than ours.
A filter that is none of its own is left out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any


def text_of(document: Any) -> str:
    return document.text


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, nargs=2)
    parser.add_argument("--filter")
    parser.add_argument("--workers", type=int)
    options = parser.parse_args()
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup.exact_dedup import (
        ExactDedupConfig,
        ExactDedupFilter,
        ExactDedupSignature,
        ExactFindDedups,
    )  # fmt: skip
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )  # fmt: skip
    from datatrove.pipeline.filters import GopherQualityFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    source, work = options.run
    start = time.perf_counter()
    shards = len(list(source.glob("*.jsonl")))
    exact, near = ExactDedupConfig(content_getter=text_of), MinhashConfig()

    def folder(name: str) -> str:
        return str(work / name)

    def run(steps: list[Any], tasks: int = shards) -> None:
        settings = {"workers": options.workers, "logging_dir": folder(f"logs{len(done)}"), "start_method": "fork"}
        LocalPipelineExecutor(steps, tasks=tasks, **settings).run()
        done.append(tasks)

    def write(name: str) -> Any:
        return JsonlWriter(folder(name), output_filename="${rank}.jsonl", compression=None)

    done: list[int] = []
    filters = [GopherQualityFilter()] if options.filter == "gopher_quality" else []
    run([JsonlReader(str(source)), *filters, write("clean"), ExactDedupSignature(folder("exact"), exact)])
    run([ExactFindDedups(folder("exact"), folder("equal"), exact)], tasks=1)
    signed = MinhashDedupSignature(folder("signatures"), near)
    run([JsonlReader(folder("clean")), ExactDedupFilter(folder("equal"), exact), write("unique"), signed])
    run([MinhashDedupBuckets(folder("signatures"), folder("buckets"), config=near)], tasks=near.num_buckets)
    run([MinhashDedupCluster(folder("buckets"), folder("remove"), config=near)], tasks=1)
    run([JsonlReader(folder("unique")), MinhashDedupFilter(folder("remove")), write("out")])
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
