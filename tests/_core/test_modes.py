"""Tensors without numbers: FakeTensorMode and the meta device."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fastlm.nn as ours
from fastlm.models import (
    BERT,
    GPT,
    BERTConfig,
    GPTConfig,
    Llama,
    LlamaConfig,
    Phi3,
    Phi3Config,
    Qwen3,
    Qwen3Config,
    Seq2Seq,
    Seq2SeqConfig,
)
from samples import CASES

SIZES = {"vocab_size": 31, "context_length": 8, "n_head": 2, "n_embd": 16}
MODELS = {
    "GPT": lambda: GPT(GPTConfig(**SIZES, n_layer=1)),
    "Llama": lambda: Llama(LlamaConfig(**SIZES, n_layer=1, n_kv_head=1, n_inner=16)),
    "Qwen3": lambda: Qwen3(Qwen3Config(**SIZES, n_layer=1, n_kv_head=1, n_inner=16)),
    "Phi3": lambda: Phi3(
        Phi3Config(**SIZES, n_layer=1, n_inner=16, rope_scaling="longrope", rope_original_context=4,
                   rope_short_factors=(1, 1, 2, 2), rope_long_factors=(1, 2, 3, 4))
    ),
    "BERT": lambda: BERT(BERTConfig(**SIZES, n_layer=1)),
    "Seq2Seq": lambda: Seq2Seq(Seq2SeqConfig(**SIZES, n_encoder_layer=1, n_decoder_layer=1)),
}  # fmt: skip
LAYERS = {
    "Linear": (lambda kit: kit.Linear(16, 16), 1),
    "LayerNorm": (lambda kit: kit.LayerNorm(16), 1),
    "RMSNorm": (lambda kit: kit.RMSNorm(16), 1),
    "GELU": (lambda kit: kit.GELU(), 1),
    "encoder layer": (lambda kit: kit.TransformerEncoderLayer(16, 2, 32, 0.0, F.gelu, batch_first=True), 1),
    "decoder layer": (lambda kit: kit.TransformerDecoderLayer(16, 2, 32, 0.0, norm_first=True, batch_first=True), 2),
}


@pytest.mark.parametrize("name", CASES)
def test_a_fake_mode_gives_the_shapes_for_tensors_with_numbers(name):
    case, (leaves, others) = CASES[name], CASES[name].leaves()
    expected = case.run(leaves, others)
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = case.run(leaves, others)
    assert all(type(y) is FakeTensor for y in found)
    assert [(y.shape, y.dtype) for y in found] == [(y.shape, y.dtype) for y in expected]


@pytest.mark.parametrize("name", CASES)
def test_meta_tensors_give_the_shapes(name):
    case, (leaves, others) = CASES[name], CASES[name].leaves("meta")
    expected = case.run(*case.leaves())
    found = case.run(leaves, others)
    assert all(y.is_meta for y in found)
    assert [(y.shape, y.dtype) for y in found] == [(y.shape, y.dtype) for y in expected]
    sum(y.sum() for y in found).backward()
    assert all(t.grad.is_meta for t in leaves.values())


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_models_run_on_meta(name, train):
    model = MODELS[name]().to("meta").train(train)
    ids = torch.zeros(2, 5, dtype=torch.long, device="meta")
    inputs = (ids, ids) if name == "Seq2Seq" else (ids,)
    with torch.set_grad_enabled(train):
        assert model(*inputs).shape == (2, 5, 31)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_run_on_meta(name):
    make, inputs = LAYERS[name]
    x = torch.zeros(2, 5, 16, device="meta", requires_grad=True)
    y = make(ours).to("meta")(*[x] * inputs)
    y.sum().backward()
    assert y.is_meta
    assert x.grad is not None
