"""Tensors that still lie in a file: what its header says of them, checked against its size, and one read at a time.

Nothing is mapped into memory: what is read is owned, and a model that is filled tensor by tensor never takes more
than one copy of the weights and one tensor.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError

HEADER_LIMIT = 100_000_000  # bytes, the limit of the safetensors library
MAX_RANK = 64
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # what a parameter may be stored in


class Stored(NamedTuple):
    """A tensor that lies in a file.

    Attributes:
        name: the file's.
        shape, dtype: of what `read` returns.
        read: (None or a contiguous tensor of this shape and dtype to read into) -> the tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[Tensor | None], Tensor]


class TensorFile(NamedTuple):
    """What the header of a safetensors file says."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, Stored]


def open_safetensors(path: Path) -> TensorFile:
    """Read a safetensors file's header; every tensor that it names lies within the file.

    Raises:
        CheckpointError: for a missing file, or one that is cut short, damaged or no safetensors file.
    """
    with opened(path) as file:
        size, stamp = os.fstat(file.fileno()).st_size, stamp_of(file)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise damaged(path, f"{size} bytes are less than its header's length says")
        text = file.read(length)
    header = parse_json(text, lambda reason: damaged(path, f"its header is not JSON: {reason}"))
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(path, "its header is not a JSON object with metadata of strings")
    begins = 8 + length
    places = {name: _place(path, name, entry) for name, entry in header.items()}
    end = 0
    for name, (_, _, first, last) in sorted(places.items(), key=lambda item: item[1][2:]):
        if first != end:
            raise damaged(path, f"{name} begins at byte {first} of the data, expected {end}")
        end = last
    if begins + end != size:
        raise damaged(path, f"has {size} bytes, its header promises {begins + end}")
    tensors = {
        name: Stored(name, shape, dtype, _reader(path, stamp, begins + first, shape, dtype))
        for name, (shape, dtype, first, _) in places.items()
    }
    return TensorFile(path, metadata, tensors)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading without a buffer.

    Raises:
        CheckpointError: if there is none, or it cannot be read, in the block too.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        with open(path, "rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def parse_json(text: bytes, refusal: Callable[[str], Exception]) -> Any:
    """The value of a JSON text.

    Raises:
        what `refusal` makes of the reason, for text that is no JSON or nested too deeply.
    """
    try:
        return json.loads(text)
    except ValueError as error:  # no UTF-8, no JSON, or a number of thousands of digits
        raise refusal(str(error)) from error
    except RecursionError:
        raise refusal("nested too deeply") from None


def damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: cut short or not a safetensors file: {reason}")


def read_bytes(path: Path, stamp: tuple[int, ...], start: int, into: Any) -> None:
    """Fill the buffer `into` from byte `start` of the file that had this `stamp` when its header was read.

    Raises:
        CheckpointError: if it is another file by now, or cannot be read.
    """
    rest = memoryview(into).cast("B")
    with opened(path) as file:
        if stamp_of(file) != stamp:
            raise CheckpointError(f"{path}: was changed while it was read")
        file.seek(start)
        while len(rest):
            read = file.readinto(rest)  # type: ignore[attr-defined]  # at most 2 GiB at once
            if not read:
                raise CheckpointError(f"{path}: was changed while it was read")
            rest = rest[read:]


def stamp_of(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _reader(
    path: Path, stamp: tuple[int, ...], start: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Callable[[Tensor | None], Tensor]:
    def read(into: Tensor | None = None) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype) if into is None else into
        if tensor.numel():
            read_bytes(path, stamp, start, tensor.detach().reshape(-1).view(torch.uint8).numpy())
        return tensor

    return read


def _place(path: Path, name: str, entry: Any) -> tuple[tuple[int, ...], torch.dtype, int, int]:
    """Shape, dtype, and the first byte of the data and the one after the last."""
    if not name.isprintable():
        raise damaged(path, f"a tensor is called {name!r:.80}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"its header's entry for {name} is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise damaged(path, f"{name} has dtype {dtype!r:.40}, expected one of {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > MAX_RANK:
        raise damaged(path, f"{name} has shape {shape!r:.80}, expected up to {MAX_RANK} extents of at least 0")
    if not _counts(offsets) or len(offsets) != 2:
        raise damaged(path, f"{name} has data_offsets {offsets!r:.80}, expected two numbers of bytes")
    if math.prod(max(extent, 1) for extent in shape) >= 2**62:  # of which torch cannot tell the strides
        raise damaged(path, f"{name} has shape {shape!r:.80}, beyond 64 bits")
    first, last = offsets
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if last - first != size:
        raise damaged(path, f"{name} of shape {tuple(shape)!r:.80} takes {size} bytes, its data_offsets are {offsets}")
    return tuple(shape), DTYPES[dtype], first, last


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
