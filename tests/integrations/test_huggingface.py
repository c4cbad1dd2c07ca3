"""Hugging Face models with fastlm in them against the same models without, on small seeded configurations."""

from __future__ import annotations

import copy
import functools
import os
import pickle

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    masking_utils,
    modeling_utils,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import fastlm
import fastlm.integrations.huggingface  # registers attn_implementation="fastlm"

V, B, T = 4099, 2, 11
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 44, "vocab_size": V}
GROUPED = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "head_dim": 8}
SLIDING = GROUPED | {"sliding_window": 6}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CAUSAL = {
    "gpt2": transformers.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0),
    "llama": transformers.LlamaConfig(**GROUPED),
    "mistral": transformers.MistralConfig(**SLIDING),
    "qwen2": transformers.Qwen2Config(**GROUPED),
    "qwen3": transformers.Qwen3Config(**GROUPED),
    "gemma2": transformers.Gemma2Config(
        **SLIDING, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, query_pre_attn_scalar=8
    ),
    "gemma3": transformers.Gemma3TextConfig(**SLIDING, query_pre_attn_scalar=8),
    "gpt_oss": transformers.GptOssConfig(**SLIDING, num_local_experts=2, num_experts_per_tok=1),
}
MASKED = {
    "bert": transformers.BertConfig(**SIZES, max_position_embeddings=64),
    "roberta": transformers.RobertaConfig(**SIZES, max_position_embeddings=64),
}
SEQ2SEQ = {
    "t5": transformers.T5Config(
        vocab_size=V, d_model=32, d_kv=8, d_ff=44, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
    "bart": transformers.BartConfig(
        vocab_size=V, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=44, decoder_ffn_dim=44, max_position_embeddings=64, **SPECIAL,
    ),
}  # fmt: skip
VIT = transformers.ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=44, image_size=16, patch_size=4
)
# Where keys are not turned, their bias shifts all scores of a query alike: its gradient is rounding alone.
KEY_BIASES = ("key.bias", "k_proj.bias")
NAMES = [*CAUSAL, *MASKED, *SEQ2SEQ, "vit"]


def build(name, dropout=False):
    config = copy.deepcopy((CAUSAL | MASKED | SEQ2SEQ | {"vit": VIT})[name])
    for key in list(config.to_dict()):
        if not dropout and ("dropout" in key or key.endswith("pdrop")):
            setattr(config, key, 0.0)
    kind = {name in CAUSAL: AutoModelForCausalLM, name in MASKED: AutoModelForMaskedLM}.get(True)
    kind = kind or (AutoModelForSeq2SeqLM if name in SEQ2SEQ else transformers.ViTForImageClassification)
    model = kind.from_config(config) if name != "vit" else kind(config)
    if name == "gpt_oss":
        model.set_experts_implementation("eager")  # the grouped product takes no fp64
    for parameter in model.parameters():  # far enough from the start that attention chooses
        parameter.data += torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1)
    return model.train()


def inputs_of(name, padded=True, left=False):
    if name == "vit":
        return {"pixel_values": torch.randn(B, 3, 16, 16), "labels": torch.tensor([0, 1])}
    ids = torch.randint(3, V, (B, T))
    mask = torch.ones(B, T, dtype=torch.long)
    if padded:
        mask[1, -4:] = 0
        mask = mask.flip(1) if left else mask
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def run(model, inputs, seen=None):
    """Loss, logits where there is no padding, and all gradients."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    logits = output.logits.detach()
    if "attention_mask" in inputs:
        logits = logits[inputs["attention_mask"].bool()]
    results = {"loss": output.loss.detach(), "logits": logits}
    return results | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_parity(model, reference, inputs):
    """`model` against `reference` in fp64: its error is at most three times `reference`'s in fp32 or sums' rounding.

    The norm of the error is compared: the maximum, which the ops are held to, jumps about after so many layers.
    """
    rounding = torch.finfo(torch.float32).eps * V**0.5
    exact = copy.deepcopy(reference).double()
    wide = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
    truth, by_torch, actual = run(exact, wide), run(reference, inputs), run(model, inputs)
    assert actual.keys() == by_torch.keys()
    for name, result in actual.items():
        assert result.dtype == by_torch[name].dtype, name
        if name.endswith(KEY_BIASES) and "rope_parameters" not in model.config.to_dict():
            assert result.abs().max() <= 1e-5 * max(g.abs().max() for g in actual.values()), name
            continue
        error, other = ((x.double() - truth[name]).norm() for x in (result, by_torch[name]))
        assert error <= 3 * other + rounding * truth[name].norm(), f"{name}: {error:.2e} against {other:.2e}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_logits_loss_and_gradients(name, padded):
    reference = build(name)
    model = copy.deepcopy(reference)
    report = fastlm.accelerate(model)
    assert model.config._attn_implementation == "fastlm", report
    asked_for = name in CAUSAL  # the others compute their loss in their own forward
    assert any("fastlm.cross_entropy" in row.replacement for row in report.rows) == asked_for, report
    reference.set_attn_implementation("eager")
    assert_parity(model, reference, inputs_of(name, padded))


@pytest.mark.parametrize("name", NAMES)
def test_attention_alone_by_its_name(name):
    """attn_implementation="fastlm", as from_pretrained would set it; no module is swapped."""
    reference = build(name)
    model = copy.deepcopy(reference)
    model.set_attn_implementation("fastlm")
    reference.set_attn_implementation("eager")
    assert_parity(model, reference, inputs_of(name))


@pytest.mark.parametrize(("name", "sliding"), [("mistral", 2), ("gemma2", 1), ("gemma3", 2), ("gpt_oss", 1)])
@pytest.mark.parametrize(("padded", "cached"), [(False, 0), (True, 0), (False, 3)])
def test_a_sliding_window_is_a_window_of_the_kernel(name, sliding, padded, cached, monkeypatch):
    """Instead of a mask where nothing is padded and nothing cached, and with the same results everywhere."""
    reference = build(name).eval()
    model = copy.deepcopy(reference)
    model.set_attn_implementation("fastlm")
    reference.set_attn_implementation("eager")
    windows = []

    def spy(*args, **options):
        assert options["window"] is None or args[3] is None
        windows.append(options["window"])
        return fastlm.scaled_dot_product_attention(*args, **options)

    inputs = inputs_of(name, padded)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    outputs = []
    for each in (reference, model):
        past = each(ids[:, :cached], use_cache=True).past_key_values if cached else None
        monkeypatch.setattr(fastlm.integrations.huggingface, "scaled_dot_product_attention", spy)
        outputs.append(each(ids[:, cached:], attention_mask=mask, past_key_values=past).logits)
    real = mask[:, cached:].bool()
    torch.testing.assert_close(outputs[1][real], outputs[0][real], rtol=1e-4, atol=1e-4)
    assert windows[-2:].count((5, None)) == (0 if padded or cached else sliding)


def test_only_a_sliding_mask_carries_a_window():
    from transformers import masking_utils as masks

    sliding = masks.sliding_window_causal_mask_function(3)
    plain = {"batch_size": 1, "q_length": 5, "kv_length": 5, "q_offset": 0, "kv_offset": 0, "local_size": 3}

    def window(mask_function=sliding, **changes):
        mask = fastlm.integrations.huggingface.boolean_mask(**plain | changes, mask_function=mask_function)
        expected = masks.sdpa_mask(**plain | changes, mask_function=mask_function)
        assert torch.equal(mask, expected)
        return getattr(mask, "_fastlm_window", None)

    assert window() == (2, None)
    assert window(q_offset=2) is None
    assert window(local_size=4) is None  # another window than the function's
    assert window(allow_is_causal_skip=False) is None
    assert window(attention_mask=torch.tensor([[True, True, True, True, False]])) is None
    assert window(masks.chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.long))) is None
    assert window(masks.and_masks(sliding, masks.sliding_window_overlay(2))) is None


@pytest.mark.parametrize("name", [*CAUSAL, *SEQ2SEQ])
@pytest.mark.parametrize("beams", [1, 3])
def test_generates_the_same(name, beams):
    reference = build(name).eval()
    model = copy.deepcopy(reference)
    fastlm.accelerate(model)
    inputs = inputs_of(name, left=name in CAUSAL)
    del inputs["labels"]
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "num_beams": beams}
    torch.testing.assert_close(model.generate(**inputs, **options), reference.generate(**inputs, **options))


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_restore_undoes_everything(name):
    model = build(name).eval()
    inputs = inputs_of(name)
    classes = {key: type(module) for key, module in model.named_modules()}
    attributes = {key: set(module.__dict__) for key, module in model.named_modules()}
    pointers = {key: p.data_ptr() for key, p in model.named_parameters()}
    before, state, shown = model(**inputs).logits, list(model.state_dict()), repr(model)
    attention = model.config._attn_implementation
    report = fastlm.accelerate(model)
    assert len(report.replaced) > 8
    assert repr(model) == shown
    assert list(model.state_dict()) == state
    assert {key: p.data_ptr() for key, p in model.named_parameters()} == pointers
    assert all(isinstance(module, classes[key]) for key, module in model.named_modules())
    assert not fastlm.accelerate(model).replaced  # a second time changes nothing
    fastlm.restore(model)
    assert all(type(module) is classes[key] for key, module in model.named_modules())
    assert {key: set(module.__dict__) for key, module in model.named_modules()} == attributes
    assert model.config._attn_implementation == attention
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("name", [*CAUSAL, "bert", "t5"])
def test_copies_pickles_and_saves(name, tmp_path):
    model = build(name).eval()
    fastlm.accelerate(model)
    inputs = inputs_of(name)
    expected = model(**inputs).logits
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(**inputs).logits, expected)
        fastlm.restore(clone)
        assert not any("fastlm" in type(module).__module__ for module in clone.modules())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="fastlm")
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_training_follows_the_same_curve(name):
    reference = build(name)
    model = copy.deepcopy(reference)
    fastlm.accelerate(model)
    batches = [inputs_of(name) for _ in range(2)]

    def losses(model):
        optimizer, found = torch.optim.AdamW(model.parameters(), lr=3e-3), []
        for step in range(6):
            optimizer.zero_grad()
            loss = model(**batches[step % 2]).loss
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return torch.tensor(found)

    expected, actual = losses(reference), losses(model)
    assert expected[-2:].sum() < expected[:2].sum()
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_trainer_follows_the_same_curve(name, tmp_path):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    reference = build(name)
    model = copy.deepcopy(reference)
    fastlm.accelerate(model)
    examples = [{k: x[0] for k, x in inputs_of(name, padded=False).items()} for _ in range(8)]

    def losses(model, folder):
        arguments = transformers.TrainingArguments(
            str(tmp_path / folder), max_steps=6, per_device_train_batch_size=2, learning_rate=3e-3, logging_steps=1,
            report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=examples)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])

    expected, actual = losses(reference, "a"), losses(model, "b")
    assert len(expected) == 6
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["bert", "roberta"])
@pytest.mark.parametrize("holes", [False, True], ids=["left-aligned", "holes"])
def test_unpadded_encoder(name, holes):
    reference = build(name)
    model = copy.deepcopy(reference)
    report = fastlm.accelerate(model, unpad=True)
    assert any(row.replacement == "the same without its padding" for row in report.rows)
    reference.set_attn_implementation("eager")
    inputs = inputs_of(name)
    if holes:
        inputs["attention_mask"][0, 2:5] = 0
        inputs["labels"][0, 2:5] = -100
    if name == "bert":  # roberta's own positions follow the padding token, not the mask
        inputs["token_type_ids"] = torch.randint(2, (B, T))
    assert_parity(model, reference, inputs)
    with torch.no_grad():
        states = model.base_model(**{k: x for k, x in inputs.items() if k != "labels"}).last_hidden_state
        assert not states[inputs["attention_mask"] == 0].any()
        shown = model(**inputs, output_hidden_states=True)  # what looks at every layer gets padded states
    assert [x.shape for x in shown.hidden_states] == [(B, T, 32)] * 3


@pytest.mark.parametrize("name", ["bert", "llama", "mistral", "gemma2", "t5", "gpt_oss"])
def test_attention_weights_on_request(name):
    reference = build(name).eval()
    model = copy.deepcopy(reference)
    fastlm.accelerate(model)
    reference.set_attn_implementation("eager")
    inputs = inputs_of(name, padded=False)
    field = "encoder_attentions" if name in SEQ2SEQ else "attentions"
    with torch.no_grad():
        actual, expected = (m(**inputs, output_attentions=True)[field] for m in (model, reference))
    assert len(actual) == len(expected) == 2
    for mine, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_packed_sequences_attend_to_themselves():
    model = build("llama").eval()
    model.set_attn_implementation("fastlm")
    first, second = torch.randint(3, V, (1, 5)), torch.randint(3, V, (1, 7))
    packed = model(
        input_ids=torch.cat((first, second), 1),
        position_ids=torch.cat((torch.arange(5), torch.arange(7)))[None],
        cu_seq_lens_q=torch.tensor([0, 5, 12], dtype=torch.int32), use_cache=False,
        attention_mask=torch.ones(1, 12, dtype=torch.long),
    ).logits  # fmt: skip
    expected = torch.cat((model(first).logits, model(second).logits), 1)
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-4)


def test_dropout_is_drawn_in_training_only():
    model = build("llama", dropout=True)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    fastlm.accelerate(model)
    inputs = inputs_of("llama")
    torch.manual_seed(1)
    first = model(**inputs).loss
    torch.manual_seed(1)
    assert torch.equal(model(**inputs).loss, first)
    assert not torch.equal(model(**inputs).loss, first)
    model.eval()
    assert torch.equal(model(**inputs).loss, model(**inputs).loss)


def test_paged_cache_is_refused():
    attend = fastlm.integrations.huggingface.attention_forward
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(NotImplementedError, match="it does not read a paged cache"):
        attend(torch.nn.Module(), q, q, q, None, cache=object())


def test_models_of_a_composite_and_of_a_plain_module():
    holder = torch.nn.ModuleDict({"text": build("bert"), "norm": torch.nn.LayerNorm(8)})
    report = fastlm.accelerate(holder)
    assert type(holder["norm"]) is fastlm.nn.LayerNorm
    assert holder["text"].config._attn_implementation == "fastlm"
    assert "LayerNorm" in str(report)
    fastlm.restore(holder)
    assert type(holder["norm"]) is torch.nn.LayerNorm
    assert holder["text"].config._attn_implementation == "sdpa"


@functools.wraps(sdpa_attention_forward)
def halved_attention(*args, **kwargs):
    output, weights = sdpa_attention_forward(*args, **kwargs)
    return output / 2, weights


def narrow_mask(*args, **kwargs):
    mask = masking_utils.sdpa_mask(
        *args, **kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    )
    return mask & torch.ones_like(mask).triu(-1)


@pytest.fixture
def others(monkeypatch):
    """Attention and a mask that somebody else has registered."""
    attention, masks = modeling_utils.ALL_ATTENTION_FUNCTIONS, masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    monkeypatch.setitem(attention._global_mapping, "halved", halved_attention)
    monkeypatch.setitem(masks._global_mapping, "halved", masking_utils.sdpa_mask)
    monkeypatch.setitem(attention._global_mapping, "narrow", sdpa_attention_forward)
    monkeypatch.setitem(masks._global_mapping, "narrow", narrow_mask)
    return attention


@pytest.mark.parametrize("attention", ["halved", "narrow", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_attention_that_others_registered_stays(name, attention, others, monkeypatch):
    if attention == "sdpa":  # in the place of transformers' own
        monkeypatch.setitem(others._global_mapping, "sdpa", halved_attention)
    model = build(name)
    inputs = inputs_of(name)
    model.set_attn_implementation("eager")
    plain = model(**inputs).logits
    model.set_attn_implementation(attention)
    expected = model(**inputs).logits
    assert not torch.allclose(expected, plain, rtol=1e-2)
    report = fastlm.accelerate(model)
    assert f"its attention, {attention!r}, is none of transformers' own" in str(report)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-3, atol=1e-4)


def test_others_attention_stays_in_a_part_of_a_composite(others):
    sizes = {name: n for name, n in SIZES.items() if name != "vocab_size"} | {"attention_dropout": 0.0}
    text = transformers.CLIPTextConfig(**SIZES, **SPECIAL, attention_dropout=0.0)
    vision = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=4)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
    model.text_model.set_attn_implementation("halved")
    inputs = {"input_ids": torch.randint(3, V, (B, T)), "pixel_values": torch.randn(B, 3, 16, 16)}
    expected = model(**inputs).logits_per_image
    fastlm.accelerate(model)
    assert model.text_model.config._attn_implementation == "halved"
    assert model.vision_model.config._attn_implementation == "fastlm"
    torch.testing.assert_close(model(**inputs).logits_per_image, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bert", "t5", "vit"])
def test_exports(name):
    model = build(name).eval()
    fastlm.accelerate(model)
    inputs = inputs_of(name)
    del inputs["labels"]
    if name in SEQ2SEQ:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    if name not in MASKED and name != "vit":
        inputs["use_cache"] = False
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs, strict=False).module()
        actual, expected = exported(**inputs)[0], model(**inputs)[0]
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else slice(None)
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-4)
