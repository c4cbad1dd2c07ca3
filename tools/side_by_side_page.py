"""The page and the results file of tools/side_by_side.py, from the lines that it counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton

Line = dict[str, Any]
PEERS = ("liger", "fla", "tutorial")
NAMES = {"liger": "Liger 0.8.5", "fla": "fla-core 0.6.0", "tutorial": "Triton's tutorial", "fastlm": "fastlm"}
INTRODUCTION = """\
# Our Triton kernels beside other projects'

Made by `python tools/side_by_side.py`, with triton {triton}, from `benchmarks/results/{results}`: compiled ahead of
time for the same shapes and dtypes, run on no GPU. What is counted is SASS as nvdisasm prints it (`tools/sass.py`), so
after ptxas has scheduled, unrolled and allocated; how fast it is only a GPU can say.

The peers are liger-kernel 0.8.5, fla-core 0.6.0 (the kernels of flash-linear-attention; of its autotuner's
configurations the one that gives a thread 32 elements) and `06-fused-attention.py` of Triton's repository, through
their own launchers. Inputs are bfloat16; the tutorial writes float16 alone, which takes as many instructions.

- *Instructions*: of a thread, an element of a row. A loop counts as often as a program goes through it, columns that a
  tile has and the row has not count in full, and what a program does once is shared out over its rows: 32 of a
  backward program of the peers, which have one a multiprocessor, {each} of ours.
- *Bytes*: what a row loads and stores, the weights and a program's share of their gradients' partial sums included,
  without statistics. *16-byte*: the share of it that goes in accesses of 16 bytes a thread.
- *Loop*: instructions of the loop with most of the work (of the kernel, where there is none).
- *Issue*: the time that a GPU takes to issue all instructions, over the time that its memory takes to move a row's own
  bytes, from the data sheets of A100, H100 and B200. Well below 1, memory is the bound.
- *Spills*: places in loops that use the stack.
- *Ratio*: our instructions over the peer's.
"""
HEADERS = ("op", "columns", "by", "warps", "registers", "shared bytes", "spills", "loop", "instructions", "loaded",
           "stored", "16-byte", "issue", "ratio")  # fmt: skip
ATTENTION_HEADERS = (
    "op",
    "head size",
    "by",
    "registers",
    "shared bytes",
    "stack bytes",
    "instructions a tile",
    "ratio",
)


def _key(line: Line) -> tuple:
    return line["op"], line["N"]


def _beside(lines: list[Line]) -> Iterator[tuple[Line, str]]:
    """Each line, and our instructions over its."""
    own = {_key(line): line for line in lines if line["who"] == "fastlm"}
    order = ["fastlm", *PEERS]
    measure = "loop" if lines and lines[0]["op"].startswith("attention") else "per_element"
    for line in sorted(lines, key=lambda line: (*_key(line), order.index(line["who"]))):
        ours = own[_key(line)]
        yield line, "" if line is ours else f"{ours[measure] / line[measure]:.2f}"


def _row(line: Line, ratio: str) -> str:
    cells = [f"`{line['op']}`", line["N"], NAMES[line["who"]]]
    if line["op"].startswith("attention"):
        cells += [line["registers"], line["shared"], line["stack"], line["loop"], ratio]
    else:
        cells += [
            line["warps"], line["registers"], line["shared"], line["spills"], line["loop"],
            f"{line['per_element']:.1f}", f"{line['loaded']:.0f}", f"{line['stored']:.0f}", f"{line['wide']:.0%}",
            f"{line['issue']:.2f}", ratio,
        ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def _table(lines: list[Line], headers: tuple[str, ...]) -> str:
    rows = [_row(line, ratio) for line, ratio in _beside(lines)]
    return "\n".join([f"| {' | '.join(headers)} |", "|---" * len(headers) + "|", *rows]) + "\n"


def page(lines: list[Line], results: str, notes: str) -> str:
    """The whole page; notes is what follows the tables."""
    text = INTRODUCTION.format(triton=triton.__version__, results=results, each="16 to 32")
    for arch in dict.fromkeys(line["arch"] for line in lines):
        here = [line for line in lines if line["arch"] == arch]
        heads = [line for line in here if line["op"].startswith("attention")]
        rows = [line for line in here if line not in heads]
        text += f"\n## {arch}\n\n{_table(rows, HEADERS)}\n{_table(heads, ATTENTION_HEADERS)}"
    return text + notes


START = "\n## What it says\n"


def write(lines: list[Line], results: Path, where: Path) -> None:
    """The results file and the page, whose last section, written by hand, stays."""
    results.write_text(json.dumps({"triton": triton.__version__, "lines": lines}, indent=1) + "\n", encoding="utf-8")
    kept = where.read_text(encoding="utf-8") if where.exists() else ""
    notes = START + kept.partition(START)[2] if START in kept else ""
    where.write_text(page(lines, results.name, notes), encoding="utf-8")
