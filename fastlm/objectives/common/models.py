"""Models that a run begins with: of the sizes in its settings, or of a file's weights with the head that is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ...errors import ConfigError
from ...models import BERT, GPT, BERTConfig, GPTConfig, Llama, LlamaConfig, Seq2Seq, Seq2SeqConfig
from ...models.common.generation import carry, generation_of
from ...runtime import memory_of

if TYPE_CHECKING:
    from ...training.config import TrainConfig

BLOCK_BYTES = 30_000  # of Python objects in a Transformer block, whatever its width


class Kind(NamedTuple):
    """A model that settings can name.

    Attributes:
        model: its class, and that of its relatives' classes.
        config: of its configuration.
        sizes: fields of the configuration from the settings.
    """

    model: type[nn.Module]
    config: Any
    sizes: Callable[[TrainConfig], dict[str, Any]]


def _sizes(config: TrainConfig, *others: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("context_length", "n_head", "n_embd", "dropout", *others)}


def _swiglu_size(width: int) -> int:
    """Two thirds of the usual 4 C, since SwiGLU has three matrices, rounded up to a multiple of 32."""
    return -(-8 * width // 3 // 32) * 32


MODELS: dict[str, Kind] = {
    "gpt": Kind(GPT, GPTConfig, lambda c: _sizes(c, "n_layer")),
    "bert": Kind(BERT, BERTConfig, lambda c: _sizes(c, "n_layer") | {"attention_dropout": c.dropout}),
    "llama": Kind(Llama, LlamaConfig, lambda c: _sizes(c, "n_layer") | {"n_inner": _swiglu_size(c.n_embd)}),
    "seq2seq": Kind(
        Seq2Seq, Seq2SeqConfig, lambda c: _sizes(c) | {"n_encoder_layer": c.n_layer, "n_decoder_layer": c.n_layer}
    ),
}


def kind_of(model: nn.Module) -> str | None:
    """The name of a model's kind; None if settings cannot name it."""
    return next((name for name, kind in MODELS.items() if isinstance(model, kind.model)), None)


def fresh(kind: str, config: TrainConfig, vocab_size: int, fields: dict[str, Any]) -> nn.Module:
    """A model of the sizes in the settings, drawn from torch's generator.

    Args:
        fields: of its configuration, which the objective decides.
    """
    found = MODELS[kind]
    return found.model(found.config(vocab_size=vocab_size, **(found.sizes(config) | fields)))


def adapted(loaded: nn.Module, fields: dict[str, Any], dropout: float, source: str, new_head: bool) -> nn.Module:
    """A model of a file's weights, with the fields that an objective needs; a part that the file lacks is drawn.

    Args:
        fields: of its configuration, those that `Setup.model` was given.
        dropout: every rate.
        source: names the file in the error.
        new_head: drop a head that does not fit.

    Raises:
        ConfigError: for a head that would be lost, unless `new_head`.
    """
    before: Any = loaded.config
    rates = {field.name: dropout for field in dataclasses.fields(before) if field.name.endswith("dropout")}
    config = dataclasses.replace(before, **(rates | fields))
    model = type(loaded)(config)
    state, wanted = loaded.state_dict(), model.state_dict()
    named = [name for name in ("labels", "problem_type") if name in fields and getattr(before, name) is not None]
    renamed = any(fields[name] is not None and fields[name] != getattr(before, name) for name in named)
    heads: tuple[str, ...] = getattr(loaded, "head_modules", ())
    lost = {
        _part(name)
        for name, tensor in state.items()
        if _part(name) in heads and (renamed or name not in wanted or wanted[name].shape != tensor.shape)
    }
    if lost and not new_head:
        raise ConfigError(
            f"{source}: holds a head for {_head(before)}, expected one for {_head(config)}; add --new-head to drop it"
        )
    kept = {name: tensor for name, tensor in state.items() if name in wanted and _part(name) not in lost}
    model.load_state_dict(kept, strict=False)
    carry(model, generation_of(loaded))
    return model


def _part(name: str) -> str:
    return name.partition(".")[0]


def _head(config: Any) -> str:
    """The head of a model, for people."""
    labels = getattr(config, "labels", None)
    if config.head != "classification":
        return config.head
    shown = ", ".join(labels[:4]) + (", ..." if len(labels) > 4 else "") if labels else f"{config.n_class} classes"
    return f"classification ({shown})"


def check_memory(config: TrainConfig, vocab_size: int, device: torch.device) -> None:
    """Raise ConfigError if the least that the sizes need is more than the machine has, before any of it is made.

    That is 16 bytes a parameter (weight, gradient and AdamW's two moments), the blocks' own objects, and a batch.
    """
    width, tokens = config.n_embd, config.batch_size * (config.context_length + 1)
    parameters = width * (vocab_size + config.context_length + 12 * config.n_layer * width)
    least = 16 * parameters + 4 * tokens * width + (BLOCK_BYTES * config.n_layer if device.type == "cpu" else 0)
    there = memory_of(device)
    if there and least > there:
        sizes = ", ".join(f"{name} = {getattr(config, name)}" for name in ("n_layer", "n_embd", "batch_size"))
        raise ConfigError(
            f"{sizes}, context_length = {config.context_length} and {vocab_size} token ids need at least "
            f"{least / 1e9:.3g} GB, but {device} has {there / 1e9:.3g} GB"
        )
