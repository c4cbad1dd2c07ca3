"""Counts in a kernel's SASS: instructions, and the bytes that they move through global memory, loop by loop.

What nvdisasm prints is read, so that what is counted is what runs: ptxas has scheduled, unrolled and allocated by then.
A loop is what lies between a label and the last jump back to it; a jump back from a slow path that was put behind the
last exit makes none. An instruction counts for the innermost loop around it and, outside of all, for the kernel once.
Padding (NOP) and the endless jump behind the last exit count nowhere.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import aot_resources

LINE = re.compile(
    r"^\s+/\*(?P<place>[0-9a-f]{4,})\*/\s+(?:\{\s*)?(?P<guard>@!?U?P\w+\s+)?(?P<code>[A-Z][\w.]*)(?P<rest>[^;]*);"
)
LABEL = re.compile(r"^(\.L\w*):")
TARGET = re.compile(r"`\((\.L\w+)\)")
WIDTH = re.compile(r"\.(?:U|S)?(8|16|64|128)\b")  # bits; 32 where none is named
LOADS = "LDG", "LDGSTS"
STORES = "STG"


class Instruction(NamedTuple):
    """One of a kernel's."""

    place: int  # address
    guard: str  # the predicate that it runs under, or nothing
    code: str  # with its modifiers
    rest: str  # operands

    @property
    def name(self) -> str:
        return self.code.partition(".")[0]

    @property
    def bytes(self) -> int:
        """What a thread moves by an access to memory."""
        found = WIDTH.search(self.code)
        return int(found[1]) // 8 if found else 4


@dataclass
class Region:
    """A loop without those inside of it, or what is outside of all; counts are of one thread and one turn."""

    first: int = 0
    last: int = 0
    depth: int = 0
    instructions: int = 0
    loads: Counter[int] = field(default_factory=Counter)  # by bytes
    stores: Counter[int] = field(default_factory=Counter)
    names: Counter[str] = field(default_factory=Counter)

    def take(self, instruction: Instruction) -> None:
        self.instructions += 1
        self.names[instruction.name] += 1
        if instruction.name in LOADS:
            self.loads[instruction.bytes] += 1
        elif instruction.name == STORES:
            self.stores[instruction.bytes] += 1

    @property
    def stream(self) -> int:
        """Bytes of the widest loads: a row's elements, where those that are one for a whole row are narrower."""
        width = max(self.loads, default=0)
        return width * self.loads[width]

    @property
    def stored(self) -> int:
        return sum(width * count for width, count in self.stores.items())


def disassembled(cubin: bytes) -> str:
    """What nvdisasm says of a compiled kernel; it comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(aot_resources.NVIDIA / "nvdisasm"), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parsed(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """(instructions, where each label is) of one kernel's disassembly."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in text.splitlines():
        if label := LABEL.match(line):
            waiting.append(label[1])
        elif code := LINE.match(line):
            place = int(code["place"], 16)
            labels |= dict.fromkeys(waiting, place)
            waiting = []
            found.append(Instruction(place, (code["guard"] or "").strip(), code["code"], code["rest"].strip()))
    return found, labels


def _jump(instruction: Instruction, labels: dict[str, int]) -> int | None:
    """Where a jump goes."""
    target = TARGET.search(instruction.rest) if instruction.name == "BRA" else None
    return labels.get(target[1]) if target else None


def regions(text: str) -> list[Region]:
    """[what is outside of all loops, the loops in the order in which they begin] of a kernel's disassembly."""
    code, labels = parsed(text)
    ends: dict[int, int] = {}
    final = max((instruction.place for instruction in code if instruction.name == "EXIT"), default=0)
    for instruction in code:
        target = _jump(instruction, labels)
        if target is not None and target < final < instruction.place:
            continue  # back from a slow path that was put behind the last exit: where a wait was not over at once
        if target is not None and target < instruction.place:  # to itself: the endless one behind the last exit
            ends[target] = max(ends.get(target, 0), instruction.place)
    loops = [Region(first, last) for first, last in sorted(ends.items())]
    for loop in loops:
        loop.depth = sum(other.first <= loop.first and loop.last <= other.last for other in loops)
    outside = Region(0, code[-1].place if code else 0)
    for instruction in code:
        if instruction.name == "NOP" or _jump(instruction, labels) == instruction.place:
            continue
        around = [loop for loop in loops if loop.first <= instruction.place <= loop.last]
        max(around, key=lambda loop: loop.depth, default=outside).take(instruction)
    return [outside, *loops]


def crossing(found: list[Region]) -> bool:
    """Whether loops overlap without one being inside of the other, so that this way of counting would not do."""
    return any(a.first < b.first <= a.last < b.last for a, b in pairwise(found[1:]))
