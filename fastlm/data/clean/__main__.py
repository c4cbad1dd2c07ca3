"""How fast each step is on a text: `python -m fastlm.data.clean FILE ...`, documents being a blank line apart.

Prints MB/s on one core of what goes into each step, all with their default options, and of the default steps one after
the other. Of `--html` files, each is a page, and the steps that read HTML are timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..document import Document, Dropped, Step
from . import DEFAULT_STEPS, chain, make_step, steps

_HTML = ("html_page", "html_fragment")


def documents_of(paths: Sequence[Path], least: int = 1000) -> list[Document]:
    """Documents of at least that many characters, cut at blank lines."""
    documents: list[Document] = []
    for path in paths:
        text = ""
        for part in path.read_text(encoding="utf-8").split("\n\n"):
            text = f"{text}\n\n{part}" if text else part
            if len(text) >= least:
                documents.append(Document(text, str(path), len(documents) + 1))
                text = ""
    return documents


def rate(step: Callable[[Document], Document | Dropped], documents: Sequence[Document], repeats: int = 3) -> float:
    """MB/s of UTF-8 by processor time, the best of `repeats` after a first run."""
    size = sum(len(document.text.encode()) for document in documents)
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        for document in documents:
            step(document)
        times.append(time.process_time() - start)
    return size / min(times[1:]) / 1e6


def main(argv: Sequence[str] | None = None) -> int:
    """Time steps on files and print a table."""
    parser = argparse.ArgumentParser(prog="python -m fastlm.data.clean", description="MB/s of each step on one core")
    parser.add_argument("files", nargs="+", type=Path, help="UTF-8 text")
    parser.add_argument("--html", action="store_true", help="the files are pages of HTML")
    parser.add_argument("--steps", nargs="+", default=None, help="these alone")
    options = parser.parse_args(argv)
    if options.html:
        documents = [Document(path.read_text(encoding="utf-8"), str(path), 1) for path in options.files]
    else:
        documents = documents_of(options.files)
    names = options.steps or [info.name for info in steps() if (info.name in _HTML) == options.html]
    made: dict[str, Step] = {name: make_step(name) for name in names}
    if not options.html and not options.steps:
        made["default steps"] = chain([make_step(name) for name in DEFAULT_STEPS])
    for name, step in made.items():
        print(f"{name:<20} {rate(step, documents):8.1f} MB/s", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
