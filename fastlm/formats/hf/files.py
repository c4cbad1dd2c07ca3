"""Model folders on disk: JSON settings beside safetensors, whole or in shards; replaced whole or not at all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._core.files import staging
from ..._core.tensor_file import DTYPES, Stored, open_safetensors, opened, parse_json
from ...errors import CheckpointError
from ...models.common.config import shown

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        CheckpointError: if the file is missing, no JSON, or holds something else.
    """
    with opened(path) as file:
        text = file.read()
    value = parse_json(text, lambda reason: CheckpointError(f"{path}: not JSON: {reason}"))
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def read_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder, under the names of its files.

    Raises:
        CheckpointError: for a missing, cut or foreign file.
    """
    whole, index = folder / WHOLE, folder / INDEX
    if whole.exists():
        return _read_safetensors(whole)
    if index.exists():
        return _read_shards(folder, index, _read_safetensors)
    pickle, pickle_index = (folder / name for name in PICKLES)
    if pickle.exists():
        return read_pickle(pickle)
    if pickle_index.exists():
        return _read_shards(folder, pickle_index, read_pickle)
    raise CheckpointError(f"{whole}: no such file")


def _read_safetensors(path: Path) -> dict[str, Stored]:
    return open_safetensors(path).tensors


def _read_shards(folder: Path, index: Path, read: Callable[[Path], dict[str, Stored]]) -> dict[str, Stored]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise CheckpointError(f"{index}: has no weight_map")
    for shard in shards.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.isprintable():
            raise CheckpointError(f"{index}: names the shard {shown(shard)}, expected a file beside it")
    tensors: dict[str, Stored] = {}
    for shard in sorted(set(shards.values())):
        found = read(folder / shard)
        if twice := sorted(found.keys() & tensors.keys()):
            raise CheckpointError(f"{folder / shard}: holds tensors of another shard: {listed(twice)}")
        tensors |= found
    if absent := sorted(shards.keys() - tensors.keys()):
        raise CheckpointError(f"{index}: names tensors that its shards have not: {listed(absent)}")
    return tensors


def read_pickle(path: Path) -> dict[str, Stored]:
    """The tensors of a `torch.save` file, read without running anything that it may hold.

    Raises:
        CheckpointError: for a missing or cut file, one that would run code, or one that is no dict of tensors whose
            values lie in it.
    """
    with opened(path) as file:  # torch maps what lies uncompressed in an archive; older files are read whole
        archive, size = file.read(4) == b"PK\x03\x04", os.fstat(file.fileno()).st_size
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:  # unpickling raises anything
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"{path}: a pickle that holds more than tensors could run code and is not read, or it is cut "
            f"short; save the weights as safetensors: {reason}"
        ) from error
    if not isinstance(value, dict) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, expected a dictionary of tensors")
    if odd := [f"{shown(name, str)} {found}" for name, tensor in value.items() if (found := _oddity(tensor, size))]:
        raise CheckpointError(f"{path}: {listed(odd)}")
    return {str(name): _in_memory(str(name), tensor) for name, tensor in value.items()}


def _oddity(tensor: Tensor, size: int) -> str:
    """Why the values of a tensor do not lie in a file of `size` bytes; nothing if they do."""
    if tensor.dtype not in DTYPES.values():
        return f"has dtype {tensor.dtype}, expected one that safetensors files have"
    if tensor.layout != torch.strided:
        return f"has the layout {tensor.layout}, expected torch.strided"
    if tensor.is_meta:
        return "is on meta, without values"
    if tensor.nbytes > size:  # an expanded one can have any shape
        return f"has shape {tuple(tensor.shape)}, more than the {size} bytes of the file"
    return ""


def _in_memory(name: str, tensor: Tensor) -> Stored:
    tensor = tensor.detach()  # a parameter may have been saved as one

    def read(into: Tensor | None = None) -> Tensor:
        return tensor if into is None else into.copy_(tensor)

    return Stored(name, tuple(tensor.shape), tensor.dtype, read)


def write_folder(
    folder: Path,
    settings: dict[str, Any],
    tensors: dict[str, Tensor],
    shard_bytes: int,
    generation: dict[str, Any] | None = None,
) -> None:
    """Write config.json and the tensors, in shards of at most `shard_bytes` if they are more than that.

    generation_config.json is written too where there is something to write.

    All files are complete on the disk before any takes its place. A folder that does not exist appears with
    all of them at once; in one that does, files of a model saved there earlier go, and others stay.

    Raises:
        CheckpointError: if the files cannot be written; older ones are then untouched.
    """
    from safetensors import SafetensorError

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with staging(folder) as temporary:
            if generation:
                _write_json(temporary / GENERATION, generation)
            _write_files(temporary, settings, tensors, shard_bytes)
            _move_in(temporary, folder)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder}: the model could not be written: {error}") from error


def _write_files(temporary: Path, settings: dict[str, Any], tensors: dict[str, Tensor], shard_bytes: int) -> None:
    from safetensors.torch import save_file

    shards = _shards(tensors, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WHOLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: tensors[name].contiguous() for name in names}, temporary / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        _write_json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(temporary / CONFIG, settings)
    umask = os.umask(0)
    os.umask(umask)
    for path in temporary.iterdir():
        path.chmod(0o666 & ~umask)  # safetensors leaves its own to the owner alone
        with open(path, "rb+") as written:
            os.fsync(written.fileno())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: dict[str, Tensor], shard_bytes: int) -> list[list[str]]:
    """Names in order, a new shard where one more tensor would be too much."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards


def _move_in(staging: Path, folder: Path) -> None:
    if not folder.exists():
        os.rename(staging, folder)
        return
    fresh = {path.name for path in staging.iterdir()}
    for name in sorted(fresh, key=lambda name: (name == CONFIG, name)):
        os.replace(staging / name, folder / name)
    for path in list(folder.iterdir()):
        if path.name not in fresh and (path.name in (WHOLE, INDEX, GENERATION) or SHARD.fullmatch(path.name)):
            path.unlink()


def listed(names: list[str], at_most: int = 6) -> str:
    """The first of `names`, and how many more there are."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more
