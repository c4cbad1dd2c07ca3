"""Hugging Face folders of Marian, the encoder-decoder of "Attention Is All You Need": settings and names."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from ...errors import ConfigError
from ...models.seq2seq import Seq2Seq, Seq2SeqConfig
from .layout import Architecture, Settings

MARIAN_NAMES = {
    "wte": ("shared",),
    "output_bias": ("final_logits_bias",),
    "encoder.*.attention.qkv": tuple(f"encoder.layers.*.self_attn.{name}_proj" for name in "qkv"),
    "encoder.*.attention.out": ("encoder.layers.*.self_attn.out_proj",),
    "encoder.*.attention_norm": ("encoder.layers.*.self_attn_layer_norm",),
    "encoder.*.up": ("encoder.layers.*.fc1",),
    "encoder.*.down": ("encoder.layers.*.fc2",),
    "encoder.*.mlp_norm": ("encoder.layers.*.final_layer_norm",),
    "decoder.*.attention.qkv": tuple(f"decoder.layers.*.self_attn.{name}_proj" for name in "qkv"),
    "decoder.*.attention.out": ("decoder.layers.*.self_attn.out_proj",),
    "decoder.*.attention_norm": ("decoder.layers.*.self_attn_layer_norm",),
    "decoder.*.cross_attention.q": ("decoder.layers.*.encoder_attn.q_proj",),
    "decoder.*.cross_attention.kv": tuple(f"decoder.layers.*.encoder_attn.{name}_proj" for name in "kv"),
    "decoder.*.cross_attention.out": ("decoder.layers.*.encoder_attn.out_proj",),
    "decoder.*.cross_norm": ("decoder.layers.*.encoder_attn_layer_norm",),
    "decoder.*.up": ("decoder.layers.*.fc1",),
    "decoder.*.down": ("decoder.layers.*.fc2",),
    "decoder.*.mlp_norm": ("decoder.layers.*.final_layer_norm",),
}
MARIAN_UNTIED = {"wte": ("decoder.embed_tokens",), "source_wte": ("encoder.embed_tokens",)}
MARIAN_ACTIVATIONS = {"swish": "silu", "silu": "silu", "relu": "relu", "gelu": "gelu"}


def _read_marian(settings: Settings, dropout: float | None) -> Seq2SeqConfig:
    settings.require("vocab_size", "d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads")
    tied, shared = (settings.flag(name, True) for name in ("tie_word_embeddings", "share_encoder_decoder_embeddings"))
    if tied:
        settings.expect("share_encoder_decoder_embeddings", True)
    settings.expect("activation_dropout", 0.0)
    settings.expect("decoder_attention_heads", settings.get("encoder_attention_heads"))
    settings.expect("decoder_ffn_dim", settings.get("encoder_ffn_dim"))
    source_vocab_size = vocab_size = settings.get("vocab_size")
    if shared:
        settings.expect("decoder_vocab_size", vocab_size, None)
    elif settings.get("decoder_vocab_size") is not None:
        vocab_size = settings.get("decoder_vocab_size")
    activation = settings.expect("activation_function", *MARIAN_ACTIVATIONS)
    return Seq2SeqConfig(
        vocab_size=vocab_size,
        source_vocab_size=source_vocab_size,
        context_length=settings.get("max_position_embeddings", 1024),
        n_encoder_layer=settings.get("encoder_layers"),
        n_decoder_layer=settings.get("decoder_layers"),
        n_head=settings.get("encoder_attention_heads"),
        n_embd=settings.get("d_model"),
        n_inner=settings.get("encoder_ffn_dim"),
        dropout=settings.get("dropout", 0.1) if dropout is None else dropout,
        attention_dropout=settings.get("attention_dropout", 0.0) if dropout is None else dropout,
        activation=MARIAN_ACTIVATIONS[activation],
        scale_embeddings=settings.get("scale_embedding", False),
        tie_embeddings=tied,
        output_bias=True,
        pad_id=settings.get("pad_token_id", 58100),
        start_id=_start_id(settings),
        end_id=_first(settings.get("eos_token_id", 0)),
    )


def _start_id(settings: Settings) -> Any:
    start = settings.get("decoder_start_token_id", 58100)
    return settings.get("bos_token_id") if start is None else start


def _first(ends: Any) -> Any:
    """The search looks at all ends of a folder that names several."""
    return ends[0] if isinstance(ends, list) and ends else ends


def _write_marian(config: Seq2SeqConfig) -> dict[str, Any]:
    for name, value in {"norm_first": False, "positions": "sinusoidal", "layer_norm_eps": 1e-5}.items():
        if getattr(config, name) != value:
            raise ConfigError(f"Hugging Face's Marian has {name} {value}, this model {getattr(config, name)}")
    return {
        "architectures": ["MarianMTModel"],
        "vocab_size": config.source_vocab_size,
        "decoder_vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "encoder_layers": config.n_encoder_layer,
        "decoder_layers": config.n_decoder_layer,
        "encoder_attention_heads": config.n_head,
        "decoder_attention_heads": config.n_head,
        "encoder_ffn_dim": config.n_inner,
        "decoder_ffn_dim": config.n_inner,
        "d_model": config.n_embd,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": 0.0,
        "activation_function": config.activation,
        "scale_embedding": config.scale_embeddings,
        "share_encoder_decoder_embeddings": config.tie_embeddings,
        "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": config.pad_id,
        "decoder_start_token_id": config.start_id,
        "eos_token_id": config.end_id,
        "forced_eos_token_id": None,
    }


def _marian_added(config: Seq2SeqConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Theirs always has a bias of the logits, which changes nothing where it is 0."""
    if config.output_bias:
        return {}
    return {"final_logits_bias": next(iter(tensors.values())).new_zeros(1, config.vocab_size)}


MARIAN_FOLDER = Architecture(
    family="marian",
    model=Seq2Seq,
    config=Seq2SeqConfig,
    read=_read_marian,
    write=_write_marian,
    names=lambda config: MARIAN_NAMES if config.tie_embeddings else MARIAN_NAMES | MARIAN_UNTIED,
    prefix="model.",
    unprefixed=("final_logits_bias", "lm_head."),
    one_row=re.compile("final_logits_bias"),
    # Sines and cosines, which are computed here; and what an untied model does not look at.
    stray=lambda config: re.compile(
        r"(encoder|decoder)\.embed_positions\.weight" + ("" if config.tie_embeddings else r"|shared\.weight")
    ),
    aliases=lambda config: (
        dict.fromkeys(("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "shared.weight")
        if config.tie_embeddings
        else {}
    ),
    added=_marian_added,
)
