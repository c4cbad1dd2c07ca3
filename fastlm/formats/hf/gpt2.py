"""Hugging Face folders of GPT-2: settings and names, there and back."""

from __future__ import annotations

import re
from typing import Any

from ...models.gpt import GPT, GPTConfig
from .layout import TANH_GELUS, Architecture, Settings

GPT2_DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")


def _read_gpt2(settings: Settings, dropout: float | None) -> GPTConfig:
    settings.expect("activation_function", *TANH_GELUS)
    settings.expect("scale_attn_weights", True)
    settings.expect("scale_attn_by_inverse_layer_idx", False)
    settings.expect("add_cross_attention", False)
    rate = settings.one_rate(dropout, GPT2_DROPOUTS, 0.1)
    settings.require("vocab_size", "n_layer", "n_head", "n_embd")
    return GPTConfig(
        vocab_size=settings.get("vocab_size"),
        context_length=settings.get("n_positions", settings.get("n_ctx", 1024)),
        n_layer=settings.get("n_layer"),
        n_head=settings.get("n_head"),
        n_embd=settings.get("n_embd"),
        dropout=rate,
        layer_norm_eps=settings.get("layer_norm_epsilon", 1e-5),
        n_inner=settings.get("n_inner"),
        tie_embeddings=settings.get("tie_word_embeddings", True),
    )


def _write_gpt2(config: GPTConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": config.n_inner,
        "activation_function": "gelu_new",
        **dict.fromkeys(GPT2_DROPOUTS, config.dropout),
        "layer_norm_epsilon": config.layer_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
    }


GPT2_FOLDER = Architecture(
    family="gpt2",
    model=GPT,
    config=GPTConfig,
    read=_read_gpt2,
    write=_write_gpt2,
    names=lambda config: {},
    prefix="transformer.",
    unprefixed=("lm_head.",),
    transposed=re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight"),
    # Causal masks that older versions stored as if they were parameters.
    stray=lambda config: re.compile(r"h\.\d+\.attn\.(masked_)?bias"),
    aliases=lambda config: {"lm_head.weight": "wte.weight"} if config.tie_embeddings else {},
)
