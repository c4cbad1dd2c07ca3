"""Safetensors files: written whole or not at all, and with checksums if wanted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .files import replacing, sync
from .tensor_file import DTYPES

CHECKSUMS = "checksums"  # the metadata's entry that holds them
ALGORITHM = "xxh3_64"
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str],
    *,
    checksums: bool = False,
    keep: str | os.PathLike[str] | None = None,
) -> None:
    """Write a safetensors file; an earlier file of that name stays intact unless the new one is complete.

    The library's own writer makes a second temporary file, whose name does not say whose it is.

    Args:
        tensors: of any device and strides; each name gets a copy of its own.
        checksums: add one for each tensor and one for the metadata, under the metadata's entry "checksums".
        keep: where an earlier file goes, see `replacing`.

    Raises:
        OSError: if the file cannot be written.
    """
    # Wide types first, so that every tensor lies at a multiple of its own size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    data = {name: _bytes(tensors[name]) for name in order}
    entries: dict[str, Any] = {}
    end = 0
    for name in order:
        start, end = end, end + data[name].nbytes
        entries[name] = {"dtype": NAMES[tensors[name].dtype], "shape": list(tensors[name].shape)}
        entries[name]["data_offsets"] = [start, end]
    blank = _with_checksums(metadata, dict.fromkeys(tensors, "0" * 16)) if checksums else metadata
    with replacing(path, keep) as temporary, open(temporary, "wb") as file, ThreadPoolExecutor(1) as pool:
        file.write(_header(entries, blank))
        for name in order:
            file.write(data[name].data)
        if checksums:
            # While the disk is waited for: 503 MB take 35 ms, their way to a disk 0.3 s and more.
            sums = pool.map(_checksum, tensors.values(), [data[name] for name in tensors])
            sync(file)
            file.seek(0)
            file.write(_header(entries, _with_checksums(metadata, dict(zip(tensors, sums, strict=True)))))


def damage(metadata: dict[str, str], names: Iterable[str], tensors: Mapping[str, Tensor]) -> str:
    """What of a file does not match its checksums; nothing if all does, or if it has none.

    Args:
        metadata: of the file.
        names: of all its tensors.
        tensors: those to check.
    """
    if CHECKSUMS not in metadata:
        return ""
    try:
        stored = json.loads(metadata[CHECKSUMS])
        algorithm, whole, sums = stored["algorithm"], stored["metadata"], dict(stored["tensors"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return f"its checksums are damaged: {error!r}"
    if algorithm != ALGORITHM:
        return f"its checksums are {algorithm!r}, expected {ALGORITHM!r}"
    if whole != _metadata_checksum(metadata):
        return "its metadata does not match its checksum"
    if odd := sorted(set(names).symmetric_difference(sums)):
        return f"its header is damaged: it has a tensor without checksum or a checksum without tensor, {odd[0]!r}"
    wrong = [name for name, tensor in tensors.items() if sums[name] != _checksum(tensor, _bytes(tensor))]
    if wrong:
        more = f" and {len(wrong) - 1} more tensors do" if len(wrong) > 1 else " does"
        return f"damaged: the tensor {wrong[0]}{more} not match the checksum"
    return ""


def _bytes(tensor: Tensor) -> np.ndarray:
    """A tensor's bytes in row-major order, a view where that is possible."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _checksum(tensor: Tensor, data: np.ndarray) -> str:
    import xxhash

    digest = xxhash.xxh3_64(f"{NAMES[tensor.dtype]} {list(tensor.shape)}".encode())
    digest.update(data.data)
    return digest.hexdigest()


def _metadata_checksum(metadata: dict[str, str]) -> str:
    import xxhash

    rest = sorted((key, value) for key, value in metadata.items() if key != CHECKSUMS)
    return xxhash.xxh3_64_hexdigest(json.dumps(rest).encode())


def _with_checksums(metadata: dict[str, str], sums: dict[str, str]) -> dict[str, str]:
    stored = {"algorithm": ALGORITHM, "metadata": _metadata_checksum(metadata), "tensors": sums}
    return metadata | {CHECKSUMS: json.dumps(stored)}


def _header(entries: dict[str, Any], metadata: dict[str, str]) -> bytes:
    text = json.dumps({"__metadata__": metadata} | entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
