"""Llama: equal to transformers' Llama, Mistral and Qwen2 in both directions, cached and uncached."""

import dataclasses

import pytest
import torch

import fastlm
from fastlm.errors import CheckpointError, ConfigError
from fastlm.inference import KVCache, generate
from fastlm.models import Llama, LlamaConfig, Phi3, Phi3Config, Qwen3, Qwen3Config
from hf import CLOSE, check_gradients, perturbed, reload_as_theirs, transformers

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
CASES = {
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "one-kv-head-linear": ("Llama", {"num_key_value_heads": 1, "rope_parameters": LINEAR}),
    "biases-tied-llama3": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5}),
    "mistral-no-window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
}
PROJECTIONS = {"attention.qkv": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up": ("gate_proj", "up_proj")}
MODULES = {"attention": "self_attn", "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
SMALL = LlamaConfig(61, 32, 2, 4, 16, 40, n_kv_head=2)


def their_model(name):
    torch.manual_seed(0)
    family, changes = CASES[name]
    config = getattr(transformers, f"{family}Config")(**(SIZES | changes))
    return perturbed(getattr(transformers, f"{family}ForCausalLM")(config))


def some_tokens(batch=3, length=13):
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(1))


def our_model(**changes):
    torch.manual_seed(0)
    return perturbed(Llama(dataclasses.replace(SMALL, **changes)))


def their_names(ours):
    """The names in transformers of the tensors that one of ours is stacked from."""
    if not ours.startswith("layers."):
        return (ours if ours.startswith("lm_head") else f"model.{ours}".replace("wte", "embed_tokens"),)
    _, layer, *inner, leaf = ours.split(".")
    for stacked, parts in PROJECTIONS.items():
        if ".".join(inner) == stacked:
            module = MODULES.get(inner[0], inner[0])
            return tuple(f"model.layers.{layer}.{module}.{part}.{leaf}" for part in parts)
    last = {"out": "o_proj", "down": "down_proj"}
    path = [MODULES.get(inner[0], inner[0])] + [last[each] for each in inner[1:]]
    return (f"model.layers.{layer}.{'.'.join(path)}.{leaf}",)


@pytest.mark.parametrize("name", CASES)
def test_equals_theirs_in_logits_loss_and_gradients(name, tmp_path):
    theirs, tokens = their_model(name), some_tokens()
    theirs.save_pretrained(tmp_path)
    ours = fastlm.load(tmp_path)
    assert isinstance(ours, Llama)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, **CLOSE)
    expected = theirs(tokens, labels=tokens).loss
    expected.backward()
    loss = ours(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    loss.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    check_gradients(ours, theirs, {key: their_names(key) for key, _ in ours.named_parameters()})


@pytest.mark.parametrize("name", CASES)
def test_they_load_what_we_save_and_generate_the_same_tokens(name, tmp_path):
    theirs, tokens = their_model(name), some_tokens(length=6)
    theirs.save_pretrained(tmp_path)
    ours = fastlm.load(tmp_path)
    fastlm.save(ours, tmp_path / "again")
    again = reload_as_theirs(type(theirs), tmp_path / "again")
    torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits, rtol=0, atol=0)
    assert fastlm.load(tmp_path / "again").config == ours.config
    new = torch.stack(list(generate(ours, tokens, 20, temperature=0.0)), 1)
    expected = theirs.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert torch.equal(new, expected[:, 6:])


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("pieces", [(13,), (6, 7), (1, 1, 5, 1, 5), (1,) * 13])
def test_cache_changes_nothing(window, pieces):
    model, tokens = our_model(sliding_window=window, first_window_layer=1), some_tokens()
    cache = KVCache(model.config, 3)
    assert cache.keys.shape == (2, 3, 2, 32, 4)  # two heads of keys and values for four of queries
    with torch.no_grad():
        parts = [model(part.contiguous(), cache=cache) for part in tokens.split(pieces, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens), **CLOSE)


def test_a_token_sees_the_window_before_it_and_nothing_else():
    model = our_model(n_layer=1, sliding_window=3)
    tokens = some_tokens(1)
    changed = tokens.clone()
    changed[:, 5] = (tokens[:, 5] + 1) % 61
    differs = (model(tokens) != model(changed)).any(-1)[0]
    assert differs.nonzero().squeeze(1).tolist() == [5, 6, 7]


def test_exports():
    model, tokens = our_model(sliding_window=3), some_tokens()
    exported = torch.export.export(model, (tokens,), strict=False).module()
    torch.testing.assert_close(exported(tokens), model(tokens), **CLOSE)


def test_bfloat16_is_near_fp32():
    model, tokens = our_model(), some_tokens()
    expected = model(tokens)
    ours = model.to(torch.bfloat16)(tokens).float()
    # Two layers in a format of eight bits.
    assert (ours - expected).norm() < 0.03 * expected.norm()


def test_initialisation_follows_the_depth():
    torch.manual_seed(0)
    model = Llama(LlamaConfig(64, 8, 8, 4, 128, 256, qkv_bias=True))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
        else:
            std = 0.02 / 4 if name.endswith(("attention.out.weight", "mlp.down.weight")) else 0.02  # sqrt(2 * 8) = 4
            assert abs(parameter.std().item() - std) < 6 * std / (2 * parameter.numel()) ** 0.5, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kv_head": 3}, "n_kv_head is 3, expected a divisor of n_head 4"),
        ({"head_size": 5}, "head_size is 5, expected an even number"),
        ({"n_embd": 18, "head_size": None}, "n_embd is 18, expected a multiple of n_head 4"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected None, linear or llama3"),
        ({"sliding_window": 0}, "sliding_window is 0, expected an integer of at least 1"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a number above 0"),
        ({"tie_embeddings": 1}, "tie_embeddings is 1, expected true or false"),
    ],
)
def test_refuses_impossible_sizes(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_refuses_bad_tokens():
    model = our_model()
    for tokens, message in (
        (torch.zeros(1, 33, dtype=torch.int64), "tokens of length 33 does not fit the context of 32"),
        (torch.tensor([[61]]), "tokens holds the id 61, expected ids from 0 to 60"),
        (torch.zeros(2, 2), "tokens has dtype torch.float32, expected torch.int64"),
        (torch.zeros(3, dtype=torch.int64), r"tokens has shape \(3,\), expected \(batch, length\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(tokens)
    with pytest.raises(ValueError, match=r"targets has shape \(3, 4\), expected \(3, 13\) as tokens has"):
        model(some_tokens(), some_tokens(length=4))


def test_says_what_theirs_cannot_express(tmp_path):
    with pytest.raises(CheckpointError, match="sliding window with these biases"):
        fastlm.save(our_model(sliding_window=4, mlp_bias=True), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", [Llama, Qwen3, Phi3])
def test_empty_batches_and_sequences(kind):
    config = {Llama: LlamaConfig, Qwen3: Qwen3Config, Phi3: Phi3Config}[kind](61, 32, 1, 4, 16, 40, n_kv_head=2)
    for shape in ((0, 3), (2, 0)):
        assert kind(config)(torch.zeros(shape, dtype=torch.long)).shape == (*shape, 61)
