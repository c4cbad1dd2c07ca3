"""Hugging Face folders of Llama, Mistral and Qwen2: settings and names, there and back."""

from __future__ import annotations

import re
from typing import Any

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


def _read_llama(settings: Settings, dropout: float | None) -> LlamaConfig:
    settings.require("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    settings.expect("hidden_act", "silu", "swish")
    settings.expect("pretraining_tp", 1)
    qwen = settings.get("model_type") == "qwen2"
    biases = settings.flag("attention_bias", False)
    window, first = _window(settings)
    return LlamaConfig(
        vocab_size=settings.get("vocab_size"),
        context_length=settings.get("max_position_embeddings", 2048),
        n_layer=settings.get("num_hidden_layers"),
        n_head=settings.get("num_attention_heads"),
        n_embd=settings.get("hidden_size"),
        n_inner=settings.get("intermediate_size"),
        n_kv_head=settings.get("num_key_value_heads"),
        head_size=settings.get("head_dim"),
        rms_norm_eps=settings.get("rms_norm_eps", 1e-6),
        qkv_bias=qwen or biases,
        output_bias=biases and not qwen,
        mlp_bias=settings.get("mlp_bias", False),
        sliding_window=window,
        first_window_layer=first,
        dropout=settings.get("attention_dropout", 0.0) if dropout is None else dropout,
        tie_embeddings=settings.get("tie_word_embeddings", False),
        **_read_rope(settings),
    )


def _read_rope(settings: Settings) -> dict[str, Any]:
    """Rotary settings of either age: `rope_parameters`, or `rope_theta` with `rope_scaling`."""
    name = "rope_parameters" if settings.mapping("rope_parameters") else "rope_scaling"
    rope = Settings(settings.mapping(name) or {}, settings.path, f"{name}.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        settings.refuse(f"rope_type is {shown(kind, str)}, expected default or linear or llama3")
    if rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0)) != 1.0:
        settings.refuse("partial_rotary_factor is not 1, expected whole heads to rotate")
    theta = rope if "rope_theta" in rope.values else settings
    values: dict[str, Any] = {"rope_theta": theta.number("rope_theta", 10000.0)}
    if kind != "default":
        rope.require("factor")
        values |= {"rope_scaling": kind, "rope_factor": rope.number("factor", 1.0)}
    if kind == "llama3":
        rope.require("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        values["rope_low_freq_factor"] = rope.number("low_freq_factor", 1.0)
        values["rope_high_freq_factor"] = rope.number("high_freq_factor", 4.0)
        values["rope_original_context"] = rope.integer("original_max_position_embeddings", 8192)
    return values


def _window(settings: Settings) -> tuple[int | None, int]:
    """The sliding window and the first layer that has it."""
    layers = settings.integer("num_hidden_layers", 0)
    window = settings.integer("sliding_window")
    if settings.get("model_type") == "llama" or window is None:
        return None, 0
    if settings.get("model_type") == "mistral":
        return window, 0
    kinds = settings.sequence("layer_types")
    if not settings.flag("use_sliding_window", False):
        return None, 0
    first = settings.integer("max_window_layers", 28)
    if kinds is not None:
        full = [kind == "full_attention" for kind in kinds]
        first = full.index(False) if False in full else layers
        if len(kinds) != layers or any(full[first:]) or any(kind != "sliding_attention" for kind in kinds[first:]):
            settings.refuse(
                f"layer_types is {shown(kinds)}, expected full attention first and sliding windows after it"
            )
    return (None, 0) if first >= layers else (window, first)


def _write_llama(config: LlamaConfig) -> dict[str, Any]:
    return {
        **_llama_relative(config),
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


def _llama_relative(config: LlamaConfig) -> dict[str, Any]:
    """The relative of Llama that has this combination of biases and window."""
    if config.qkv_bias and not config.output_bias and not config.mlp_bias:
        window = {
            "use_sliding_window": config.sliding_window is not None,
            "sliding_window": config.sliding_window,
            "max_window_layers": config.first_window_layer,
        }
        return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **window}
    if config.sliding_window is not None:
        if config.qkv_bias or config.output_bias or config.mlp_bias or config.first_window_layer:
            raise ConfigError("no Hugging Face model of this kind has a sliding window with these biases or layers")
        window = {"sliding_window": config.sliding_window}
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **window}
    if config.qkv_bias != config.output_bias:
        raise ConfigError("no Hugging Face model of this kind has qkv_bias, output_bias and mlp_bias like these")
    biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **biases}


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


LLAMA_FOLDER = Architecture(
    model_types=("llama", "mistral", "qwen2"),
    model=Llama,
    read=_read_llama,
    write=_write_llama,
    names=lambda config: LLAMA_NAMES,
    prefix="model.",
    unprefixed=("lm_head.",),
    # Wavelengths that older versions stored as if they were parameters.
    stray=lambda config: re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
    aliases=lambda config: {"lm_head.weight": "embed_tokens.weight"} if config.tie_embeddings else {},
)
