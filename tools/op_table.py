"""Writes the README's table of ops from their specifications (fastlm/_core/registry.py).

python tools/op_table.py [FILE]     between <!-- ops --> and <!-- /ops --> of FILE, the README by default
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import fastlm
from fastlm._core import proofs
from fastlm._core.registry import Op, ops

README = Path(__file__).resolve().parents[1] / "README.md"
MARKED = re.compile(r"(?<=<!-- ops -->\n).*?(?=<!-- /ops -->)", re.DOTALL)
HEADERS = ("op", "may be given", "`cpu`: C++ SIMD", "`triton`", "`cuda`: C++", "`torch`")


def optional(op: Op) -> list[str]:
    return [name for name, parameter in op.parameters.items() if parameter.default is not parameter.empty]


def unserved(op: Op, backend: str) -> list[str]:
    """Arguments that may be given, but not to this backend."""
    row, (first, *others) = op.backend(backend), op.samples()
    found = []
    for name in optional(op):
        values = [sample[name] for sample in others if name in sample]
        calls = [first | {name: value} for value in values[:1]]
        if row and any(row.unsupported(fastlm.explain(op.function, **call).request) for call in calls):
            found.append(name)
    return found


def cell(op: Op, backend: str) -> str:
    row = op.backend(backend)
    if row is None:
        return "-"
    if row.needs_proof:
        return ", ".join(sorted(_proved_on(op, backend))) or "unproved"
    without = unserved(op, backend) if backend == "torch" else []
    return f"without {_names(without)}" if without else "yes"


def _proved_on(op: Op, backend: str) -> set[str]:
    """The architectures of which the package brings a proof of this kernel."""
    right = [
        (proof.key.architecture, entry)
        for proof in proofs.shipped()
        for entry in proof.entries.values()
        if entry.verdict == "right"
    ]
    return {architecture for architecture, entry in right if (entry.op, entry.backend) == (op.name, backend)}


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def table() -> str:
    lines = [f"| {' | '.join(HEADERS)} |", "|---" * len(HEADERS) + "|"]
    for op in ops():
        name = f"`{op.name}`: {op.note}" if op.note else f"`{op.name}`"
        cells = (name, _names(optional(op)) or "-", *(cell(op, b) for b in ("cpu", "triton", "cuda", "torch")))
        lines.append(f"| {' | '.join(cells)} |")
    return "".join(line + "\n" for line in lines)


def filled(text: str) -> str:
    """The text with its table as it should be.

    Raises:
        ValueError: if it does not say in one place where the table goes.
    """
    if len(MARKED.findall(text)) != 1:
        raise ValueError("there is no one place between <!-- ops --> and <!-- /ops -->")
    return MARKED.sub(lambda _: table(), text)


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else README
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
