"""Phi-3 and Phi-4-mini: equal to transformers' in both directions, cached and uncached, generating and in training."""

import json

import pytest
import torch

import fastlm
from fastlm.errors import CheckpointError, ConfigError
from fastlm.inference import KVCache
from fastlm.models import Phi3, Phi3Config
from hf import CLOSE
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

LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.2], "long_factor": [1.5, 4.0]}
CASES = {
    "as many heads of keys": {},
    "grouped, tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "three quarters turn, window": {"hidden_size": 32, "partial_rotary_factor": 0.75, "sliding_window": 5},
    "half turns, base": {"partial_rotary_factor": 0.5, "rope_theta": 500.0, "rms_norm_eps": 1e-2},
    "one head of keys, wide window": {"num_key_value_heads": 1, "sliding_window": 60},
    "longrope within": {"original_max_position_embeddings": 60, "rope_scaling": LONGROPE},
    "longrope beyond": {"original_max_position_embeddings": 10, "rope_scaling": LONGROPE},
    "longrope, attention factor": {
        "original_max_position_embeddings": 10,
        "rope_scaling": LONGROPE | {"attention_factor": 1.3},
        "num_key_value_heads": 2,
    },
    "longrope, factor, half turns": {
        "hidden_size": 32,
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 9,
        "rope_scaling": LONGROPE | {"factor": 3.0},
        "sliding_window": 7,
    },
}
EVERY = pytest.mark.parametrize("name", CASES)
STACKED = {"qkv": ("qkv_proj",), "gate_up": ("gate_up_proj",)}
LONG = Phi3Config(61, 64, 2, 4, 16, 40, rope_scaling="longrope", rope_original_context=10,
                  rope_short_factors=(1.0, 1.2), rope_long_factors=(1.5, 4.0))  # fmt: skip


@pytest.fixture
def pair(name, tmp_path):
    theirs = their_model("Phi3", **CASES[name])
    return load_as_ours(theirs, tmp_path / "theirs"), theirs


@EVERY
@pytest.mark.parametrize("length", [5, 13])
def test_equals_theirs_in_logits_loss_and_gradients(pair, length):
    ours, theirs = pair
    assert type(ours) is Phi3
    assert ours.config.family == "phi3"
    check_logits_loss_and_gradients(ours, theirs, STACKED, length)


@EVERY
def test_they_load_what_we_save(pair, tmp_path):
    check_saved(*pair, tmp_path / "again")


@EVERY
def test_generates_the_same_tokens_across_the_original_context(pair):
    check_generation(*pair)


@EVERY
@pytest.mark.parametrize("pieces", [(5, 3), (1, 1, 4, 1, 1)])
def test_cache_changes_nothing(pair, pieces):
    check_cache(pair[0], pieces)


@pytest.mark.parametrize("name", ["grouped, tied", "three quarters turn, window", "longrope beyond"])
def test_training_steps_are_theirs(pair):
    check_steps(*pair)


def test_a_cache_of_a_shorter_sequence_is_not_gone_on_with():
    torch.manual_seed(0)
    model, tokens = Phi3(LONG).eval(), some_tokens(length=14)
    cache = KVCache(model.config, 3)
    model(tokens[:, :9].contiguous(), cache=cache)
    with pytest.raises(ValueError, match="position 14, beyond rope_original_context 10, expected all tokens again"):
        model(tokens[:, 9:].contiguous(), cache=cache)
    cache.clear()
    beyond = [model(part.contiguous(), cache=cache) for part in tokens.split((11, 3), 1)]
    torch.testing.assert_close(torch.cat(beyond, 1), model(tokens), **CLOSE)


def test_residual_dropout_drops_in_training_alone():
    torch.manual_seed(0)
    model, tokens = Phi3(Phi3Config(61, 64, 2, 4, 16, 40, residual_dropout=0.5)), some_tokens()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_exports_and_compiles_to_one_graph():
    torch.manual_seed(0)
    model, tokens = Phi3(LONG).eval(), some_tokens()
    exported = torch.export.export(model, (tokens,), strict=False).module()
    torch.testing.assert_close(exported(tokens), model(tokens))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "llama3"}}, r"rope_scaling\.rope_type is llama3, expected default or longrope"),
        ({"rope_scaling": {"type": "dynamic"}}, r"rope_scaling\.rope_type is dynamic, expected default or longrope"),
        ({"rope_scaling": {"type": "su", "short_factor": [1.0, 1.0]}}, r"missing rope_scaling\.long_factor"),
        ({"rope_scaling": LONGROPE | {"long_factor": [1.0]}}, r"rope_long_factors is \[1.0\], expected 2 numbers"),
        ({"rope_scaling": LONGROPE | {"short_factor": [1.0, 0]}}, r"rope_short_factors is .*, expected 2 numbers"),
        (
            {"rope_scaling": LONGROPE | {"attention_factor": 0}},
            "attention_factor is 0.0, expected a number above",
        ),
        ({"partial_rotary_factor": 0.75}, "rotary_share is 0.75, expected at most 1, for an even number"),
        ({"partial_rotary_factor": 2.0}, "rotary_share is 2.0, expected at most 1"),
        ({"partial_rotary_factor": "half"}, 'partial_rotary_factor is "half", expected a number'),
        ({"resid_pdrop": 1}, r"residual_dropout is 1, expected a number in \[0, 1\)"),
        ({"original_max_position_embeddings": 1}, "rope_original_context is 1, expected at least 2"),
    ],
)
def test_settings_that_are_not_supported(changes, message, tmp_path):
    fastlm.save(Phi3(Phi3Config(61, 64, 2, 4, 16, 40)), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=f"^{path}: .*{message}") as caught:
        fastlm.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["su", "yarn"])
def test_older_names_of_longrope_are_read(kind, tmp_path):
    fastlm.save(Phi3(LONG), tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    settings["rope_scaling"] = {"type": kind, **{k: v for k, v in LONGROPE.items() if k != "rope_type"}}
    path.write_text(json.dumps(settings))
    assert fastlm.load(tmp_path).config == LONG


def test_what_theirs_cannot_express_is_said(tmp_path):
    with pytest.raises(CheckpointError, match=r"^Phi3: a phi3 has no qkv_bias, output_bias or mlp_bias"):
        fastlm.save(Phi3(Phi3Config(61, 32, 1, 4, 16, 40, output_bias=True)), tmp_path / "x")
    with pytest.raises(ConfigError, match="rope_scaling is 'linear', expected None or longrope"):
        Phi3Config(61, 32, 1, 4, 16, 40, rope_scaling="linear")
