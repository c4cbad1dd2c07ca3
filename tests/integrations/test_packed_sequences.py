"""Sequences packed one after the other, as DataCollatorWithFlattening makes them, equal the separate ones."""

from __future__ import annotations

import copy
import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers

import fastlm
from fastlm.integrations import huggingface

V, WINDOW = 61, 4
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 44, "vocab_size": V, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
SLIDING = SIZES | {"sliding_window": WINDOW}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "mistral": transformers.MistralConfig(**SLIDING),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen2 with a window": transformers.Qwen2Config(**SLIDING, use_sliding_window=True, max_window_layers=1),
    "qwen3": transformers.Qwen3Config(**SIZES),
    "gemma": transformers.GemmaConfig(**SIZES),
    "gemma2": transformers.Gemma2Config(**SLIDING, attn_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "gemma3": transformers.Gemma3TextConfig(**SLIDING, query_pre_attn_scalar=8),
    # Sinks: transformers itself lets its packed sequences see each other.
    "gpt_oss": transformers.GptOssConfig(**SLIDING, num_local_experts=2, num_experts_per_tok=2),
}
LENGTHS = (7, 1, 11, 5)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def build(name):
    config = copy.deepcopy(CONFIGS[name])
    config._attn_implementation = "eager" if name in ("gemma2", "gpt_oss") else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config)
    if name == "gpt_oss":
        model.set_experts_implementation("eager")
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    ours = copy.deepcopy(model)
    fastlm.accelerate(ours, loss=False)
    return ours.train(), model.train()


def sequences():
    return [torch.randint(3, V, (n,)) for n in LENGTHS]


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_cache", [False, True], ids=["", "cache"])
@pytest.mark.parametrize("flash", [True, False], ids=["lengths", "positions"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_sequences_equal_separate_ones(name, flash, use_cache, monkeypatch):
    if not flash and (use_cache or name == "gpt_oss"):
        pytest.skip("transformers reads positions without a cache only, and not of this model")
    ours, stock = build(name)
    parts = sequences()
    calls = []
    varlen = huggingface.attention_varlen
    monkeypatch.setattr(huggingface, "attention_varlen", lambda *a, **k: calls.append(1) or varlen(*a, **k))
    batch = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=flash)(
        [{"input_ids": part.tolist()} for part in parts]
    )
    labels = batch.pop("labels")
    logits = ours(**batch, use_cache=use_cache).logits[0]
    expected = torch.cat([stock(input_ids=part[None], use_cache=False).logits[0] for part in parts])
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert len(calls) == (0 if name == "gpt_oss" else 2)  # the kernel does each layer, but no sinks
    if name != "gpt_oss":
        torch.testing.assert_close(logits, stock(**batch, use_cache=False).logits[0], **CLOSE)
    for y in (logits, expected):
        torch.nn.functional.cross_entropy(y, labels[0]).backward()
    theirs = gradients(stock)
    for parameter, grad in gradients(ours).items():
        torch.testing.assert_close(grad, theirs[parameter], rtol=1e-3, atol=1e-4, msg=parameter)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_masks_biases_and_sinks_combine_with_packed_sequences(causal, window):
    torch.manual_seed(0)
    T = sum(LENGTHS)
    q, k, v = (torch.randn(1, 4, T, 8) for _ in range(3))
    cu = torch.tensor((0, *LENGTHS)).cumsum(0).int()
    module = torch.nn.Module()
    bias, sinks = torch.randn(1, 4, T, T), torch.randn(4)
    padding = torch.rand(1, 1, 1, T) > 0.2
    padding[..., cu[:-1].long()] = True  # every query sees a key
    options = {"is_causal": causal} | ({} if window is None else {"sliding_window": window})
    places = torch.arange(T)
    row = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    seen = row[:, None] == row
    distance = places[:, None] - places
    seen = seen & (distance >= 0) if causal else seen
    seen = seen if window is None else seen & (distance.abs() < window)
    for mask in (None, padding.expand(1, 1, T, T), torch.where(padding, 0.0, -torch.inf).expand(1, 1, T, T)):
        for extra in ({}, {"position_bias": bias}, {"s_aux": sinks}):
            actual, _ = huggingface.attention_forward(
                module, q, k, v, mask, cu_seq_lens_q=cu, cu_seq_lens_k=cu, **options, **extra
            )
            scores = q @ k.transpose(-1, -2) / 8**0.5 + extra.get("position_bias", 0.0)
            scores = scores.masked_fill(~(seen if mask is None else seen & padding), -torch.inf)
            last = extra["s_aux"].view(1, 4, 1, 1).expand(1, 4, T, 1) if "s_aux" in extra else scores[..., :0]
            weights = torch.cat((scores, last), -1).softmax(-1)[..., :T].nan_to_num()
            torch.testing.assert_close(actual, (weights @ v).transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_other_lengths_of_keys_are_refused_where_a_mask_is_needed():
    x = torch.randn(1, 2, 6, 8)
    lengths = {"cu_seq_lens_q": torch.tensor([0, 6]).int(), "cu_seq_lens_k": torch.tensor([0, 2, 6]).int()}
    with pytest.raises(NotImplementedError, match="need cu_seq_lens_k to equal cu_seq_lens_q"):
        huggingface.attention_forward(torch.nn.Module(), x, x, x, None, s_aux=torch.zeros(2), **lengths)
