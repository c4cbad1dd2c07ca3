"""GGUF files: settings and tensors, as the specification in ggml's docs/gguf.md has them.

Every count and size is compared with what is left of the file before it is believed.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..._core.tensor_file import Stored, opened, read_bytes, stamp_of
from ...errors import CheckpointError

VERSIONS = (2, 3)
MAX_RANK = 4  # GGML_MAX_DIMS
ALIGNMENT = 32  # where no setting says another
CHUNK = 2**22  # values that are dequantized at once
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class GGUFFile(NamedTuple):
    """What the header of a GGUF file says."""

    fields: dict[str, Any]
    tensors: dict[str, Stored]


class _Cursor:
    """Reads a file's bytes from the front; refuses what would lie behind its end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 0

    def damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: cut short or not a GGUF file: {reason}")

    def room(self, count: int, size: int, what: str) -> None:
        left = len(self.data) - self.at
        if count * size > left:
            raise self.damaged(f"{count} {what} at byte {self.at}, where {left} bytes are left")

    def numbers(self, code: str, count: int = 1) -> list[Any]:
        size = struct.calcsize(f"<{code}")
        self.room(count, size, f"numbers of {size} bytes")
        values = struct.unpack_from(f"<{count}{code}", self.data, self.at)
        self.at += count * size
        return list(values)

    def number(self, code: str) -> Any:
        return self.numbers(code)[0]

    def text(self) -> str:
        length = self.number("Q")
        self.room(length, 1, "characters")
        raw = self.data[self.at : self.at + length]
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"the text at byte {self.at} is not UTF-8") from error
        self.at += length
        return text

    def name(self) -> str:
        name = self.text()
        if not name.isprintable():
            raise self.damaged(f"a setting or tensor is called {name!r:.80}")
        return name

    def value(self, kind: int, name: str) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise self.damaged(f"{name} is of the unknown type {kind}")
        (element,), (count,) = self.numbers("I"), self.numbers("Q")
        if element in SCALARS:
            return self.numbers(SCALARS[element], count)
        if element != STRING:
            raise self.damaged(f"{name} is an array of the unknown type {element}")
        self.room(count, 8, "texts")
        return [self.text() for _ in range(count)]


def open_gguf(path: Path, gguf: ModuleType | None = None) -> GGUFFile:
    """Read a GGUF file's header; every tensor that it names lies within the file.

    Args:
        path: the file.
        gguf: the package, which knows the formats of weights; without it only the settings are read.

    Raises:
        CheckpointError: for a missing file, or one that is cut short, damaged or no GGUF file.
    """
    with opened(path) as file:
        stamp = stamp_of(file)
        if not os.fstat(file.fileno()).st_size:
            raise CheckpointError(f"{path}: cut short or not a GGUF file: it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(path, data)
            tensor_count, fields = _fields(cursor)
            if gguf is None:
                return GGUFFile(fields, {})
            return GGUFFile(fields, _tensors(cursor, gguf, tensor_count, fields, stamp))


def _fields(cursor: _Cursor) -> tuple[int, dict[str, Any]]:
    cursor.room(24, 1, "bytes of a header")
    if cursor.data[:4] != b"GGUF":
        raise cursor.damaged("it does not begin with GGUF")
    cursor.at = 4
    version, tensor_count, count = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in VERSIONS:
        raise cursor.damaged(f"version is {version}, expected {' or '.join(map(str, VERSIONS))}, little-endian")
    cursor.room(count, 13, "settings")  # the length of a name, a type and a byte
    cursor.room(tensor_count, 24, "tensors")  # the length of a name, a rank, a type and an offset
    fields: dict[str, Any] = {}
    for _ in range(count):
        name, kind = cursor.name(), cursor.number("I")
        if name in fields:
            raise cursor.damaged(f"{name} is there twice")
        fields[name] = cursor.value(kind, name)
    return tensor_count, fields


def _tensors(
    cursor: _Cursor, gguf: ModuleType, count: int, fields: dict[str, Any], stamp: tuple[int, ...]
) -> dict[str, Stored]:
    alignment = fields.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.damaged(f"general.alignment is {alignment!r:.40}, expected a power of two")
    found: dict[str, tuple[tuple[int, ...], Any, int, int]] = {}
    end = 0
    for _ in range(count):
        name, rank = cursor.name(), cursor.number("I")
        if name in found or rank > MAX_RANK:
            raise cursor.damaged(f"{name} is there twice" if name in found else f"{name} has {rank} dimensions")
        shape = tuple(reversed(cursor.numbers("Q", rank)))  # GGUF lists extents from the innermost on
        kind, offset = cursor.number("I"), cursor.number("Q")
        if offset != end:
            raise cursor.damaged(f"{name} begins at byte {offset} of the data, expected {end}")
        try:
            kind = gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise cursor.damaged(f"{name} is of the unknown type {kind}") from None
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise cursor.damaged(f"{name} has shape {shape}, expected rows of a multiple of {block} for {kind.name}")
        size = math.prod(shape) // block * block_bytes
        found[name] = (shape, kind, offset, size)
        end = _aligned(offset + size, alignment)
    begins = _aligned(cursor.at, alignment)
    promised = max((begins + offset + size for _, _, offset, size in found.values()), default=0)
    if promised > len(cursor.data):
        raise cursor.damaged(f"has {len(cursor.data)} bytes, its header promises {promised}")
    place = cursor.path, stamp
    return {
        name: Stored(name, shape, torch.float32, _Weights(name, shape, kind, begins + offset, size, place, gguf).read)
        for name, (shape, kind, offset, size) in found.items()
    }


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


class _Weights(NamedTuple):
    """A tensor's place in a file: `size` bytes from `start` on, and the file with the stamp that it had."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    start: int
    size: int
    place: tuple[Path, tuple[int, ...]]
    gguf: ModuleType

    def read(self, into: Tensor | None = None) -> Tensor:
        """The tensor in fp32, dequantized a few rows at a time."""
        tensor = torch.empty(self.shape) if into is None else into
        if not self.size:
            return tensor
        values = tensor.detach().view(-1, self.shape[-1]).numpy()
        row_bytes, step = self.size // len(values), max(1, CHUNK // self.shape[-1])
        raw = np.empty((min(step, len(values)), row_bytes), np.uint8)
        for row in range(0, len(values), step):
            part = raw[: len(values) - row]
            read_bytes(*self.place, self.start + row * row_bytes, part)
            try:
                # Not a number in a block's scale is no reason to warn: who asks for it is told of every one.
                with np.errstate(all="ignore"):
                    values[row : row + step] = self.gguf.dequantize(part, self.kind)
            except (NotImplementedError, ValueError) as error:
                raise CheckpointError(f"{self.place[0]}: {self.name} is {self.kind.name}: {error}") from error
        return tensor
