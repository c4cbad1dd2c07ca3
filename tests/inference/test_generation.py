"""What a folder says about generation: followed as transformers follows it, and still said by what is saved."""

import json
import random

import pytest
import torch

import fastlm
from fastlm.errors import CheckpointError, ConfigError
from fastlm.formats.checkpoint import save_checkpoint
from fastlm.inference import beam_search, generate, greedy_search, load_quantized, quantize, save_quantized
from fastlm.inference.sampling import Cuts, candidates, cut
from fastlm.models import GPT, GPTConfig
from fastlm.models.common.generation import Generation, carry, generation_of
from hf import CLOSE, perturbed, transformers

pytestmark = pytest.mark.filterwarnings("ignore:Unfeasible length constraints:UserWarning")
transformers.utils.logging.set_verbosity_error()

V, PAD = 23, 22
UNLIKELY = -1e8  # transformers scores what never ended about -1e9


def marian(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder")
             for name, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
    settings = {"pad_token_id": PAD, "decoder_start_token_id": PAD, "eos_token_id": 0, "forced_eos_token_id": None}
    config = transformers.MarianConfig(
        vocab_size=V, d_model=8, max_position_embeddings=32, dropout=0.0, **(settings | sizes | changes)
    )
    model = perturbed(transformers.MarianMTModel(config), seed)
    model.final_logits_bias.copy_(torch.randn(1, V))
    model.final_logits_bias[0, :3] += 1.5  # so that sequences end
    return model


def gpt2(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "n_positions": 32, "n_layer": 1, "n_head": 2, "n_embd": 8}
    return perturbed(transformers.GPT2LMHeadModel(transformers.GPT2Config(**({"eos_token_id": 3} | sizes | changes))))


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 24, "max_position_embeddings": 32}  # fmt: skip
    return perturbed(transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | changes))))


def bert(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 24, "max_position_embeddings": 32}  # fmt: skip
    return transformers.BertForMaskedLM(transformers.BertConfig(**(sizes | changes)))


def said(model, **settings):
    """The model with this in its generation config; the ids of its configuration stay."""
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


def some_settings(draw):
    """Some of the settings that change logits, by transformers' names."""
    choices = {
        "forced_eos_token_id": (0, [0, 3]),
        "forced_bos_token_id": (5,),
        "min_length": (3, 6),
        "min_new_tokens": (2, 5),
        "no_repeat_ngram_size": (1, 2, 3),
        "repetition_penalty": (1.3, 0.8),
        "bad_words_ids": ([[3], [4, 5], [0]],),
        "sequence_bias": ([[[3], -2.0], [[4, 5], 1.5]],),
        "suppress_tokens": ([6, 7],),
        "begin_suppress_tokens": ([8, 9],),
        "exponential_decay_length_penalty": ((2, 1.5),),
        "renormalize_logits": (True,),
    }
    found = {name: draw.choice(values) for name, values in choices.items() if draw.random() < 0.25}
    return found | {"eos_token_id": draw.choice([0, [0, 1], [2, 0, 1]])}


def some_beams(draw):
    choices = {
        "length_penalty": (2.0, 0.0, 0.6, -1.0, 3.5),
        "early_stopping": (True, "never"),
        "encoder_repetition_penalty": (1.3,),
        "encoder_no_repeat_ngram_size": (1, 2),
    }
    return {name: draw.choice(values) for name, values in choices.items() if draw.random() < 0.6}


# Against transformers' generate


@pytest.mark.parametrize("seed", range(4))
def test_beams_and_greedy_tokens_equal_theirs_whatever_the_settings(seed, tmp_path):
    theirs = marian(seed)
    theirs.save_pretrained(tmp_path)
    ours = fastlm.load(tmp_path)
    for number in range(32):
        draw = random.Random(f"{seed} {number}")
        settings = some_settings(draw) | some_beams(draw)
        beams, steps = draw.choice([1, 2, 3, 5]), draw.choice([3, 5, 9, 12])
        forbidden = [*settings.get("suppress_tokens", []), PAD]  # ours draws no padding
        source = torch.randint(3, PAD, (3, draw.randint(1, 7)), generator=torch.Generator().manual_seed(number))
        if source.shape[1] > 2:
            source[1, -1] = PAD
        carry(ours, Generation(settings | {"pad_token_id": PAD}))
        expected = theirs.generate(
            source,
            attention_mask=(source != PAD).long(),
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=steps,
            return_dict_in_generate=True,
            output_scores=True,
            **(settings | {"suppress_tokens": forbidden}),
        )
        wanted = expected.sequences[:, 1:]
        if beams == 1:
            assert torch.equal(greedy_search(ours, source, steps), wanted), settings
            continue
        tokens, scores = beam_search(ours, source, steps, beams, n_best=beams)
        tokens, scores, ended = tokens.flatten(0, 1), scores.flatten(), expected.sequences_scores > UNLIKELY
        assert tokens.shape == wanted.shape, settings
        assert torch.equal(tokens[ended], wanted[ended]), (settings, beams, steps)
        torch.testing.assert_close(scores[ended], expected.sequences_scores[ended], **CLOSE)
        assert (scores[~ended] < UNLIKELY).all()


def test_a_seq2seq_folder_decides_about_beams_lengths_and_penalties(tmp_path):
    settings = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0, "max_length": 9,
                "forced_eos_token_id": 0, "bad_words_ids": [[PAD]], "eos_token_id": [0, 4]}  # fmt: skip
    theirs = said(marian(), **settings)
    theirs.save_pretrained(tmp_path)
    source = torch.randint(3, PAD, (4, 6), generator=torch.Generator().manual_seed(1))
    expected = theirs.generate(source, attention_mask=torch.ones_like(source))
    assert expected.shape[1] == 9  # cut at the longest length, the end forced
    fastlm.save(fastlm.load(tmp_path), tmp_path / "again")
    for folder in (tmp_path, tmp_path / "again"):
        assert torch.equal(beam_search(fastlm.load(folder), source).tokens.flatten(0, 1), expected[:, 1:])
    with pytest.raises(ConfigError, match="early_stopping is 'soon', expected True, False or 'never'"):
        beam_search(fastlm.load(tmp_path), source, early_stopping="soon")


@pytest.mark.parametrize("build", [gpt2, llama])
def test_greedy_continuations_equal_theirs_whatever_the_settings(build, tmp_path):
    theirs = build()
    theirs.save_pretrained(tmp_path)
    ours = fastlm.load(tmp_path)
    for number in range(40):
        draw = random.Random(number)
        settings = some_settings(draw) | {"pad_token_id": 0}
        tokens = torch.randint(3, V, (3, draw.randint(1, 6)), generator=torch.Generator().manual_seed(number))
        expected = theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False, **settings
        )[:, tokens.shape[1] :]
        carry(ours, Generation(settings))
        got = torch.stack(list(generate(ours, tokens, 12, temperature=0, stop_token="folder")), 1)
        assert got.shape == expected.shape, settings
        ends = torch.tensor(settings["eos_token_id"]).reshape(-1)
        before = torch.isin(expected, ends).cumsum(1).roll(1, 1).index_fill(1, torch.tensor([0]), 0) == 0
        assert torch.equal(got[before], expected[before]), settings


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("format", ["hf", "fastlm"])
def test_a_saved_model_ends_and_draws_as_its_folder_said(build, format, tmp_path):
    theirs = build()
    tokens = torch.randint(3, V, (5, 4), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    plain = theirs.generate(tokens, attention_mask=mask, max_new_tokens=20, eos_token_id=None, pad_token_id=0)[:, 4:]
    ends = sorted({int(plain[0, 6]), int(plain[1, 9])})
    said(theirs, eos_token_id=ends, max_new_tokens=20).save_pretrained(tmp_path / "theirs")
    fastlm.save(fastlm.load(tmp_path / "theirs"), tmp_path / "ours", format=format)
    ours = fastlm.load(tmp_path / "ours")
    fastlm.save(ours, tmp_path / "again")
    again = type(theirs).from_pretrained(tmp_path / "again")
    assert again.generation_config.eos_token_id == ends
    for row in range(5):
        got = [int(token) for token in generate(ours, tokens[row : row + 1], temperature=0, stop_token="folder")]
        wanted = theirs.generate(tokens[row : row + 1], attention_mask=mask[:1], pad_token_id=0)[0, 4:].tolist()
        assert got == wanted
        assert again.generate(tokens[row : row + 1], attention_mask=mask[:1], pad_token_id=0)[0, 4:].tolist() == wanted
    assert {len(plain[row]) for row in range(2)} == {20}


def distribution_of(theirs, tokens, **settings):
    """Probabilities with which transformers would draw the next token of one row."""
    processors = theirs._get_logits_processor(
        transformers.GenerationConfig(do_sample=True, **settings), input_ids_seq_length=tokens.shape[1]
    )
    return processors(tokens, theirs(tokens).logits[:, -1].float()).softmax(-1)


@pytest.mark.parametrize(
    "settings",
    [
        {"min_p": 0.1},
        {"typical_p": 0.6},
        {"epsilon_cutoff": 0.03},
        {"eta_cutoff": 0.05},
        {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.9},
        {"top_p": 0.8, "typical_p": 0.4, "epsilon_cutoff": 0.1, "eta_cutoff": 0.2, "temperature": 1.6},
    ],
    ids=str,
)
def test_ids_are_left_out_as_theirs_are(settings):
    theirs = gpt2()
    tokens = torch.randint(V, (20, 5), generator=torch.Generator().manual_seed(3))
    expected = distribution_of(theirs, tokens, **settings)
    s = Generation(settings | {"top_k": settings.get("top_k", 0)}).settings
    logits = theirs(tokens).logits[:, -1].detach()
    weights, ids = candidates(logits, s.temperature, s.top_k or None, s.top_p)
    weights = cut(weights, Cuts(s.min_p, s.typical_p, s.epsilon_cutoff, s.eta_cutoff))
    got = weights if ids is None else torch.zeros_like(logits).scatter(1, ids, weights)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert (got > 0).sum() < got.numel()


@pytest.mark.parametrize(
    ("settings", "given", "meant"),
    [
        ({}, {}, {"temperature": 1.0}),
        ({"do_sample": True}, {}, {"temperature": 1.0, "top_k": 50}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 4}, {}, {"temperature": 0.6, "top_k": 4}),
        ({"do_sample": True, "top_k": 0, "top_p": 0.8}, {}, {"top_p": 0.8}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 4}, {"temperature": 2.0}, {"temperature": 2.0, "top_k": 4}),
        ({"do_sample": True, "top_k": 4, "top_p": 0.8}, {"top_k": 9, "top_p": 1.0}, {"temperature": 1.0, "top_k": 9}),
        ({"temperature": 0.6, "top_p": 0.9}, {}, {"temperature": 0}),
        ({"do_sample": False}, {}, {"temperature": 0}),
        ({"do_sample": False}, {"top_k": 3}, {"temperature": 1.0, "top_k": 3}),
    ],
)  # fmt: skip
def test_the_folder_decides_about_sampling_where_the_call_does_not(settings, given, meant):
    torch.manual_seed(0)
    model = perturbed(GPT(GPTConfig(200, 16, 1, 2, 8)))
    tokens = torch.arange(12).view(3, 4)
    expected = torch.stack(list(generate(model, tokens, 20, seed=1, **meant)), 1)
    carry(model, Generation(settings))
    assert torch.equal(torch.stack(list(generate(model, tokens, 20, seed=1, **given)), 1), expected)


# What is said stays said


def rich():
    """Settings as a published folder has them, some of which are not followed here."""
    return {
        "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1, "num_beams": 4,
        "length_penalty": 0.8, "early_stopping": True, "max_length": 30, "bad_words_ids": [[5], [6, 7]],
        "suppress_tokens": [8], "guidance_scale": 1.5, "stop_strings": ["END"],
    }  # fmt: skip


@pytest.mark.parametrize("format", ["hf", "fastlm"])
@pytest.mark.parametrize("build", [gpt2, llama, marian])
def test_settings_survive_loading_and_saving(build, format, tmp_path):
    theirs = build(bos_token_id=1, eos_token_id=[2, 3], pad_token_id=PAD)
    said(theirs, **rich()).generation_config.save_pretrained(tmp_path / "first")
    theirs.generation_config = transformers.GenerationConfig()
    theirs.save_pretrained(tmp_path / "first2")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "first2" / name).rename(tmp_path / "first" / name)
    first = json.loads((tmp_path / "first" / "generation_config.json").read_text())
    assert first["eos_token_id"] == [2, 3]
    assert rich().items() <= first.items()
    fastlm.save(fastlm.load(tmp_path / "first"), tmp_path / "second", format=format)
    fastlm.save(fastlm.load(tmp_path / "second"), tmp_path / "third")
    assert json.loads((tmp_path / "third" / "generation_config.json").read_text()) == first
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "third")]
    ids = [{name: value for name, value in config.items() if name.endswith("_token_id")} for config in configs]
    assert ids[0] == ids[1]
    assert ids[0]["eos_token_id"] == [2, 3]
    reread = transformers.GenerationConfig.from_pretrained(tmp_path / "third")
    assert reread.to_diff_dict() == transformers.GenerationConfig.from_pretrained(tmp_path / "first").to_diff_dict()


@pytest.mark.parametrize("format", ["hf", "fastlm"])
def test_a_model_that_does_not_generate_keeps_its_ids(format, tmp_path):
    bert(pad_token_id=4, eos_token_id=5, bos_token_id=6).save_pretrained(tmp_path / "first")
    fastlm.save(fastlm.load(tmp_path / "first"), tmp_path / "second", format=format)
    fastlm.save(fastlm.load(tmp_path / "second"), tmp_path / "third")
    config = json.loads((tmp_path / "third" / "config.json").read_text())
    assert [config[f"{name}_token_id"] for name in ("pad", "eos", "bos")] == [4, 5, 6]
    assert not (tmp_path / "third" / "generation_config.json").exists()


@pytest.mark.parametrize("build", [gpt2, llama])
def test_config_alone_speaks_where_there_is_no_generation_config(build, tmp_path):
    theirs = build(eos_token_id=[4, 5], bos_token_id=1)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text()) | {"max_length": 9, "repetition_penalty": 1.2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = fastlm.load(tmp_path)
    fastlm.save(ours, tmp_path / "again")
    again = transformers.GenerationConfig.from_pretrained(tmp_path / "again")
    assert (again.eos_token_id, again.bos_token_id, again.max_length) == ([4, 5], 1, 9)
    assert again.repetition_penalty == 1.2
    assert len(list(generate(ours, torch.ones(1, 4, dtype=torch.int64)))) == 5


def test_generation_config_decides_where_both_speak(tmp_path):
    said(gpt2(eos_token_id=4), eos_token_id=[6, 7]).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 4
    assert generation_of(fastlm.load(tmp_path)).ends(V) == (6, 7)


def test_a_marian_whose_ids_only_generation_config_names(tmp_path):
    marian().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("eos_token_id", "decoder_start_token_id", "pad_token_id"):
        config[name] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = fastlm.load(tmp_path)
    assert (ours.config.end_id, ours.config.start_id, ours.config.pad_id) == (0, PAD, PAD)


def test_saving_a_model_that_says_nothing_leaves_nothing_of_an_earlier_one(tmp_path):
    gpt2().save_pretrained(tmp_path)
    fastlm.save(GPT(GPTConfig(V, 16, 1, 2, 8)), tmp_path)
    assert not (tmp_path / "generation_config.json").exists()
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] is None


def test_save_huggingface_keeps_what_the_folder_said_unless_told_otherwise(tmp_path):
    said(gpt2(), eos_token_id=[3, 4], top_k=7, do_sample=True).save_pretrained(tmp_path)
    model = GPT.from_huggingface(tmp_path)
    model.save_huggingface(tmp_path / "kept")
    model.save_huggingface(tmp_path / "changed", eot_id=9)
    kept, changed = (
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path / name).generation_config for name in ("kept", "changed")
    )
    assert (kept.eos_token_id, kept.top_k) == ([3, 4], 7)
    assert (changed.eos_token_id, changed.bos_token_id, changed.top_k) == (9, 9, 7)


def test_a_quantized_model_keeps_what_was_said(tmp_path):
    said(gpt2(), eos_token_id=[3, 4]).save_pretrained(tmp_path)
    save_quantized(quantize(fastlm.load(tmp_path), "int8"), tmp_path / "q.safetensors")
    assert generation_of(load_quantized(tmp_path / "q.safetensors")).ends(V) == (3, 4)


def test_a_training_run_ends_texts_as_its_tokenizer_does(tmp_path):
    data = pytest.importorskip("fastlm.data")
    tokenizer = data.Tokenizer.characters(["abcdef"])
    tokenizer.save(tmp_path / "tokenizer.json")
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.vocab_size, 16, 1, 2, 8))
    save_checkpoint(tmp_path / "last.safetensors", model, tokenizer_fingerprint=tokenizer.fingerprint)
    fastlm.save(fastlm.load(tmp_path), tmp_path / "hf")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    assert theirs.generation_config.eos_token_id == tokenizer.eot_id == theirs.config.eos_token_id


# What cannot be followed, and what is damaged


def test_what_is_not_followed_is_said_in_one_warning(tmp_path):
    said(gpt2(), num_beams=4, guidance_scale=1.5, penalty_alpha=0.0).save_pretrained(tmp_path)
    model = fastlm.load(tmp_path)
    with pytest.warns(UserWarning, match=r"generation_config.json says guidance_scale 1.5, num_beams 4: not") as found:
        generate(model, torch.ones(1, 3, dtype=torch.int64), 4)
    assert len(found) == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"eos_token_id": "x"}, "eos_token_id is 'x', expected an id or a list of ids"),
        ({"eos_token_id": [1, "x"]}, r"eos_token_id is \[1, 'x'\], expected an id or a list of ids"),
        ({"eos_token_id": [[1]]}, r"eos_token_id is \[\[1\]\], expected an id or a list of ids"),
        ({"bos_token_id": "x"}, "bos_token_id is 'x', expected an id"),
        ({"max_length": 3.5}, "max_length is 3.5, expected an integer of at least 0"),
        ({"temperature": "hot"}, "temperature is 'hot', expected a number of at least 0"),
        ({"temperature": True}, "temperature is True"),
        ({"top_p": 1.5}, r"top_p is 1.5, expected a number in \[0, 1\]"),
        ({"early_stopping": "soon"}, "early_stopping is 'soon', expected true, false or never"),
        ({"bad_words_ids": [3]}, "bad_words_ids is .* expected a list of lists of ids"),
        ({"bad_words_ids": [[]]}, "bad_words_ids is"),
        ({"sequence_bias": {"(x,)": 1.0}}, "sequence_bias is"),
        ({"num_beams": 0}, "num_beams is 0, expected an integer of at least 1"),
        ({"do_sample": 1}, "do_sample is 1, expected true or false"),
        ({"exponential_decay_length_penalty": [1]}, "exponential_decay_length_penalty is"),
    ],
)
def test_values_that_no_setting_can_have_are_refused_by_name(setting, message, tmp_path):
    gpt2().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(setting))
    with pytest.raises(CheckpointError, match=f"generation_config.json: {message}"):
        fastlm.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "3", "[]", '{"a": '])
def test_a_damaged_generation_config_is_refused_in_a_line(text, tmp_path):
    gpt2().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: "):
        fastlm.load(tmp_path)


def test_ids_that_the_model_cannot_give_end_nothing(tmp_path):
    said(gpt2(), eos_token_id=[V, 50256, 3]).save_pretrained(tmp_path)
    assert generation_of(fastlm.load(tmp_path)).ends(V) == (3,)


def test_a_prompt_longer_than_the_longest_text_is_refused(tmp_path):
    said(gpt2(), max_length=4).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="the prompt has 6 tokens, more than the max_length of 4"):
        generate(fastlm.load(tmp_path), torch.ones(1, 6, dtype=torch.int64))
