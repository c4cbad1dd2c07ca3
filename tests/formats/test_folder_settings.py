"""Settings of a folder's config.json: each is followed as transformers follows it, or refused; never passed over."""

import dataclasses
import json

import pytest
import torch

import fastlm
from fastlm.errors import CheckpointError

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SIZES | {"max_position_embeddings": 24, "num_key_value_heads": 2}
BERT = SIZES | {"max_position_embeddings": 24}
MARIAN = {
    "vocab_size": 61, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 24,
    "pad_token_id": 60, "decoder_start_token_id": 60, "eos_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 61, "n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "llama": ("LlamaForCausalLM", LLAMA),
    "mistral": ("MistralForCausalLM", LLAMA),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "bert": ("BertForMaskedLM", BERT),
    "roberta": ("RobertaForMaskedLM", BERT),
    "marian": ("MarianMTModel", MARIAN),
}
ACTIVATIONS = ["relu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "silu", "swish", "tanh"]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
ROPES = [
    {"rope_type": "default", "rope_theta": 77.0},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "llama3", "rope_theta": 100.0} | LLAMA3,
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
]
LLAMA_CHANGES = {
    "rope_parameters": ROPES, "rms_norm_eps": [0.5], "hidden_act": ACTIVATIONS, "attention_bias": [True],
    "mlp_bias": [True], "head_dim": [4, 8], "num_key_value_heads": [1, 4], "tie_word_embeddings": [True, False],
    "sliding_window": [3], "partial_rotary_factor": [0.5],
}  # fmt: skip
BERT_CHANGES = {
    "hidden_act": ACTIVATIONS, "layer_norm_eps": [0.5], "type_vocab_size": [1, 3], "pad_token_id": [5],
    "tie_word_embeddings": [False], "is_decoder": [True], "position_embedding_type": ["relative_key"],
}  # fmt: skip
CHANGES = {
    "gpt2": {
        "activation_function": ACTIVATIONS, "scale_attn_weights": [False], "scale_attn_by_inverse_layer_idx": [True],
        "reorder_and_upcast_attn": [True], "n_inner": [24], "layer_norm_epsilon": [0.5], "tie_word_embeddings": [False],
    },
    "llama": LLAMA_CHANGES,
    "mistral": LLAMA_CHANGES,
    "qwen2": LLAMA_CHANGES,
    "bert": BERT_CHANGES,
    "roberta": BERT_CHANGES,
    "marian": {
        "activation_function": ACTIVATIONS, "scale_embedding": [True], "tie_word_embeddings": [False],
        "normalize_before": [True], "normalize_embedding": [True], "layer_norm_eps": [0.5], "pad_token_id": [7],
        "decoder_start_token_id": [4],
    },
}  # fmt: skip


def stock_model(family, settings):
    """transformers' own, with weights large enough that another activation or norm shows."""
    name, _ = FAMILIES[family]
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # sinusoids do not
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def logits(family, stock, ours):
    tokens = torch.arange(8, 19)[None]
    with torch.no_grad():
        if family == "marian":
            return stock(tokens, decoder_input_ids=tokens.flip(1)).logits, ours(tokens, tokens.flip(1))
        return stock(tokens).logits, ours(tokens)


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in CHANGES for name in CHANGES[family]])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_setting_is_followed_or_refused(family, name, tmp_path):
    for number, value in enumerate(CHANGES[family][name]):
        folder = tmp_path / str(number)
        stock = stock_model(family, FAMILIES[family][1] | {name: value})
        stock.save_pretrained(folder)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {name: value}), encoding="utf-8")
        try:
            ours = fastlm.load(folder)
        except CheckpointError:
            continue
        theirs, mine = logits(family, stock, ours)
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5, msg=lambda text, v=value: f"{name} {v}: {text}")


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_change_all_is_followed(family, tmp_path):
    stock = stock_model(family, FAMILIES[family][1])
    stock.save_pretrained(tmp_path)
    theirs, mine = logits(family, stock, fastlm.load(tmp_path))
    torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5)


def test_a_roberta_with_another_gelu_is_not_saved_as_one(tmp_path):
    config = fastlm.models.BERTConfig(61, 24, 1, 2, 16, 24, head="masked-lm", pooler=False, position_offset=2)
    fastlm.save(fastlm.models.BERT(config), tmp_path / "exact")
    with pytest.raises(CheckpointError, match="has the exact GELU in its head, this model activation tanh"):
        fastlm.save(fastlm.models.BERT(dataclasses.replace(config, activation="tanh")), tmp_path / "other")
