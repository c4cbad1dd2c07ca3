"""Hugging Face folders of Qwen 3: settings and names, there and back."""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError
from ...models.qwen3 import Qwen3, Qwen3Config
from .layout import Settings
from .llama import llama_folder, read_rope, read_sizes, read_upper_window, write_sizes, write_upper_window

DEFAULTS = {  # their Qwen3Config's
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "sliding_window": 4096,
}


def _read_qwen3(settings: Settings, dropout: float | None) -> Qwen3Config:
    settings = Settings(DEFAULTS | settings.values, settings.path)
    biases = settings.flag("attention_bias", False)
    return Qwen3Config(
        **read_sizes(settings, dropout),
        **read_rope(settings),
        **read_upper_window(settings),
        qkv_bias=biases,
        output_bias=biases,
    )


def _write_qwen3(config: Qwen3Config) -> dict[str, Any]:
    if config.qkv_bias != config.output_bias or config.mlp_bias:
        raise ConfigError("a qwen3 has qkv_bias as output_bias, and no mlp_bias")
    settings = {"architectures": ["Qwen3ForCausalLM"], "attention_bias": config.qkv_bias}
    return settings | write_sizes(config) | write_upper_window(config)


QWEN3_FOLDER = llama_folder(
    "qwen3",
    _read_qwen3,
    _write_qwen3,
    Qwen3,
    Qwen3Config,
    {f"layers.*.attention.{norm}": (f"layers.*.self_attn.{norm}",) for norm in ("q_norm", "k_norm")},
)
