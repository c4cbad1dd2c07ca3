"""The architectures whose Hugging Face folders are loaded and saved: settings and names, there and back."""

from __future__ import annotations

import re
from typing import Any

from ..errors import ConfigError
from .bert import BERT, BERTConfig
from .gpt import GPT, GPTConfig
from .huggingface import Architecture, Settings
from .llama import Llama, LlamaConfig
from .seq2seq import Seq2Seq, Seq2SeqConfig

TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh")

# GPT-2

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
        "model_type": "gpt2",
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


GPT2 = Architecture(
    model_types=("gpt2",),
    model=GPT,
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

# BERT and RoBERTa

BERT_HEADS = {"Model": "none", "ForMaskedLM": "masked-lm", "ForSequenceClassification": "classification"}
BERT_LAYER = {
    "layers.*.attention.qkv": tuple(f"encoder.layer.*.attention.self.{name}" for name in ("query", "key", "value")),
    "layers.*.attention.out": ("encoder.layer.*.attention.output.dense",),
    "layers.*.attention_norm": ("encoder.layer.*.attention.output.LayerNorm",),
    "layers.*.up": ("encoder.layer.*.intermediate.dense",),
    "layers.*.down": ("encoder.layer.*.output.dense",),
    "layers.*.mlp_norm": ("encoder.layer.*.output.LayerNorm",),
    "wte": ("embeddings.word_embeddings",),
    "wpe": ("embeddings.position_embeddings",),
    "wse": ("embeddings.token_type_embeddings",),
    "embedding_norm": ("embeddings.LayerNorm",),
    "pooler": ("pooler.dense",),
}
BERT_NAMES = BERT_LAYER | {
    "masked_lm": ("cls.predictions",),
    "masked_lm.dense": ("cls.predictions.transform.dense",),
    "masked_lm.norm": ("cls.predictions.transform.LayerNorm",),
    "next_sentence": ("cls.seq_relationship",),
}
ROBERTA_NAMES = BERT_LAYER | {
    "masked_lm": ("lm_head",),
    "masked_lm.dense": ("lm_head.dense",),
    "masked_lm.norm": ("lm_head.layer_norm",),
}
ROBERTA_CLASSIFIER = {"pooler": ("classifier.dense",), "classifier": ("classifier.out_proj",)}


def _read_bert(settings: Settings, dropout: float | None, name: str, heads: dict[str, str]) -> BERTConfig:
    settings.require("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    activation = settings.expect("hidden_act", "gelu", *TANH_GELUS)
    settings.expect("position_embedding_type", "absolute")
    settings.expect("is_decoder", False)
    settings.expect("add_cross_attention", False)
    settings.expect("tie_word_embeddings", True)
    classes = {name + suffix: head for suffix, head in heads.items()}
    architecture = (settings.get("architectures") or [f"{name}Model"])[0]
    if architecture not in classes:
        settings.refuse(f"architectures is {architecture}, expected one of {', '.join(classes)}")
    head = classes[architecture]
    roberta = name == "Roberta"
    offset = settings.get("pad_token_id", 1) + 1 if roberta else 0
    return BERTConfig(
        vocab_size=settings.get("vocab_size"),
        context_length=settings.get("max_position_embeddings", 512) - offset,
        n_layer=settings.get("num_hidden_layers"),
        n_head=settings.get("num_attention_heads"),
        n_embd=settings.get("hidden_size"),
        n_inner=settings.get("intermediate_size"),
        n_token_type=settings.get("type_vocab_size", 2),
        dropout=settings.get("hidden_dropout_prob", 0.1) if dropout is None else dropout,
        attention_dropout=settings.get("attention_probs_dropout_prob", 0.1) if dropout is None else dropout,
        head_dropout=settings.get("classifier_dropout") if dropout is None else dropout,
        layer_norm_eps=settings.get("layer_norm_eps", 1e-12),
        activation="none" if activation == "gelu" else "tanh",
        head=head,
        n_class=len(settings.get("id2label") or {0: "", 1: ""}),
        pooler=head != "masked-lm",
        position_offset=offset,
    )


def _write_bert(config: BERTConfig) -> dict[str, Any]:
    name = "Roberta" if config.position_offset else "Bert"
    suffix = {head: suffix for suffix, head in (BERT_HEADS | {"ForPreTraining": "pretraining"}).items()}[config.head]
    if config.pooler != (config.head != "masked-lm") or (config.position_offset and config.head == "pretraining"):
        raise ConfigError(f"{name}{suffix} there is no model with pooler {str(config.pooler).lower()}")
    return {
        "architectures": [name + suffix],
        "model_type": name.lower(),
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length + config.position_offset,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_inner,
        "type_vocab_size": config.n_token_type,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "classifier_dropout": config.head_dropout,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_act": "gelu" if config.activation == "none" else "gelu_new",
        "position_embedding_type": "absolute",
        "id2label": {str(index): f"LABEL_{index}" for index in range(config.n_class)},
        "label2id": {f"LABEL_{index}": index for index in range(config.n_class)},
        "pad_token_id": max(config.position_offset - 1, 0),
        "tie_word_embeddings": True,
    }


def _bert_stray(config: BERTConfig) -> re.Pattern[str]:
    """Position numbers, and the heads that pretraining left in the file of a model that has another."""
    others = {
        "none": r"|cls\..*|lm_head\..*",
        "masked-lm": r"|pooler\..*|cls\.seq_relationship\..*",
        "pretraining": "",
        "classification": r"|cls\..*|lm_head\..*" + (r"|pooler\..*" if config.position_offset else ""),
    }
    return re.compile(r"embeddings\.(position_ids|token_type_ids)" + others[config.head])


def _bert_aliases(config: BERTConfig) -> dict[str, str]:
    if config.head not in ("masked-lm", "pretraining"):
        return {}
    head = "lm_head" if config.position_offset else "cls.predictions"
    return {f"{head}.decoder.weight": "embeddings.word_embeddings.weight", f"{head}.decoder.bias": f"{head}.bias"}


BERT_FOLDER = Architecture(
    model_types=("bert",),
    model=BERT,
    read=lambda settings, dropout: _read_bert(
        settings, dropout, "Bert", BERT_HEADS | {"ForPreTraining": "pretraining"}
    ),
    write=_write_bert,
    names=lambda config: BERT_NAMES,
    prefix="bert.",
    unprefixed=("cls.", "classifier."),
    headless="BertModel",
    stray=_bert_stray,
    aliases=_bert_aliases,
    renamed=((".gamma", ".weight"), (".beta", ".bias")),
)
ROBERTA_FOLDER = Architecture(
    model_types=("roberta", "xlm-roberta"),
    model=BERT,
    read=lambda settings, dropout: _read_bert(settings, dropout, "Roberta", BERT_HEADS),
    write=_write_bert,
    names=lambda config: ROBERTA_NAMES | (ROBERTA_CLASSIFIER if config.head == "classification" else {}),
    prefix="roberta.",
    unprefixed=("lm_head.", "classifier."),
    headless="RobertaModel",
    stray=_bert_stray,
    aliases=_bert_aliases,
)

# Llama, Mistral, Qwen2

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
    biases = settings.get("attention_bias", False)
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
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        settings.refuse(f"rope_type is {kind}, expected default or linear or llama3")
    if rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0)) != 1.0:
        settings.refuse("partial_rotary_factor is not 1, expected whole heads to rotate")
    values: dict[str, Any] = {"rope_theta": float(rope.get("rope_theta", settings.get("rope_theta", 10000.0)))}
    if kind != "default":
        values |= {"rope_scaling": kind, "rope_factor": float(rope["factor"])}
    if kind == "llama3":
        values["rope_low_freq_factor"] = float(rope["low_freq_factor"])
        values["rope_high_freq_factor"] = float(rope["high_freq_factor"])
        values["rope_original_context"] = rope["original_max_position_embeddings"]
    return values


def _window(settings: Settings) -> tuple[int | None, int]:
    """The sliding window and the first layer that has it."""
    layers = settings.get("num_hidden_layers")
    window = settings.get("sliding_window")
    if settings.get("model_type") == "llama" or window is None:
        return None, 0
    if settings.get("model_type") == "mistral":
        return window, 0
    kinds = settings.get("layer_types")
    if not settings.get("use_sliding_window", False):
        return None, 0
    first = settings.get("max_window_layers", 28)
    if kinds is not None:
        first = kinds.index("sliding_attention") if "sliding_attention" in kinds else layers
        if kinds != ["full_attention"] * first + ["sliding_attention"] * (layers - first):
            settings.refuse(f"layer_types is {kinds}, expected full attention first and sliding windows after it")
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

# Marian: the encoder-decoder of "Attention Is All You Need"

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
MARIAN_ACTIVATIONS = {"swish": "silu", "silu": "silu", "relu": "relu", "gelu": "gelu"}


def _read_marian(settings: Settings, dropout: float | None) -> Seq2SeqConfig:
    settings.require("vocab_size", "d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads")
    settings.expect("share_encoder_decoder_embeddings", True)
    settings.expect("tie_word_embeddings", True)
    settings.expect("activation_dropout", 0.0)
    settings.expect("decoder_attention_heads", settings.get("encoder_attention_heads"))
    settings.expect("decoder_ffn_dim", settings.get("encoder_ffn_dim"))
    vocab_size = settings.get("vocab_size")
    settings.expect("decoder_vocab_size", vocab_size, None)
    activation = settings.expect("activation_function", *MARIAN_ACTIVATIONS)
    return Seq2SeqConfig(
        vocab_size=vocab_size,
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
        output_bias=True,
        pad_id=settings.get("pad_token_id", 58100),
        start_id=settings.get("decoder_start_token_id", 58100),
        end_id=settings.get("eos_token_id", 0),
    )


def _write_marian(config: Seq2SeqConfig) -> dict[str, Any]:
    wanted = {"norm_first": False, "positions": "sinusoidal", "tie_embeddings": True, "output_bias": True}
    for name, value in (wanted | {"layer_norm_eps": 1e-5}).items():
        if getattr(config, name) != value:
            raise ConfigError(f"Hugging Face's Marian has {name} {value}, this model {getattr(config, name)}")
    return {
        "architectures": ["MarianMTModel"],
        "model_type": "marian",
        "vocab_size": config.vocab_size,
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
        "share_encoder_decoder_embeddings": True,
        "tie_word_embeddings": True,
        "pad_token_id": config.pad_id,
        "decoder_start_token_id": config.start_id,
        "eos_token_id": config.end_id,
        "forced_eos_token_id": None,
    }


MARIAN_FOLDER = Architecture(
    model_types=("marian",),
    model=Seq2Seq,
    read=_read_marian,
    write=_write_marian,
    names=lambda config: MARIAN_NAMES,
    prefix="model.",
    unprefixed=("final_logits_bias", "lm_head."),
    one_row=re.compile("final_logits_bias"),
    # Sines and cosines, which are computed here.
    stray=lambda config: re.compile(r"(encoder|decoder)\.embed_positions\.weight"),
    aliases=lambda config: dict.fromkeys(
        ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "shared.weight"
    ),
)

ARCHITECTURES = (GPT2, BERT_FOLDER, ROBERTA_FOLDER, LLAMA_FOLDER, MARIAN_FOLDER)
