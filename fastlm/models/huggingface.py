"""GPT-2 folders in Hugging Face's layout: config.json with model.safetensors, whole or sharded.

Hugging Face keeps the four projections of a block as `Conv1D`, (in, out), where `nn.Linear` has (out, in);
all other tensors are as ours, under names that carry `transformer.` or not, by age.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from .gpt import GPT, GPTConfig

TRANSPOSED = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
# Causal masks that older versions stored as if they were parameters.
STRAY = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh")
DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
NAMED_AT_MOST = 6


def load(cls: type[GPT], folder: str | os.PathLike[str], dropout: float | None) -> GPT:
    """Body of `GPT.from_huggingface`."""
    folder = Path(folder)
    config = _read_config(folder / "config.json", dropout)
    tensors = _named_as_ours(_read_tensors(folder), config, folder)
    with torch.device("meta"):
        model = cls(config)
    _check(tensors, {name: tensor.shape for name, tensor in model.state_dict().items()}, folder)
    # Owned copies: nothing keeps reading the file after this returns.
    state = {
        name: _transposed(name, tensor).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    model.load_state_dict(state, assign=True)
    return model


def save(model: GPT, folder: str | os.PathLike[str], eot_id: int | None) -> None:
    """Body of `GPT.save_huggingface`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_their_name(name): _transposed(name, tensor.detach().cpu()).contiguous()
               for name, tensor in model.state_dict().items()}  # fmt: skip
    settings = _settings(model.config, model.wte.weight.dtype, eot_id)
    try:
        with (
            _replacing(folder / "config.json") as config,
            _replacing(folder / "model.safetensors") as weights,
        ):
            config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            save_file(tensors, weights, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder}: the model could not be written: {error}") from error


def _transposed(name: str, tensor: Tensor) -> Tensor:
    return tensor.t() if TRANSPOSED.fullmatch(name) else tensor


def _their_name(name: str) -> str:
    return name if name == "lm_head.weight" else f"transformer.{name}"


def _settings(config: GPTConfig, dtype: torch.dtype, eot_id: int | None) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": config.n_inner,
        "activation_function": "gelu_new",
        **dict.fromkeys(DROPOUTS, config.dropout),
        "layer_norm_epsilon": config.layer_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _read_config(path: Path, dropout: float | None) -> GPTConfig:
    from .gpt import GPTConfig

    settings = _read_json(path)
    _check_architecture(settings, path)
    if dropout is None:
        rates = {name: settings.get(name, 0.1) for name in DROPOUTS}
        if len(set(rates.values())) > 1:
            text = ", ".join(f"{name} {rate}" for name, rate in rates.items())
            raise CheckpointError(f"{path}: {text}: fastlm has one rate; pass dropout= to choose it")
        dropout = rates["resid_pdrop"]
    missing = [name for name in ("vocab_size", "n_layer", "n_head", "n_embd") if name not in settings]
    if missing:
        raise CheckpointError(f"{path}: missing {', '.join(missing)}")
    try:
        return GPTConfig(
            vocab_size=settings["vocab_size"],
            context_length=settings.get("n_positions", settings.get("n_ctx", 1024)),
            n_layer=settings["n_layer"],
            n_head=settings["n_head"],
            n_embd=settings["n_embd"],
            dropout=dropout,
            layer_norm_eps=settings.get("layer_norm_epsilon", 1e-5),
            n_inner=settings.get("n_inner"),
            tie_embeddings=settings.get("tie_word_embeddings", True),
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_architecture(settings: dict[str, Any], path: Path) -> None:
    """Refuse what would load and then compute something else."""
    wanted: dict[str, tuple] = {
        "model_type": ("gpt2",),
        "activation_function": TANH_GELUS,
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    for name, values in wanted.items():
        if settings.get(name, values[0]) not in values:
            text = " or ".join(json.dumps(value) for value in values)
            raise CheckpointError(f"{path}: {name} is {json.dumps(settings[name])}, expected {text}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists() or not index.exists():
        return _read_safetensors(whole)
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise CheckpointError(f"{index}: has no weight_map")
    tensors: dict[str, Tensor] = {}
    for shard in sorted({str(shard) for shard in shards.values()}):
        tensors |= _read_safetensors(folder / shard)
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cut short or not a safetensors file: {error}") from error


def _named_as_ours(tensors: dict[str, Tensor], config: GPTConfig, folder: Path) -> dict[str, Tensor]:
    ours = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    ours = {name: tensor for name, tensor in ours.items() if not STRAY.fullmatch(name)}
    if config.tie_embeddings and "lm_head.weight" in ours:
        head = ours.pop("lm_head.weight")
        if not torch.equal(ours.setdefault("wte.weight", head), head):
            raise CheckpointError(f"{folder}: lm_head.weight differs from wte.weight, but config.json ties them")
    return ours


def _check(tensors: dict[str, Tensor], shapes: dict[str, torch.Size], folder: Path) -> None:
    """Compare what the files hold with what config.json calls for, all of it at once."""
    problems = [
        f"{kind} {_listed(sorted(names))}"
        for kind, names in (
            ("missing", shapes.keys() - tensors.keys()),
            ("unexpected", tensors.keys() - shapes),
        )
        if names
    ]
    misfits = []
    for name in sorted(shapes.keys() & tensors.keys()):
        wanted = tuple(reversed(shapes[name])) if TRANSPOSED.fullmatch(name) else tuple(shapes[name])
        if tuple(tensors[name].shape) != wanted:
            misfits.append(f"{name} has shape {tuple(tensors[name].shape)} instead of {wanted}")
    if misfits:
        problems.append(_listed(misfits))
    if problems:
        raise CheckpointError(f"{folder}: the tensors do not fit config.json: {'; '.join(problems)}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return ", ".join(names[:NAMED_AT_MOST]) + more


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success its file takes the place of `path`, else it goes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
