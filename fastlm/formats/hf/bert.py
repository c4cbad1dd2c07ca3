"""Hugging Face folders of BERT, RoBERTa and XLM-RoBERTa: settings and names, there and back."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from torch import Tensor

from ...errors import ConfigError
from ...models.bert import BERT, PROBLEM_TYPES, BERTConfig
from ...models.common.config import shown
from .layout import TANH_GELUS, Architecture, Settings

HEADS = {"Model": "none", "ForMaskedLM": "masked-lm", "ForSequenceClassification": "classification"}
BERT_HEADS = HEADS | {"ForPreTraining": "pretraining"}
VOCABULARY_HEADS = ("masked-lm", "pretraining")
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
    "masked_lm.decoder": ("cls.predictions.decoder",),
    "next_sentence": ("cls.seq_relationship",),
}
ROBERTA_NAMES = BERT_LAYER | {
    "masked_lm": ("lm_head",),
    "masked_lm.dense": ("lm_head.dense",),
    "masked_lm.norm": ("lm_head.layer_norm",),
    "masked_lm.decoder": ("lm_head.decoder",),
}
ROBERTA_CLASSIFIER = {"pooler": ("classifier.dense",), "classifier": ("classifier.out_proj",)}


def _read_bert(settings: Settings, dropout: float | None, name: str, heads: dict[str, str]) -> BERTConfig:
    settings.require("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    activation = settings.expect("hidden_act", "gelu", *TANH_GELUS)
    settings.expect("position_embedding_type", "absolute")
    settings.expect("is_decoder", False)
    settings.expect("add_cross_attention", False)
    classes = {name + suffix: head for suffix, head in heads.items()}
    if name == "XLMRoberta":  # which are RoBERTas, and may say so
        classes |= {f"Roberta{suffix}": head for suffix, head in heads.items()}
    architecture = (settings.sequence("architectures") or [f"{name}Model"])[0]
    if not isinstance(architecture, str) or architecture not in classes:
        settings.refuse(f"architectures is {shown(architecture, str)}, expected one of {', '.join(classes)}")
    head = classes[architecture]
    roberta = name != "Bert"
    if roberta and head == "masked-lm":  # theirs has the exact GELU in the head, whatever the layers have
        settings.expect("hidden_act", "gelu")
    offset = settings.integer("pad_token_id", 1) + 1 if roberta else 0
    return BERTConfig(
        vocab_size=settings.get("vocab_size"),
        context_length=settings.integer("max_position_embeddings", 512) - offset,
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
        n_class=(n_class := len(settings.mapping("id2label") or {"0": "", "1": ""})),
        labels=_labels(settings, n_class) if head == "classification" else None,
        problem_type=settings.expect("problem_type", None, *PROBLEM_TYPES) if head == "classification" else None,
        pooler=head != "masked-lm",
        position_offset=offset,
        tie_decoder=head not in VOCABULARY_HEADS or settings.flag("tie_word_embeddings", True),
    )


def _labels(settings: Settings, count: int) -> tuple[str, ...] | None:
    """The names of classes, if they are more than their numbers."""
    named = settings.mapping("id2label") or {}
    names = tuple(named.get(str(index)) for index in range(count))
    if not all(isinstance(name, str) for name in names) or names == _unnamed(count):
        return None
    return names  # type: ignore[return-value]


def _unnamed(count: int) -> tuple[str, ...]:
    """What transformers calls classes without names."""
    return tuple(f"LABEL_{index}" for index in range(count))


def _write_bert(config: BERTConfig, name: str, heads: dict[str, str]) -> dict[str, Any]:
    if (name == "Bert") != (config.position_offset == 0):
        raise ConfigError(f"{name} there is none with position_offset {config.position_offset}")
    suffix = next((suffix for suffix, head in heads.items() if head == config.head), "ForPreTraining")
    if config.head not in heads.values() or config.pooler != (config.head != "masked-lm"):
        raise ConfigError(f"{name}{suffix} there is no model with pooler {str(config.pooler).lower()}")
    if config.position_offset and config.head == "masked-lm" and config.activation != "none":
        raise ConfigError(f"{name}{suffix} has the exact GELU in its head, this model activation {config.activation}")
    labels = config.labels or _unnamed(config.n_class)
    return {
        "architectures": [name + suffix],
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
        "id2label": {str(index): name for index, name in enumerate(labels)},
        "label2id": {name: index for index, name in enumerate(labels)},
        **({} if config.problem_type is None else {"problem_type": config.problem_type}),
        "pad_token_id": max(config.position_offset - 1, 0),
        "tie_word_embeddings": config.tie_decoder,
    }


def _bert_stray(config: BERTConfig) -> re.Pattern[str]:
    """Position numbers, and the heads that pretraining left in the file of a model that has another."""
    others = {
        "none": r"|cls\..*|lm_head\..*",
        "masked-lm": r"|pooler\..*|cls\.seq_relationship\..*",
        "pretraining": "",
        "classification": r"|cls\..*|lm_head\..*" + (r"|pooler\..*" if config.position_offset else ""),
    }
    unused = "" if config.tie_decoder else r"|cls\.predictions\.bias|lm_head\.bias"
    return re.compile(r"embeddings\.(position_ids|token_type_ids)" + others[config.head] + unused)


def _bert_aliases(config: BERTConfig) -> dict[str, str]:
    if config.head not in VOCABULARY_HEADS or not config.tie_decoder:
        return {}
    head = _vocabulary_head(config)
    return {f"{head}.decoder.weight": "embeddings.word_embeddings.weight", f"{head}.decoder.bias": f"{head}.bias"}


def _vocabulary_head(config: BERTConfig) -> str:
    return "lm_head" if config.position_offset else "cls.predictions"


def _untied_bias(config: BERTConfig) -> dict[str, tuple[str, ...]]:
    """Theirs has two biases, of which an untied model adds the decoder's."""
    return {} if config.tie_decoder else {"masked_lm.bias": (f"{_vocabulary_head(config)}.decoder.bias",)}


def _bert_added(config: BERTConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    head = _vocabulary_head(config)
    bias = tensors.get(f"{head}.decoder.bias")
    return {} if bias is None else {f"{head}.bias": bias.clone()}


BERT_FOLDER = Architecture(
    family="bert",
    model=BERT,
    config=BERTConfig,
    read=lambda settings, dropout: _read_bert(settings, dropout, "Bert", BERT_HEADS),
    write=lambda config: _write_bert(config, "Bert", BERT_HEADS),
    names=lambda config: BERT_NAMES | _untied_bias(config),
    prefix="bert.",
    unprefixed=("cls.", "classifier."),
    headless="BertModel",
    stray=_bert_stray,
    aliases=_bert_aliases,
    generates=False,
    untied=lambda config: dataclasses.replace(config, tie_decoder=False),
    added=_bert_added,
    renamed=((".gamma", ".weight"), (".beta", ".bias")),
)


def _roberta(family: str, name: str) -> Architecture:
    return Architecture(
        family=family,
        model=BERT,
        config=BERTConfig,
        read=lambda settings, dropout: _read_bert(settings, dropout, name, HEADS),
        write=lambda config: _write_bert(config, name, HEADS),
        names=lambda config: (
            ROBERTA_NAMES | _untied_bias(config) | (ROBERTA_CLASSIFIER if config.head == "classification" else {})
        ),
        prefix="roberta.",
        unprefixed=("lm_head.", "classifier."),
        headless=f"{name}Model",
        stray=_bert_stray,
        aliases=_bert_aliases,
        generates=False,
        untied=lambda config: dataclasses.replace(config, tie_decoder=False),
        added=_bert_added,
    )


ROBERTA_FOLDER = _roberta("roberta", "Roberta")
XLM_ROBERTA_FOLDER = _roberta("xlm-roberta", "XLMRoberta")
