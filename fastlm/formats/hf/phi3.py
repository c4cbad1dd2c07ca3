"""Hugging Face folders of Phi-3 and Phi-4-mini: settings and names, there and back."""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError
from ...models.phi3 import Phi3, Phi3Config
from .layout import Settings
from .llama import llama_folder, read_sizes, rope_settings, write_sizes

DEFAULTS = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}  # their Phi3Config's
LONGROPE = ("longrope", "su", "yarn")  # the latter are older names of it there
FACTORS = {"short_factor": "rope_short_factors", "long_factor": "rope_long_factors"}
SCALES = {"factor": "rope_extension", "attention_factor": "rope_attention_factor"}


def _read_phi3(settings: Settings, dropout: float | None) -> Phi3Config:
    settings = Settings(DEFAULTS | settings.values, settings.path)
    return Phi3Config(
        **read_sizes(settings, dropout),
        **_read_rope(settings),
        sliding_window=settings.integer("sliding_window"),
        residual_dropout=settings.get("resid_pdrop", 0.0) if dropout is None else dropout,
    )


def _read_rope(settings: Settings) -> dict[str, Any]:
    kind, rope, theta = rope_settings(settings, ("default", *LONGROPE))
    share = rope if "partial_rotary_factor" in rope.values else settings
    values = {
        "rope_theta": theta,
        "rotary_share": share.number("partial_rotary_factor", 1.0),
        "rope_original_context": settings.integer("original_max_position_embeddings", 4096),
    }
    if kind == "default":
        return values
    rope.require(*FACTORS)
    values |= {ours: rope.sequence(theirs) for theirs, ours in FACTORS.items()}
    values |= {ours: rope.number(theirs) for theirs, ours in SCALES.items()}
    return values | {"rope_scaling": "longrope"}


def _write_phi3(config: Phi3Config) -> dict[str, Any]:
    if (
        config.qkv_bias
        or config.output_bias
        or config.mlp_bias
        or (config.sliding_window and config.first_window_layer)
    ):
        raise ConfigError("a phi3 has no qkv_bias, output_bias or mlp_bias, and its sliding_window in every layer")
    scaling = None
    if config.rope_scaling is not None:
        scaling = {"rope_type": "longrope", **{theirs: getattr(config, ours) for theirs, ours in FACTORS.items()}}
        said = {theirs: getattr(config, ours) for theirs, ours in SCALES.items()}
        scaling |= {name: value for name, value in said.items() if value is not None}
    settings = {"architectures": ["Phi3ForCausalLM"], **write_sizes(config)}
    if config.head_size * config.n_head == config.n_embd:
        del settings["head_dim"]  # which theirs computes
    if config.rotary_share != 1:
        settings["partial_rotary_factor"] = config.rotary_share
    return settings | {
        "original_max_position_embeddings": config.rope_original_context,
        "rope_scaling": scaling,
        "sliding_window": config.sliding_window,
        "resid_pdrop": config.residual_dropout,
        "pad_token_id": None,
    }


PHI3_FOLDER = llama_folder(
    "phi3",
    _read_phi3,
    _write_phi3,
    Phi3,
    Phi3Config,
    {
        "layers.*.attention.qkv": ("layers.*.self_attn.qkv_proj",),
        "layers.*.mlp.gate_up": ("layers.*.mlp.gate_up_proj",),
    },
    fused=True,
)
