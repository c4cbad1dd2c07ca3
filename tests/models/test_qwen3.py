"""Qwen 3: equal to transformers' in both directions, cached and uncached, generating and in training."""

import json

import pytest
import torch

import fastlm
from fastlm.errors import CheckpointError, ConfigError
from fastlm.models import Qwen3, Qwen3Config
from models.relatives import (
    check_cache,
    check_generation,
    check_logits_loss_and_gradients,
    check_saved,
    check_steps,
    load_as_ours,
    some_tokens,
    their_model,
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "heads wider than the model": {"num_key_value_heads": 2, "head_dim": 8},
    "narrower, one of keys, tied": {"num_key_value_heads": 1, "head_dim": 2, "tie_word_embeddings": True},
    "as many of keys, biases": {"num_key_value_heads": 4, "head_dim": 6, "attention_bias": True},
    "base": {"num_key_value_heads": 2, "head_dim": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "linear": {
        "num_key_value_heads": 2,
        "head_dim": 4,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    },
    "llama3, eps": {"num_key_value_heads": 2, "head_dim": 4, "rope_parameters": LLAMA3, "rms_norm_eps": 1e-2},
    "window in the upper layer": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "window in all layers": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 0,
        "tie_word_embeddings": True,
    },
}
STACKED = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}
EVERY = pytest.mark.parametrize("name", CASES)


@pytest.fixture
def pair(name, tmp_path):
    theirs = their_model("Qwen3", **CASES[name])
    return load_as_ours(theirs, tmp_path / "theirs"), theirs


@EVERY
def test_equals_theirs_in_logits_loss_and_gradients(pair):
    ours, theirs = pair
    assert type(ours) is Qwen3
    assert ours.config.family == "qwen3"
    check_logits_loss_and_gradients(ours, theirs, STACKED)


@EVERY
def test_they_load_what_we_save(pair, tmp_path):
    check_saved(*pair, tmp_path / "again")


@EVERY
def test_generates_the_same_tokens(pair):
    check_generation(*pair)


@EVERY
@pytest.mark.parametrize("pieces", [(6, 7), (1, 1, 5, 1, 5)])
def test_cache_changes_nothing(pair, pieces):
    check_cache(pair[0], pieces)


@pytest.mark.parametrize("name", ["heads wider than the model", "window in all layers"])
def test_training_steps_are_theirs(pair):
    check_steps(*pair)


def test_exports_and_compiles_to_one_graph():
    torch.manual_seed(0)
    model, tokens = Qwen3(Qwen3Config(61, 32, 1, 4, 16, 40, n_kv_head=2, head_size=8)).eval(), some_tokens()
    exported = torch.export.export(model, (tokens,), strict=False).module()
    torch.testing.assert_close(exported(tokens), model(tokens))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens))


def test_a_hook_on_the_norm_of_the_queries_is_seen():
    torch.manual_seed(0)
    model, tokens = Qwen3(Qwen3Config(61, 32, 2, 4, 16, 40)).eval(), some_tokens()
    before, seen = model(tokens), []
    model.layers[1].attention.q_norm.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    torch.testing.assert_close(model(tokens), before)
    assert seen == [(3, 4, 13, 4)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, r"rope_scaling\.rope_type is yarn, expected default"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, r"rope_parameters\.rope_type is dynamic, expected default or"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu", expected "silu"'),
        ({"head_dim": 5}, "head_size is 5, expected an even number"),
        ({"head_dim": None}, "has shape"),
        ({"attention_bias": 1}, "attention_bias is 1, expected true or false"),
        ({"num_key_value_heads": 3}, "n_kv_head is 3, expected a divisor of n_head 4"),
        ({"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
         "expected full attention first and sliding windows after it"),
    ],
)  # fmt: skip
def test_settings_that_are_not_supported(changes, message, tmp_path):
    fastlm.save(Qwen3(Qwen3Config(61, 32, 2, 4, 16, 40, head_size=8)), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=f"^{tmp_path}.*{message}") as caught:
        fastlm.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_their_defaults_hold_where_a_folder_is_silent(tmp_path):
    fastlm.save(Qwen3(Qwen3Config(61, 32768, 1, 32, 64, 40, head_size=128)), tmp_path)
    path = tmp_path / "config.json"
    silent = ("num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta", "rms_norm_eps")
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in silent}))
    theirs = type(their_model("Qwen3")).from_pretrained(tmp_path).config
    ours = fastlm.load(tmp_path).config
    assert (ours.n_kv_head, ours.head_size, ours.context_length, ours.rms_norm_eps) == (
        theirs.num_key_value_heads, theirs.head_dim, theirs.max_position_embeddings, theirs.rms_norm_eps
    )  # fmt: skip
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


def test_what_theirs_cannot_express_is_said(tmp_path):
    with pytest.raises(CheckpointError, match=r"^Qwen3: a qwen3 has qkv_bias as output_bias, and no mlp_bias$"):
        fastlm.save(Qwen3(Qwen3Config(61, 32, 1, 4, 16, 40, mlp_bias=True)), tmp_path / "x")
    with pytest.raises(ConfigError, match="family is 'llama', expected None or qwen3"):
        Qwen3Config(61, 32, 1, 4, 16, 40, family="llama")
