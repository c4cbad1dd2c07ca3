"""Folders whose config.json ties tensors that differ: loaded untied with a warning, as transformers loads them."""

import json
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import fastlm
import fastlm.data
from fastlm.inference import generate
from hf import CLOSE, perturbed, reload_as_theirs, transformers

V = 61
LLAMA = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 24, "tie_word_embeddings": True}  # fmt: skip
BERT = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 26, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
GPT2 = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 24,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}  # fmt: skip
MARIAN = {"vocab_size": V, "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
          "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 24,
          "activation_function": "relu", "dropout": 0.0, "pad_token_id": 0, "decoder_start_token_id": 1,
          "eos_token_id": 2, "forced_eos_token_id": None, "scale_embedding": True}  # fmt: skip
ENCODER, DECODER = "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"

# A model of theirs, and which of its tied tensors the file has besides, changed.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "gpt2": ("GPT2LMHeadModel", GPT2, {"lm_head.weight": "transformer.wte.weight"}),
    "llama": ("LlamaForCausalLM", LLAMA, {"lm_head.weight": "model.embed_tokens.weight"}),
    "mistral": (
        "MistralForCausalLM",
        LLAMA | {"sliding_window": None},
        {"lm_head.weight": "model.embed_tokens.weight"},
    ),
    "qwen2": ("Qwen2ForCausalLM", LLAMA, {"lm_head.weight": "model.embed_tokens.weight"}),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 8}, {"lm_head.weight": "model.embed_tokens.weight"}),
    "phi3": ("Phi3ForCausalLM", LLAMA | {"pad_token_id": None}, {"lm_head.weight": "model.embed_tokens.weight"}),
    "bert": (
        "BertForMaskedLM",
        BERT,
        {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"},
    ),
    "bert-bias": ("BertForMaskedLM", BERT, {"cls.predictions.decoder.bias": "cls.predictions.bias"}),
    "bert-both": (
        "BertForPreTraining",
        BERT,
        {
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
    ),
    "roberta": (
        "RobertaForMaskedLM",
        BERT | {"pad_token_id": 1, "type_vocab_size": 1},
        {"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight"},
    ),
    "marian-head": ("MarianMTModel", MARIAN, {"lm_head.weight": "model.shared.weight"}),
    "marian-source": ("MarianMTModel", MARIAN, {ENCODER: "model.shared.weight"}),
    "marian-target": ("MarianMTModel", MARIAN, {DECODER: "model.shared.weight"}),
    "marian-all": (
        "MarianMTModel",
        MARIAN,
        dict.fromkeys(("lm_head.weight", ENCODER, DECODER), "model.shared.weight"),
    ),
}


def write(name, folder):
    """A folder of `name`, whose config ties what differs; returns the class of theirs."""
    kind = getattr(transformers, CASES[name][0])
    torch.manual_seed(0)
    perturbed(kind(kind.config_class(**CASES[name][1]))).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for seed, (alias, base) in enumerate(CASES[name][2].items()):
        noise = torch.randn(tensors[base].shape, generator=torch.Generator().manual_seed(seed))
        tensors[alias] = tensors[base] + 0.3 * noise
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return kind


def logits(model, tokens):
    """Of one of theirs or ours, of what it predicts in the vocabulary."""
    theirs = isinstance(model, transformers.PreTrainedModel)
    if isinstance(model, (transformers.MarianMTModel, fastlm.models.Seq2Seq)):
        target = tokens[:, :7]
        return model(tokens, decoder_input_ids=target).logits if theirs else model(tokens, target)
    output = model(tokens)
    return output if not theirs else getattr(output, "prediction_logits", getattr(output, "logits", None))


def norms(model):
    """The sizes of all gradients, each parameter once: equal sets of them say that the same tensors are tied."""
    values = [float(p.grad.double().norm()) for p in model.parameters() if p.grad is not None]
    return sum(value**2 for value in values) ** 0.5


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    return request.param, write(request.param, tmp_path), tmp_path


def load_untied(folder):
    with pytest.warns(UserWarning, match="loaded untied") as caught:
        model = fastlm.load(folder)
    return model, str(caught[0].message)


def test_loads_what_theirs_loads(case):
    name, kind, folder = case
    theirs = kind.from_pretrained(folder).eval()
    ours, message = load_untied(folder)
    for alias, base in CASES[name][2].items():
        assert f"{alias} differs from {base}" in message
    tokens = torch.randint(3, V, (2, 11), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits(ours, tokens), logits(theirs, tokens), **CLOSE)


def test_trains_as_theirs_trains(case):
    """One step of plain descent: the logits after it are theirs, whatever is tied to what."""
    _, kind, folder = case
    theirs = kind.from_pretrained(folder).eval()
    ours, _ = load_untied(folder)
    tokens = torch.randint(3, V, (2, 11), generator=torch.Generator().manual_seed(1))
    if kind is transformers.MarianMTModel:  # a buffer there
        ours.output_bias.requires_grad_(False)
    for model in (theirs, ours):
        out = logits(model, tokens)
        F.cross_entropy(out.flatten(0, 1), tokens[:, : out.shape[1]].flatten()).backward()
        torch.optim.SGD(model.parameters(), lr=0.5).step()
    torch.testing.assert_close(logits(ours, tokens), logits(theirs, tokens), **CLOSE)
    torch.testing.assert_close(norms(ours), norms(theirs), **CLOSE)


@pytest.mark.parametrize("format", ["hf", "fastlm"])
def test_saved_again_it_is_untied(case, format, tmp_path):
    _, kind, folder = case
    ours, _ = load_untied(folder)
    again = tmp_path / "again"
    fastlm.save(ours, again, format=format)
    tokens = torch.randint(3, V, (2, 11), generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = fastlm.load(again)
    assert loaded.config == ours.config
    torch.testing.assert_close(logits(loaded, tokens), logits(ours, tokens), rtol=0, atol=0)
    if format == "fastlm":
        assert len(list(loaded.parameters())) == len(list(ours.parameters()))  # what stayed tied is still
        return
    assert json.loads((again / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(logits(reload_as_theirs(kind, again), tokens), logits(ours, tokens), **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generates_as_theirs_generates(name, tmp_path):
    kind = write(name, tmp_path)
    theirs = kind.from_pretrained(tmp_path).eval()
    ours, _ = load_untied(tmp_path)
    prompt = torch.arange(3, 8)[None]
    expected = theirs.generate(prompt, max_new_tokens=9, min_new_tokens=9, do_sample=False, pad_token_id=0)[:, 5:]
    got = torch.stack(list(generate(ours, prompt, 9, temperature=0)), 1)
    assert torch.equal(got, expected)


def test_equal_copies_stay_tied(tmp_path):
    """Files of earlier libraries hold a tied tensor under each of its names; not a number equals itself there."""
    kind = write("gpt2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.wte.weight"][3, 4] = torch.nan
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert fastlm.load(tmp_path).config.tie_embeddings
    assert kind.from_pretrained(tmp_path).lm_head.weight.shape == (V, 16)


def test_the_command_says_it(tmp_path, capsys):
    from fastlm.cli import main

    write("gpt2", tmp_path)
    fastlm.data.Tokenizer.characters(["abcdefgh"]).save(tmp_path / "tokenizer.json")
    with pytest.warns(UserWarning, match="lm_head.weight differs from transformer.wte.weight"):
        assert main(["generate", str(tmp_path), "--prompt", "abc", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("abc")


def test_hooks_on_an_untied_decoder_are_seen(tmp_path):
    write("bert", tmp_path)
    ours, _ = load_untied(tmp_path)
    tokens = torch.arange(3, 11)[None]
    expected, loss = ours(tokens), ours.loss(tokens, tokens)
    assert torch.equal(ours.loss(tokens, tokens), loss)
    ours.masked_lm.decoder.register_forward_hook(lambda module, args, output: 2 * output)
    bias = ours.masked_lm.bias
    torch.testing.assert_close(ours(tokens), 2 * (expected - bias) + bias, **CLOSE)
    torch.testing.assert_close(ours.loss(tokens, tokens), F.cross_entropy(ours(tokens)[0], tokens[0]), **CLOSE)
