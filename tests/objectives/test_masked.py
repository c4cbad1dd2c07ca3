"""Masked language modelling: what is hidden, by which draws, and the loss against transformers'."""

import shutil

import numpy as np
import pytest
import torch

import fastlm
from fastlm.cli import main
from fastlm.data import Tokenizer
from fastlm.data.framing import special_token_ids
from fastlm.data.packing import Segments
from fastlm.data.words import word_ids
from fastlm.errors import CheckpointError, ConfigError, DataError
from fastlm.formats.hf.bert import BERT_FOLDER
from fastlm.models import BERT, BERTConfig
from fastlm.objectives.masked import Masked, MaskedSettings
from hf import check_gradients, perturbed, reload_as_theirs, transformers
from runs import StopAfter, losses, prepared, run, same_bits, tensors

IGNORED = -100


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("masked"))


@pytest.fixture(scope="module")
def tokenizer(data):
    return Tokenizer.load(data / "tokenizer.json")


def windows(tokenizer, count, length=40, seed=0):
    ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), special_token_ids(tokenizer))
    return list(np.random.default_rng(seed).choice(ordinary, (count, length + 1)))


def test_an_example_at_a_position_is_hidden_alike_in_every_batch(tokenizer):
    goal, examples = Masked(tokenizer, seed=3), windows(tokenizer, 6)
    longer = windows(tokenizer, 1, 70)[0]
    whole = goal.collate(examples, range(10, 16))
    other = goal.collate([longer, examples[4], examples[1]], [99, 14, 11])
    for name in ("tokens", "targets"):
        assert torch.equal(other[name][1, :42], whole[name][4])
        assert torch.equal(other[name][2, :42], whole[name][1])
    assert not torch.equal(goal.collate(examples, range(20, 26))["targets"], whole["targets"])
    assert not torch.equal(Masked(tokenizer, seed=4).collate(examples, range(10, 16))["targets"], whole["targets"])


@pytest.mark.parametrize("whole_word", ["none", "pretokens"])
def test_rates(tokenizer, whole_word):
    goal = Masked(tokenizer, MaskedSettings(whole_word=whole_word))
    examples = windows(tokenizer, 500, 100)
    batch = goal.collate(examples, range(500))
    tokens, targets = batch["tokens"].numpy(), batch["targets"].numpy()
    drawn = targets != IGNORED
    assert batch.targets == drawn.sum()
    before = np.stack([goal._sequences(example)[0] for example in examples])
    assert (np.where(drawn, targets, tokens) == before).all()
    assert not np.isin(before[drawn], goal.special).any()
    masked = tokens[drawn] == goal.ids["mask"]
    kept = tokens[drawn] == targets[drawn]
    count = 500 * 100
    # Five deviations of a binomial; drawn by words, whose tokens stand and fall together, three times as wide.
    wide = 5 * (3 if whole_word != "none" else 1)
    assert abs(drawn.sum() / count - 0.15) < wide * (0.15 * 0.85 / count) ** 0.5
    number = drawn.sum()
    assert abs(masked.mean() - 0.8) < 5 * (0.8 * 0.2 / number) ** 0.5
    # Another token is now and then the same one.
    assert abs(kept.mean() - 0.1 - 0.1 / len(goal.ordinary)) < 5 * (0.1 * 0.9 / number) ** 0.5
    assert not np.isin(tokens[drawn][~masked], goal.special).any()


def test_words_are_drawn_whole(tokenizer):
    goal = Masked(tokenizer, MaskedSettings(whole_word="pretokens", probability=0.3))
    ids = np.array([*tokenizer.encode("actress undoubtedly splendid 839 film really dreadful" * 3), 0])
    parts = 0
    for position in range(50):
        batch = goal.collate([ids], [position])
        drawn = (batch["targets"][0] != IGNORED).numpy()
        words = word_ids(tokenizer, goal._sequences(ids)[0], "none")
        for word in range(words.max() + 1):
            assert len(set(drawn[words == word])) == 1
            parts += drawn[words == word].all() and (words == word).sum() > 1
        assert not drawn[words == -1].any()
    assert parts > 50  # words of several tokens were among them


def test_separate_documents_are_sequences(tokenizer):
    end = tokenizer.special_ids("masked")["end"]
    ids = np.array([7, 8, 9, end, 20, 21, end, 30, 31, 32])
    example = Segments(ids, np.roll(ids, -1), np.array([3, 3, 4]))
    goal = Masked(tokenizer, separate_documents=True)
    start = goal.ids["start"]
    rows = [row.tolist() for row in goal._sequences(example)]
    assert rows == [[start, 7, 8, 9, end], [start, 20, 21, end], [start, 30, 31, 32, end]]
    batch = goal.collate([example], [0])
    assert batch["tokens"].shape == (3, 5)
    assert batch["mask"].sum(1).tolist() == [5, 4, 5]
    together = Masked(tokenizer)._sequences(example)
    assert [row.tolist() for row in together] == [[start, *ids.tolist(), end]]


def test_loss_and_gradients_are_theirs(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = perturbed(BERT(BERTConfig(tokenizer.vocab_size, 48, 2, 2, 32, dropout=0.0, attention_dropout=0.0)))
    fastlm.save(model, tmp_path)
    theirs = reload_as_theirs(transformers.BertForMaskedLM, tmp_path)
    goal = Masked(tokenizer, MaskedSettings(probability=0.3))
    examples = [example[: 20 + 3 * i] for i, example in enumerate(windows(tokenizer, 5))]
    batch = goal.collate(examples, range(5))
    ours = goal.loss(model, batch)
    expected = theirs(batch["tokens"], attention_mask=batch["mask"], labels=batch["targets"]).loss
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    ours.backward()
    expected.backward()
    parts = BERT_FOLDER.parts(model.config, {name: p.shape for name, p in model.named_parameters()})
    check_gradients(
        model, theirs, {n: tuple(BERT_FOLDER.full_name(p.name, True) for p in group) for n, group in parts.items()}
    )
    with torch.no_grad():
        totals = goal.score(model, batch)
        logits = theirs(batch["tokens"], attention_mask=batch["mask"]).logits
    counted = batch["targets"] != IGNORED
    assert totals["loss"] == pytest.approx(expected.item() * batch.targets, rel=1e-5)
    assert totals["right"] == (logits.argmax(-1) == batch["targets"])[counted].sum()


def test_a_step_is_the_mean_over_its_targets_however_it_is_split(data, tmp_path):
    """Batches have different numbers of hidden tokens; in one batch or in three the step is the same."""
    settings = {"data": str(data), "objective": "masked", "max_steps": 3, "grad_clip": 0.0}
    run(tmp_path / "one", batch_size=12, **settings)
    run(tmp_path / "three", batch_size=4, gradient_accumulation=3, **settings)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "three"), rel=1e-6)
    one, three = tensors(tmp_path / "one"), tensors(tmp_path / "three")
    for name in (name for name in one if name.endswith("exp_avg")):  # of the gradients, before Adam's division
        torch.testing.assert_close(one[name], three[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("stop", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_with_the_same_bits(data, tmp_path, stop):
    settings = {
        "data": str(data), "objective": "masked", "dropout": 0.1, "masked": {"whole_word": "pretokens"},
        "packing": "best-fit", "separate_documents": True,
    }  # fmt: skip
    run(tmp_path / "whole", **settings)
    run(tmp_path / "stopped", reporter=StopAfter(stop), **settings)
    torch.manual_seed(99)
    run(tmp_path / "stopped", resume=True, **settings)
    assert same_bits(tmp_path / "whole", tmp_path / "stopped")


def test_from_the_command_line_to_transformers(data, tmp_path, capsys):
    flags = ["--n-layer=1", "--n-head=2", "--n-embd=16", "--context-length=16", "--max-steps=4", "--eval-interval=2",
             "--device=cpu", "--dtype=float32", "--threads=1", "--masked.probability=0.25",
             f"--out={tmp_path / 'run'}", f"--export={tmp_path / 'hf'}"]  # fmt: skip
    assert main(["train", str(data), "--objective", "masked", "--model", "bert", "--no-keep-freed-memory", *flags]) == 0
    assert "probability = 0.25" in capsys.readouterr().out
    ours, tokenizer = fastlm.load_with_tokenizer(tmp_path / "hf")
    theirs = reload_as_theirs(transformers.BertForMaskedLM, tmp_path / "hf")
    ids = torch.tensor([tokenizer.encode("the film was fine")])
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def begun(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("begun") / "run"
    run(out, data=str(data), objective="masked")
    return out


def test_a_run_begins_with_the_weights_of_another(data, begun, tmp_path):
    first = run(tmp_path / "run", data=str(data), objective="masked", init=str(begun), max_steps=1, eval_interval=1,
                learning_rate=1e-12, weight_decay=0.0)  # fmt: skip
    before = tensors(begun, "best")
    after = {name: t for name, t in tensors(tmp_path / "run").items() if name.startswith("model.")}
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=0, atol=1e-9)
    assert first.evaluation.loss < 5.7  # the logarithm of 300, of a model that knows nothing


def test_it_is_resumed_where_its_beginning_is_gone(data, begun, tmp_path):
    shutil.copytree(begun, tmp_path / "begun")
    settings = {"data": str(data), "objective": "masked", "init": str(tmp_path / "begun"), "dropout": 0.1}
    run(tmp_path / "whole", **settings)
    run(tmp_path / "stopped", reporter=StopAfter(5), **settings)
    shutil.rmtree(tmp_path / "begun")
    run(tmp_path / "stopped", resume=True, **settings)
    assert same_bits(tmp_path / "whole", tmp_path / "stopped")


def test_another_head_is_named_and_dropped_where_asked(data, begun, tmp_path):
    model = fastlm.load(begun)
    config = BERTConfig.from_dict(model.config.to_dict() | {"head": "pretraining", "pooler": True})
    other = BERT(config)
    other.load_state_dict(model.state_dict(), strict=False)
    fastlm.save(other, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_bytes((begun / "tokenizer.json").read_bytes())
    settings = {"data": str(data), "objective": "masked", "init": str(tmp_path / "hf"), "max_steps": 1}
    with pytest.raises(ConfigError, match="hf: holds a head for pretraining, expected one for masked-lm; add --new"):
        run(tmp_path / "run", **settings)
    run(tmp_path / "run", new_head=True, **settings)
    assert fastlm.load(tmp_path / "run").config.head == "masked-lm"


def test_a_longer_context_is_refused(data, begun, tmp_path):
    with pytest.raises(ConfigError, match=r"context_length is 32, expected at most 16, as .* has"):
        run(tmp_path / "run", data=str(data), objective="masked", init=str(begun), context_length=32)


def test_another_tokenizer_is_refused(begun, tmp_path):
    other = prepared(tmp_path / "other", tokenizer="wordpiece")
    with pytest.raises(DataError, match=r"its tokenizer is not that of .*; prepare it with --tokenizer"):
        run(tmp_path / "run", data=str(other), objective="masked", init=str(begun))


def test_another_model_is_refused(data, begun, tmp_path):
    with pytest.raises(ConfigError, match="holds a BERT, expected gpt or llama for objective causal"):
        run(tmp_path / "run", data=str(data), init=str(begun))
    with pytest.raises(CheckpointError, match="nothing: no such file or folder"):
        run(tmp_path / "run", data=str(data), objective="masked", init=str(tmp_path / "nothing"))


def test_a_run_of_another_objective_is_not_resumed(data, begun, tmp_path):
    run(tmp_path / "run", data=str(data), max_steps=1)
    with pytest.raises(CheckpointError, match="trained for causal, but objective is 'masked'"):
        run(tmp_path / "run", data=str(data), objective="masked", resume=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "gpt"}, "model is 'gpt', expected bert for objective masked"),
        ({"context_length": 2}, "context_length is 2, expected at least 3"),
        ({"metric": "f1"}, "metric is 'f1', expected loss or accuracy"),
    ],
)
def test_what_does_not_fit_is_said_first(data, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", data=str(data), objective="masked", **settings)


def test_a_tokenizer_without_a_mask_is_refused(tmp_path):
    data = prepared(tmp_path, special="causal", tokenizer="bpe")
    with pytest.raises(DataError, match=r"has no token \[CLS\] or <s> \(start\), which special=masked needs"):
        run(tmp_path / "run", data=str(data), objective="masked")


def test_accuracy_may_decide(data, tmp_path):
    result = run(tmp_path / "run", data=str(data), objective="masked", metric="accuracy", max_steps=12)
    assert result.metric == "accuracy"
    assert result.best == max(result.best, result.evaluation.accuracy)
