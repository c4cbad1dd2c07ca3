"""Checkpoints: one safetensors file each, replaced whole or not at all.

Tensors are named `model.<parameter>`, `optimizer.<parameter>.<state>` and `rng.<generator>`. The header's
metadata holds, as JSON, the model's and the run's configuration, the step, the tokenizer's fingerprint,
the loop's own state, what the model carries along about generating, and a checksum of each tensor and of the
metadata; files of earlier versions have no checksums. Files hold nothing that runs code when it is read.

A run folder holds up to three: `last.safetensors` and `previous.safetensors`, which can be resumed from and take 12
bytes a parameter each, and `best.safetensors`, of 4. One more lies beside them while it is written.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._core.tensor_file import open_safetensors
from .._core.tensor_writer import CHECKSUMS, damage, write_tensors
from ..errors import CheckpointError, shown
from ..models.common.generation import NOTHING_SAID, generation_of

if TYPE_CHECKING:
    pass

FORMAT = "fastlm.checkpoint/1"
LAST, PREVIOUS, BEST = "last.safetensors", "previous.safetensors", "best.safetensors"
TOKENIZER_FINGERPRINT = "tokenizer_fingerprint"
FIELDS: dict[str, type] = {  # of the metadata
    "model_config": dict,
    "train_config": dict,
    "step": int,
    TOKENIZER_FINGERPRINT: str,
    "state": dict,
}


@dataclass
class Checkpoint:
    """What a checkpoint file holds; `tensors` carry their prefixes."""

    path: Path
    model_config: dict[str, Any]
    train_config: dict[str, Any]
    step: int
    tokenizer_fingerprint: str
    state: dict[str, Any]
    tensors: dict[str, Tensor]
    generation: dict[str, Any] | None = None

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below `prefix.`, without it."""
        prefix += "."
        return {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}


def as_stored(config: Any) -> dict[str, Any]:
    """A model's configuration as a checkpoint gives it back: lists where it has tuples."""
    return json.loads(json.dumps(config.to_dict()))


def save_checkpoint(
    path: str | Path,
    model: Any,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int = 0,
    train_config: dict[str, Any] | None = None,
    tokenizer_fingerprint: str = "",
    state: dict[str, Any] | None = None,
    rng: dict[str, Tensor] | None = None,
    keep: str | Path | None = None,
) -> None:
    """Write a checkpoint; an earlier file of that name stays intact unless the new one is complete.

    Args:
        path: the file, by custom `last.safetensors` or `best.safetensors` in a run folder.
        model: a tensor that has two names is stored under the first.
        optimizer: its state is stored too; without it the checkpoint serves inference only.
        step: optimizer steps done.
        train_config: the run's configuration.
        tokenizer_fingerprint: sha256 of the tokenizer file that the model was trained with.
        state: anything else that JSON can hold.
        rng: tensors of the random generators, see `fastlm.training.rng`.
        keep: where an earlier file of that name goes, instead of being lost.

    Raises:
        CheckpointError: if the file cannot be written, with the reason (a full disk, say).
    """
    path = Path(path)
    tensors = {f"model.{name}": tensor for name, tensor in owned_tensors(model).items()}
    if optimizer is not None:
        tensors |= {f"optimizer.{name}": t for name, t in _optimizer_tensors(model, optimizer).items()}
    tensors |= {f"rng.{name}": tensor for name, tensor in (rng or {}).items()}
    metadata = {
        "format": FORMAT,
        "model_config": json.dumps(as_stored(model.config)),
        "train_config": json.dumps(train_config or {}),
        "step": json.dumps(step),
        "tokenizer_fingerprint": json.dumps(tokenizer_fingerprint),
        "state": json.dumps(state or {}),
    }
    if (generation := generation_of(model)) != NOTHING_SAID:
        metadata["generation"] = json.dumps(generation.to_dict())
    try:
        write_tensors(path, tensors, metadata, checksums=True, keep=keep)
    except OSError as error:
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        free = f", {shutil.disk_usage(path.parent).free} free" if path.parent.is_dir() else ""
        raise CheckpointError(f"{path}: could not write {size} bytes{free}: {error}") from error


def load_checkpoint(path: str | Path, *, model_only: bool = False) -> Checkpoint:
    """Read a checkpoint into CPU memory.

    Args:
        path: a checkpoint file, or a run folder, which stands for its `last.safetensors`.
        model_only: leave the optimizer and the generators in the file.

    Raises:
        CheckpointError: if the file is missing, cut short, not safetensors, not a fastlm checkpoint, or has changed
            since it was written, naming the tensor.
    """
    path = Path(path)
    if path.is_dir():
        path /= LAST
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    with _naming_instead(path):
        file = open_safetensors(path)
        fields = _metadata(path, file.metadata or None)
        names = [name for name in file.tensors if name.startswith("model.") or not model_only]
        tensors = {name: file.tensors[name].read(None) for name in names}
        if found := damage(file.metadata, file.tensors, tensors):
            raise CheckpointError(f"{path}: {found}")
    return Checkpoint(path=path, tensors=tensors, **fields)


def format_of(path: Path) -> str:
    """What a safetensors file says it is; nothing if it does not say.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    with _naming_instead(path):
        return open_safetensors(path).metadata.get("format", "")


def load_resumable(folder: Path) -> tuple[Checkpoint, str]:
    """The newest checkpoint of a run folder that is whole, and why it is not `last.safetensors` if it is not.

    Raises:
        CheckpointError: if there is none; it names what is wrong with each.
    """
    wrong: list[str] = []
    for name in (LAST, PREVIOUS):
        if wrong and not (folder / name).is_file():
            continue
        try:
            return load_checkpoint(folder / name), "".join(wrong)
        except CheckpointError as error:
            wrong.append(str(error))
    raise CheckpointError("; ".join(wrong))


def restore_model(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Copy a checkpoint's weights into `model`, which keeps its own dtype and device.

    Raises:
        CheckpointError: naming the first tensors that are missing, unknown or of another shape; the model
            is then unchanged.
    """
    _copy_all(checkpoint, "model", owned_tensors(model))


def restore_optimizer(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give `optimizer` the state that the checkpoint holds for the parameters of `model`.

    Raises:
        CheckpointError: if the state is missing or is that of another model.
    """
    stored = checkpoint.part("optimizer")
    if not stored and not checkpoint.part("rng"):
        raise CheckpointError(f"{checkpoint.path}: holds no optimizer state, so it cannot be resumed from")
    if not stored:  # interrupted before the first update
        return
    for name, parameter in model.named_parameters():
        state = {key: stored.pop(f"{name}.{key}", None) for key in ("step", "exp_avg", "exp_avg_sq")}
        for key, tensor in state.items():
            wanted = () if key == "step" else tuple(parameter.shape)
            got = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            if tensor is None or tuple(tensor.shape) != wanted:
                raise CheckpointError(f"{checkpoint.path}: optimizer.{name}.{key} is {got}, expected {wanted}")
        optimizer.state[parameter] = {
            key: t.to(parameter.device, torch.float32) if key == "step" else t.to(parameter.device)
            for key, t in state.items()
            if t is not None
        }
    if stored:
        raise CheckpointError(f"{checkpoint.path}: {_some(stored)} belong to no parameter of this model")


def check_tokenizer(path: Path, trained_with: str, fingerprint: str, source: str) -> None:
    """Raise CheckpointError unless the model in `path` was trained with this tokenizer, that of `source`."""
    if trained_with != fingerprint:
        raise CheckpointError(
            f"{path}: trained with tokenizer {trained_with[:12] or '(none)'}, but {source} is {fingerprint[:12]}"
        )


def owned_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state dict, each under its first name: tied weights appear once."""
    seen: set[int] = set()
    owned = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            owned[name] = tensor
    return owned


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _metadata(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    found = (metadata or {}).get("format")
    if metadata is None or found != FORMAT:
        raise CheckpointError(f"{path}: format is {shown(found)}, expected {FORMAT!r}: not a fastlm checkpoint")
    # A damaged name must not turn the checksums into something else that nobody looks at.
    if odd := sorted(metadata.keys() - FIELDS.keys() - {"format", "generation", CHECKSUMS}):
        raise CheckpointError(
            f"{path}: its metadata is damaged, or of a later version: it has the entry {shown(odd[0])}"
        )
    try:
        values = {name: json.loads(metadata[name]) for name in FIELDS}
        values["generation"] = json.loads(metadata.get("generation", "null"))
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata is damaged: {shown(error)}") from None
    for name, kind in FIELDS.items():
        if type(values[name]) is not kind:
            raise CheckpointError(f"{path}: its metadata is damaged: {name} is no {kind.__name__}")
    if not isinstance(values["generation"], (dict, type(None))):
        raise CheckpointError(f"{path}: its metadata is damaged: generation is no dict")
    return values


@contextlib.contextmanager
def _naming_instead(path: Path) -> Iterator[None]:
    """Add to an error about a folder's best checkpoint what else there is."""
    try:
        yield
    except CheckpointError as error:
        last = path.with_name(LAST)
        if path.name != BEST or not last.is_file():
            raise
        raise CheckpointError(f"{error}; {last} can be given in its place") from None


def check_fit(checkpoint: Checkpoint, prefix: str, wanted: dict[str, Tensor]) -> None:
    """Raise CheckpointError unless the checkpoint holds `wanted` tensors below `prefix.`, and no others."""
    stored = checkpoint.part(prefix)
    if missing := [name for name in wanted if name not in stored]:
        raise CheckpointError(f"{checkpoint.path}: lacks {_some(missing)} of the model's tensors")
    if extra := [name for name in stored if name not in wanted]:
        raise CheckpointError(f"{checkpoint.path}: holds {_some(extra)}, which the model has not")
    for name, tensor in wanted.items():
        if stored[name].shape != tensor.shape:
            raise CheckpointError(
                f"{checkpoint.path}: {prefix}.{name} has shape {tuple(stored[name].shape)}, "
                f"the model has {tuple(tensor.shape)}"
            )


def _copy_all(checkpoint: Checkpoint, prefix: str, wanted: dict[str, Tensor]) -> None:
    check_fit(checkpoint, prefix, wanted)
    stored = checkpoint.part(prefix)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(stored[name])


def _some(names) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
