"""`fastlm.load` and `fastlm.save`: any model, from and to any format that is known."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError, DataError
from ..models.bert import BERT, BERTConfig
from ..models.common.generation import NOTHING_SAID, Generation, carry
from ..models.gpt import GPT, GPTConfig
from ..models.llama import Llama, LlamaConfig
from ..models.seq2seq import Seq2Seq, Seq2SeqConfig
from .hf.files import CONFIG, PICKLES
from .hf.layout import SHARD_BYTES
from .hf.layout import load as load_folder
from .hf.layout import save as save_folder

if TYPE_CHECKING:
    from ..training.checkpoint import Checkpoint

MODELS: dict[str, tuple[type[nn.Module], Any]] = {
    "GPT": (GPT, GPTConfig),
    "BERT": (BERT, BERTConfig),
    "Llama": (Llama, LlamaConfig),
    "Seq2Seq": (Seq2Seq, Seq2SeqConfig),
}
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


def load(
    path: str | os.PathLike[str],
    *,
    dropout: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Load a model, in evaluation mode, from whatever lies at `path`.

    Args:
        path: a Hugging Face folder (config.json with safetensors, whole or sharded, or a pickle of tensors) of
            GPT-2, BERT, RoBERTa, Llama, Mistral, Qwen2 or Marian; a GGUF file of a Llama type, which is
            dequantized (needs the `gguf` package); a run folder of `fastlm train`, which stands for its best
            checkpoint or, without one, its last; or a checkpoint file.
        dropout: replaces the rates of a folder or GGUF file, for training on.
        dtype: of the parameters.
        device: where they go.

    Returns:
        GPT, BERT, Llama or Seq2Seq, by what the file says. Its `generation` keeps what the file says about generating
        (ids, lengths, sampling, beams), which the functions of `fastlm.inference` follow and `save` writes again.

    Raises:
        CheckpointError: for nothing or nothing known at `path`; an architecture that is not known, with those that
            are; a setting that is not supported; missing, extra or misshapen tensors, by name; a pickle that
            holds more than tensors.
    """
    path = resolve(path)
    if path.is_dir():
        model = load_folder(path, dropout, dtype)
    elif path.suffix == ".gguf":
        from .gguf.model import load_gguf

        model = load_gguf(path, dropout, dtype)
    elif path.suffix in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path}: tensors alone do not say which model they are of; expected a folder with config.json "
            f"beside {PICKLES[0]} or model.safetensors"
        )
    else:
        model = _load_checkpoint(path)
    return model.to(device, dtype).eval()


def resolve(path: str | os.PathLike[str]) -> Path:
    """What `path` stands for: a Hugging Face folder, a GGUF file, a checkpoint, or whatever file it names.

    Raises:
        CheckpointError: if there is nothing at `path`, or a folder that holds none of these.
    """
    from ..training.checkpoint import BEST, LAST

    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.is_file() or (path / CONFIG).is_file():
        return path
    for name in (BEST, LAST):
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise CheckpointError(f"{path}: expected {CONFIG}, {BEST}, {LAST} or one .gguf file in it")
    return files[0]


def restore(checkpoint: Checkpoint) -> nn.Module:
    """The model that a checkpoint is of.

    Raises:
        CheckpointError: for a class or a configuration that is not known, and tensors that do not fit it.
    """
    from ..training.checkpoint import restore_model

    name = checkpoint.state.get("model", "GPT")  # training's own checkpoints are of GPTs
    if name not in MODELS:
        raise CheckpointError(f"{checkpoint.path}: holds a {name}, expected one of {', '.join(MODELS)}")
    kind, config = MODELS[name]
    try:
        model = kind(config.from_dict(checkpoint.model_config))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path}: its model configuration is not one of a {name}: {error}") from None
    restore_model(checkpoint, model)
    if checkpoint.generation is not None:
        carry(model, Generation.from_dict(checkpoint.generation, str(checkpoint.path)))
    elif (token := _end_beside(checkpoint)) is not None:
        carry(model, NOTHING_SAID.with_end(token))
    return model


def _end_beside(checkpoint: Checkpoint) -> int | None:
    """The end of text of the tokenizer that lies beside a training run's checkpoint."""
    from ..data import Tokenizer

    file = checkpoint.path.parent / "tokenizer.json"
    if not checkpoint.tokenizer_fingerprint or not file.is_file():
        return None
    try:
        tokenizer = Tokenizer.load(file)
    except DataError:  # whoever needs the tokenizer will say so
        return None
    return tokenizer.eot_id if tokenizer.fingerprint == checkpoint.tokenizer_fingerprint else None


def save(model: nn.Module, path: str | os.PathLike[str], format: str = "hf", shard_bytes: int = SHARD_BYTES) -> None:
    """Write a model so that `load` reads it again.

    Args:
        model: GPT, BERT, Llama or Seq2Seq.
        path: a folder; for "fastlm" a folder or a file that ends in .safetensors.
        format: "hf", a folder that transformers loads (a Seq2Seq as Marian, where it is one), or "fastlm", a
            checkpoint.
        shard_bytes: size of a safetensors file of "hf" that is not exceeded where more than one tensor is in it.

    Raises:
        ConfigError: for another format.
        CheckpointError: for a model that the format cannot express, and if the files cannot be written; older
            ones are then untouched.
    """
    if format == "hf":
        save_folder(model, path, shard_bytes)
    elif format == "fastlm":
        _save_checkpoint(model, Path(path))
    else:
        raise ConfigError(f"format is {format!r}, expected hf or fastlm")


def _load_checkpoint(path: Path) -> nn.Module:
    from ..training.checkpoint import load_checkpoint

    return restore(load_checkpoint(path, model_only=True))


def _save_checkpoint(model: nn.Module, path: Path) -> None:
    from ..training.checkpoint import BEST, save_checkpoint

    name = type(model).__name__
    if name not in MODELS:
        raise CheckpointError(f"{name} is no model of fastlm; those are {', '.join(MODELS)}")
    file = path if path.suffix == ".safetensors" else path / BEST
    file.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(file, model, state={"model": name})  # type: ignore[arg-type]
