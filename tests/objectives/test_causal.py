"""Causal language modelling by settings: any model that continues text, from sizes or from a file's weights."""

import pytest
import torch

import fastlm
from fastlm.data import Tokenizer
from fastlm.errors import ConfigError
from fastlm.models import GPT, GPTConfig, Llama
from hf import transformers
from runs import StopAfter, prepared, run, same_bits, tensors


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("causal"), special="causal", tokenizer="bpe")


def test_a_llama_is_trained_and_read_by_transformers(data, tmp_path):
    result = run(tmp_path / "run", data=str(data), model="llama", export=str(tmp_path / "hf"))
    assert result.metric == "loss"
    ours = fastlm.load(tmp_path / "run")
    assert isinstance(ours, Llama)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.arange(2, 12)[None]
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_folder_is_trained_on_and_resumed_bit_for_bit(data, tmp_path):
    """Its rates become those of the settings, and its weights are where the first step begins."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(Tokenizer.load(data).vocab_size + 3, 24, 1, 2, 16, dropout=0.3))
    fastlm.save(model, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_bytes((data / "tokenizer.json").read_bytes())
    settings = {"data": str(data), "init": str(tmp_path / "hf"), "dropout": 0.1}
    run(tmp_path / "whole", **settings)
    assert fastlm.load(tmp_path / "whole").config.dropout == 0.1
    run(tmp_path / "stopped", reporter=StopAfter(5), **settings)
    run(tmp_path / "stopped", resume=True, **settings)
    assert same_bits(tmp_path / "whole", tmp_path / "stopped")
    run(tmp_path / "still", **settings | {"learning_rate": 1e-12, "weight_decay": 0.0, "max_steps": 1})
    after = tensors(tmp_path / "still")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(after[f"model.{name}"], tensor, rtol=0, atol=1e-9)


def test_a_model_that_does_not_continue_text_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match="model is 'bert', expected gpt or llama for objective causal"):
        run(tmp_path / "run", data=str(data), model="bert")


def test_a_number_that_does_not_exist_is_named_before_the_first_step(data, tmp_path):
    with pytest.raises(ConfigError, match="metric is 'accuracy', expected loss or bits_per_byte or bits_per_char"):
        run(tmp_path / "run", data=str(data), metric="accuracy")
    assert run(tmp_path / "run", data=str(data), metric="bits_per_byte").best > 0
