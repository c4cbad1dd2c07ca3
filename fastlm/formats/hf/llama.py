"""Hugging Face folders of Llama, Mistral and Qwen2, and what their relatives share: settings and names, both ways."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from ...errors import ConfigError
from ...models.common.config import shown
from ...models.llama import Llama, LlamaConfig
from .layout import Architecture, Settings

LLAMA_NAMES = {
    "wte": ("embed_tokens",),
    "layers.*.attention.qkv": tuple(f"layers.*.self_attn.{name}_proj" for name in "qkv"),
    "layers.*.attention.out": ("layers.*.self_attn.o_proj",),
    "layers.*.attention_norm": ("layers.*.input_layernorm",),
    "layers.*.mlp_norm": ("layers.*.post_attention_layernorm",),
    "layers.*.mlp.gate_up": ("layers.*.mlp.gate_proj", "layers.*.mlp.up_proj"),
    "layers.*.mlp.down": ("layers.*.mlp.down_proj",),
}


def read_sizes(settings: Settings, dropout: float | None) -> dict[str, Any]:
    """What every relative's configuration has of config.json, but for rotary settings, biases and windows."""
    settings.require("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    settings.expect("hidden_act", "silu", "swish")
    return {
        "vocab_size": settings.get("vocab_size"),
        "context_length": settings.get("max_position_embeddings", 2048),
        "n_layer": settings.integer("num_hidden_layers", 0),
        "n_head": settings.get("num_attention_heads"),
        "n_embd": settings.get("hidden_size"),
        "n_inner": settings.get("intermediate_size"),
        "n_kv_head": settings.get("num_key_value_heads"),
        "head_size": settings.get("head_dim"),
        "rms_norm_eps": settings.get("rms_norm_eps", 1e-6),
        "dropout": settings.get("attention_dropout", 0.0) if dropout is None else dropout,
        "tie_embeddings": settings.get("tie_word_embeddings", False),
    }


def rope_settings(settings: Settings, kinds: tuple[str, ...]) -> tuple[str, Settings, float]:
    """The kind of rotary scaling, its settings and the base, from settings of either age: `rope_parameters`, or
    `rope_theta` with `rope_scaling`."""
    name = "rope_parameters" if settings.mapping("rope_parameters") else "rope_scaling"
    rope = Settings(settings.mapping(name) or {}, settings.path, f"{name}.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in kinds:
        rope.refuse(f"rope_type is {shown(kind, str)}, expected {' or '.join(kinds)}")
    theta = rope if "rope_theta" in rope.values else settings
    return kind, rope, theta.number("rope_theta", 10000.0)


def read_rope(settings: Settings) -> dict[str, Any]:
    """Rotary settings of heads that turn whole."""
    kind, rope, theta = rope_settings(settings, ("default", "linear", "llama3"))
    if rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0)) != 1.0:
        settings.refuse("partial_rotary_factor is not 1, expected whole heads to rotate")
    values: dict[str, Any] = {"rope_theta": theta}
    if kind != "default":
        rope.require("factor")
        values |= {"rope_scaling": kind, "rope_factor": rope.number("factor", 1.0)}
    if kind == "llama3":
        rope.require("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        values["rope_low_freq_factor"] = rope.number("low_freq_factor", 1.0)
        values["rope_high_freq_factor"] = rope.number("high_freq_factor", 4.0)
        values["rope_original_context"] = rope.integer("original_max_position_embeddings", 8192)
    return values


def read_upper_window(settings: Settings) -> dict[str, Any]:
    """Qwen's sliding window, of the layers from a first one on."""
    layers = settings.integer("num_hidden_layers", 0)
    window, first = settings.integer("sliding_window"), settings.integer("max_window_layers", 28)
    kinds = settings.sequence("layer_types")
    if window is None or not settings.flag("use_sliding_window", False):
        return {"first_window_layer": first}
    if kinds is not None:
        full = [kind == "full_attention" for kind in kinds]
        first = full.index(False) if False in full else layers
        if len(kinds) != layers or any(full[first:]) or any(kind != "sliding_attention" for kind in kinds[first:]):
            settings.refuse(
                f"layer_types is {shown(kinds)}, expected full attention first and sliding windows after it"
            )
    return {"sliding_window": None if first >= layers else window, "first_window_layer": first}


def write_upper_window(config: LlamaConfig) -> dict[str, Any]:
    return {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "max_window_layers": config.first_window_layer,
    }


def write_sizes(config: LlamaConfig) -> dict[str, Any]:
    """Inverse of `read_sizes` and `read_rope`."""
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_inner,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": _write_rope(config),
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _write_rope(config: LlamaConfig) -> dict[str, Any] | None:
    if config.rope_scaling is None:
        return None
    scaling: dict[str, Any] = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "llama3":
        scaling |= {
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.rope_original_context,
        }
    return scaling


def llama_folder(
    family: str,
    read: Callable[[Settings, float | None], LlamaConfig],
    write: Callable[[Any], dict[str, Any]],
    model: type[nn.Module] = Llama,
    config: type[LlamaConfig] = LlamaConfig,
    names: dict[str, tuple[str, ...]] | None = None,
    fused: bool = False,
) -> Architecture:
    """The architecture of a relative of Llama.

    Args:
        names: of modules that are named otherwise than Llama's.
        fused: whether theirs has one projection for queries, keys and values, as ours has.
    """
    return Architecture(
        family=family,
        model=model,
        config=config,
        read=read,
        write=write,
        names=lambda config: LLAMA_NAMES | (names or {}),
        rows=lambda config: {} if fused else {"layers.*.attention.qkv": config.qkv_sizes},
        prefix="model.",
        unprefixed=("lm_head.",),
        # Wavelengths that older versions stored as if they were parameters.
        stray=lambda config: re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
        aliases=lambda config: {"lm_head.weight": "embed_tokens.weight"} if config.tie_embeddings else {},
    )


def _read_llama(settings: Settings, dropout: float | None) -> LlamaConfig:
    settings.expect("pretraining_tp", 1)
    biases = settings.flag("attention_bias", False)
    return LlamaConfig(
        **read_sizes(settings, dropout),
        **read_rope(settings),
        qkv_bias=biases,
        output_bias=biases,
        mlp_bias=settings.get("mlp_bias", False),
    )


def _write_llama(config: LlamaConfig) -> dict[str, Any]:
    if config.sliding_window is not None or config.qkv_bias != config.output_bias:
        raise ConfigError("a llama has no sliding_window, and qkv_bias as output_bias")
    biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return {"architectures": ["LlamaForCausalLM"], **write_sizes(config), **biases}


def _read_mistral(settings: Settings, dropout: float | None) -> LlamaConfig:
    sizes = read_sizes(settings, dropout)
    return LlamaConfig(**sizes, **read_rope(settings), sliding_window=settings.integer("sliding_window"))


def _write_mistral(config: LlamaConfig) -> dict[str, Any]:
    first = config.sliding_window is not None and config.first_window_layer
    if config.qkv_bias or config.output_bias or config.mlp_bias or first:
        raise ConfigError("a mistral has no sliding window with these biases or layers")
    return {
        "architectures": ["MistralForCausalLM"],
        **write_sizes(config),
        "sliding_window": config.sliding_window,
    }


def _read_qwen2(settings: Settings, dropout: float | None) -> LlamaConfig:
    sizes = read_sizes(settings, dropout)
    return LlamaConfig(**sizes, **read_rope(settings), **read_upper_window(settings), qkv_bias=True)


def _write_qwen2(config: LlamaConfig) -> dict[str, Any]:
    if not config.qkv_bias or config.output_bias or config.mlp_bias:
        raise ConfigError("a qwen2 has qkv_bias, and neither output_bias nor mlp_bias")
    return {"architectures": ["Qwen2ForCausalLM"], **write_sizes(config), **write_upper_window(config)}


LLAMA_FOLDER = llama_folder("llama", _read_llama, _write_llama)
MISTRAL_FOLDER = llama_folder("mistral", _read_mistral, _write_mistral)
QWEN2_FOLDER = llama_folder("qwen2", _read_qwen2, _write_qwen2)
