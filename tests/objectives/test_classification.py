"""Classification: losses, logits and gradients against transformers', numbers against their definitions, bad tables."""

import json

import numpy as np
import pytest
import torch

import fastlm
from fastlm.cli import main
from fastlm.data import Tokenizer
from fastlm.data.framing import Frame
from fastlm.errors import CheckpointError, ConfigError, DataError
from fastlm.formats.hf.bert import BERT_FOLDER
from fastlm.models import BERT, BERTConfig
from fastlm.objectives.classification import PROBLEMS, Classification
from fastlm.objectives.common.setup import Setup
from fastlm.objectives.common.tables import Example, TableData
from fastlm.training import TrainConfig
from hf import check_gradients, perturbed, reload_as_theirs, transformers
from runs import Listening, StopAfter, labelled, losses, prepared, run, same_bits, table, tensors

NAMES = ("bad", "good", "so-so")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("classification"))


@pytest.fixture(scope="module")
def tokenizer(data):
    return Tokenizer.load(data / "tokenizer.json")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return table(tmp_path_factory.mktemp("rows") / "rows.jsonl", labelled(240))


def examples(tokenizer, count, target, pair=False):
    frame, random = Frame(tokenizer, 30), np.random.default_rng(0)
    found = []
    for _ in range(count):
        first, second = (random.integers(5, tokenizer.vocab_size, random.integers(1, 9)) for _ in range(2))
        found.append(Example(frame(first, second if pair else None), target(random)))
    return found


TARGETS = {
    "single": lambda random: int(random.integers(3)),
    "multi": lambda random: random.integers(0, 2, 3).astype(float).tolist(),
    "regression": lambda random: float(random.normal()),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_loss_logits_and_gradients_are_theirs(kind, tokenizer, tmp_path):
    torch.manual_seed(0)
    classes = 1 if kind == "regression" else 3
    config = BERTConfig(
        tokenizer.vocab_size, 32, 2, 2, 32, dropout=0.0, attention_dropout=0.0, head="classification", pooler=True,
        n_class=classes, labels=None if classes == 1 else NAMES, problem_type=PROBLEMS[kind],
    )  # fmt: skip
    model = perturbed(BERT(config))
    fastlm.save(model, tmp_path)
    assert fastlm.load(tmp_path).config == config
    theirs = reload_as_theirs(transformers.BertForSequenceClassification, tmp_path)
    if classes == 3:
        assert theirs.config.id2label == dict(enumerate(NAMES))
    goal = Classification(kind, types=True)
    batch = goal.collate(examples(tokenizer, 6, TARGETS[kind], pair=True))
    result = theirs(batch["tokens"], batch["mask"], batch["types"], labels=batch["targets"])
    torch.testing.assert_close(
        model(batch["tokens"], batch["mask"], batch["types"]), result.logits, rtol=1e-4, atol=1e-4
    )
    ours = goal.loss(model, batch)
    torch.testing.assert_close(ours, result.loss, rtol=1e-5, atol=1e-5)
    own = model.loss(batch["tokens"], batch["targets"], batch["mask"], batch["types"])
    torch.testing.assert_close(own, result.loss, rtol=1e-5, atol=1e-5)
    ours.backward()
    result.loss.backward()
    parts = BERT_FOLDER.parts(model.config, {name: p.shape for name, p in model.named_parameters()})
    check_gradients(
        model, theirs, {n: tuple(BERT_FOLDER.full_name(p.name, True) for p in group) for n, group in parts.items()}
    )


def test_weights_and_smoothing_by_their_definition(tokenizer):
    batch = Classification().collate(examples(tokenizer, 5, TARGETS["single"]))
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0.5, 1.0, 3.0])
    goal = Classification("single", weights, 0.2)
    logp = logits.double().log_softmax(1)
    wanted = 0.0
    for row, target in enumerate(batch["targets"].tolist()):
        smooth = torch.full((3,), 0.2 / 3, dtype=torch.float64)
        smooth[target] += 0.8
        wanted -= (smooth * weights.double() * logp[row]).sum().item() / 5
    assert goal.loss(lambda *_: logits, batch).item() == pytest.approx(wanted, rel=1e-6)
    assert goal.score(lambda *_: logits, batch)["loss"] == pytest.approx(
        -sum(logp[i, t].item() for i, t in enumerate(batch["targets"].tolist())), rel=1e-6
    )
    several = Classification("multi", weights)
    batch = several.collate(examples(tokenizer, 5, TARGETS["multi"]))
    p, y = logits.double().sigmoid(), batch["targets"].double()
    wanted = -(weights * y * p.log() + (1 - y) * (1 - p).log()).mean().item()
    assert several.loss(lambda *_: logits, batch).item() == pytest.approx(wanted, rel=1e-6)


def test_numbers_by_their_definitions():
    random = np.random.default_rng(0)
    found, right = random.integers(0, 4, 200), random.integers(0, 3, 200)
    result = Classification("single").evaluation({"loss": 1.0, "found": found.tolist(), "right": right.tolist()}, 200)
    table = np.zeros((4, 4))
    np.add.at(table, (right, found), 1)
    hits, said, there = table.diagonal(), table.sum(0), table.sum(1)
    f1 = 2 * hits / (said + there)
    n, c = table.sum(), hits.sum()
    matthews = (c * n - said @ there) / np.sqrt((n**2 - said @ said) * (n**2 - there @ there))
    assert result.accuracy == pytest.approx((found == right).mean())
    assert result.macro_f1 == pytest.approx(f1.mean())
    assert result.matthews == pytest.approx(matthews)

    found, right = random.integers(0, 2, (50, 3)), random.integers(0, 2, (50, 3))
    several = Classification("multi").evaluation({"loss": 1.0, "found": found.tolist(), "right": right.tolist()}, 50)
    hits, said, there = (found & right).sum(0), found.sum(0), right.sum(0)
    assert several.micro_f1 == pytest.approx(2 * hits.sum() / (said.sum() + there.sum()))
    assert several.macro_f1 == pytest.approx((2 * hits / (said + there)).mean())
    assert several.accuracy == pytest.approx((found == right).all(1).mean())

    x, y = random.normal(size=(2, 30))
    number = Classification("regression").evaluation({"loss": 1.0, "found": x.tolist(), "right": y.tolist()}, 30)
    assert number.pearson == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert number.spearman == pytest.approx(np.corrcoef(x.argsort().argsort(), y.argsort().argsort())[0, 1])


def test_it_learns_and_transformers_reads_what_is_exported(data, rows, tmp_path, capsys):
    flags = ["--n-layer=1", "--n-head=2", "--n-embd=32", "--context-length=24", "--max-steps=60", "--eval-interval=20",
             "--epochs=0", "--learning-rate=3e-3", "--batch-size=16", "--device=cpu", "--dtype=float32", "--threads=1",
             "--no-keep-freed-memory", f"--out={tmp_path / 'run'}", f"--export={tmp_path / 'hf'}", "--dropout=0",
             "--schedule=constant", "--warmup-share=0", "--warmup-steps=10",
             "--metric=macro_f1", f"--tokenizer={data}", "--classification.class-weights=balanced"]  # fmt: skip
    assert main(["finetune", rows, *flags]) == 0
    shown = capsys.readouterr().out
    assert "best validation macro_f1 " in shown
    assert "held out" in shown
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if line["kind"] == "validation"]
    assert max(line["macro_f1"] for line in evaluations) > 0.9
    ours, tokenizer = fastlm.load_with_tokenizer(tmp_path / "run")
    assert ours.config.labels == NAMES
    theirs = reload_as_theirs(transformers.BertForSequenceClassification, tmp_path / "hf")
    assert theirs.config.id2label == dict(enumerate(NAMES))
    frame = Frame(tokenizer, 24)
    right = 0
    for row in labelled(20, seed=5):
        ids = torch.from_numpy(frame(np.array(tokenizer.encode(row["text"]))).tokens)[None]
        logits = ours(ids)
        torch.testing.assert_close(logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
        right += NAMES[logits.argmax()] == row["label"]
    assert right >= 17


@pytest.mark.parametrize("stop", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_with_the_same_bits(data, rows, tmp_path, stop):
    settings = {"data": rows, "objective": "classification", "tokenizer": str(data), "dropout": 0.1, "epochs": 0.15}
    run(tmp_path / "whole", **settings)
    run(tmp_path / "stopped", reporter=StopAfter(stop), **settings)
    run(tmp_path / "stopped", resume=True, **settings)
    assert same_bits(tmp_path / "whole", tmp_path / "stopped")


def test_a_step_is_the_mean_over_its_rows_however_it_is_split(data, rows, tmp_path):
    settings = {
        "data": rows, "objective": "classification", "tokenizer": str(data), "max_steps": 3, "grad_clip": 0.0,
        "classification": {"class_weights": "1,2,3", "label_smoothing": 0.1},
    }  # fmt: skip
    run(tmp_path / "one", batch_size=12, **settings)
    run(tmp_path / "three", batch_size=4, gradient_accumulation=3, **settings)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "three"), rel=1e-6)
    one, three = tensors(tmp_path / "one"), tensors(tmp_path / "three")
    for name in (name for name in one if name.endswith("exp_avg")):
        torch.testing.assert_close(one[name], three[name], rtol=1e-4, atol=1e-7)


def test_a_masked_model_is_gone_on_with_where_its_head_may_be_dropped(data, rows, tmp_path):
    run(tmp_path / "masked", data=str(data), objective="masked", max_steps=2)
    settings = {"data": rows, "objective": "classification", "init": str(tmp_path / "masked"), "max_steps": 1}
    with pytest.raises(ConfigError, match=r"holds a head for masked-lm, expected one for classification \(bad, good, "):
        run(tmp_path / "run", **settings)
    run(tmp_path / "run", new_head=True, learning_rate=1e-12, weight_decay=0.0, **settings)
    before, after = tensors(tmp_path / "masked", "best"), tensors(tmp_path / "run")
    for name in before:
        assert name.startswith("model.masked_lm.") or torch.allclose(before[name], after[name], rtol=0, atol=1e-9)
    # Its own head is kept; one of other labels is named.
    run(tmp_path / "more", **settings | {"init": str(tmp_path / "run")}, learning_rate=1e-12, weight_decay=0.0)
    assert torch.allclose(tensors(tmp_path / "more")["model.classifier.weight"], after["model.classifier.weight"])
    other = table(tmp_path / "other.jsonl", [row | {"label": row["label"].upper()} for row in labelled(40)])
    with pytest.raises(
        ConfigError, match=r"classification \(bad, good, so-so\), expected .* \(BAD, GOOD, SO-SO\); add"
    ):
        run(tmp_path / "others", **settings | {"init": str(tmp_path / "run"), "data": other})


@pytest.mark.parametrize("kind", ["multi", "regression"])
def test_other_kinds_run(data, tmp_path, kind):
    labels = {"multi": lambda i: ["a", "b", "a, b", ""][i % 4], "regression": lambda i: i % 7 / 7}[kind]
    rows = table(tmp_path / "rows.jsonl", [row | {"label": labels(i)} for i, row in enumerate(labelled(60))])
    settings = {"data": rows, "objective": "classification", "tokenizer": str(data), "classification": {"kind": kind}}
    metric = {"multi": "micro_f1", "regression": "spearman"}[kind]
    result = run(tmp_path / "run", metric=metric, **settings)
    assert result.metric == metric
    config = fastlm.load(tmp_path / "run").config
    assert (config.labels, config.n_class) == (("a", "b"), 2) if kind == "multi" else (None, 1)


def test_pairs_have_types(data, tmp_path):
    made = [{"text": a["text"], "more": b["text"], "label": a["label"] == b["label"]}
            for a, b in zip(labelled(60), labelled(60, 1), strict=True)]  # fmt: skip
    rows = table(tmp_path / "rows.jsonl", made)
    run(tmp_path / "run", data=rows, objective="classification", tokenizer=str(data), pair_column="more")
    assert fastlm.load(tmp_path / "run").config.labels == ("False", "True")
    assert tensors(tmp_path / "run")["optimizer.wse.weight.exp_avg"][1].abs().sum() > 0


def test_roberta_is_fine_tuned_on_pairs(data, tmp_path):
    """Two separators, one type of tokens, positions from 2 on."""
    vocabulary = Tokenizer.load(data).vocab_size
    config = BERTConfig(vocabulary, 24, 1, 2, 16, n_token_type=1, position_offset=2, head="masked-lm", family="roberta")
    fastlm.save(BERT(config), tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_bytes((data / "tokenizer.json").read_bytes())
    rows = table(tmp_path / "rows.jsonl", [row | {"more": "the film"} for row in labelled(60)])
    run(tmp_path / "run", data=rows, objective="classification", init=str(tmp_path / "hf"), new_head=True,
        pair_column="more", export=str(tmp_path / "out"))  # fmt: skip
    ours = fastlm.load(tmp_path / "run")
    theirs = reload_as_theirs(transformers.RobertaForSequenceClassification, tmp_path / "out")
    ids = torch.arange(6, 18)[None]
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_table_without_labels_is_read_for_those_that_need_none(data, tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text("text,translation\n" + "".join(f"a {i},b {i}\n" for i in range(30)))
    config = TrainConfig(
        data=str(rows), objective="classification", tokenizer=str(data), pair_column="translation", n_layer=1
    )
    found = TableData(Setup(config, torch.device("cpu")), labelled=False)
    assert {row.pair for row in found.train + found.held_out} == {f"b {i}" for i in range(30)}


def told(tmp_path, data, made, **settings):
    listening = Listening()
    rows = table(tmp_path / "rows.jsonl", made)
    run(tmp_path / "run", reporter=listening, data=rows, objective="classification", tokenizer=str(data), max_steps=1,
        **settings)  # fmt: skip
    return listening.messages


def test_what_is_odd_in_a_table_is_told(data, tmp_path):
    made = labelled(60)
    held_out = table(tmp_path / "held_out.jsonl", [row for row in made[:9] if row["label"] != "bad"])
    messages = told(tmp_path, data, made, validation=held_out, context_length=8)
    count = sum(row["label"] != "bad" for row in made[:9])
    assert f"{count} of {count} held-out rows have the text of a training row" in messages
    assert "no held-out row has the label 'bad'" in messages
    assert any("of 60 training rows are longer than 8 tokens and cut (end)" in message for message in messages)


def test_long_rows_may_be_left_out_or_refused(data, tmp_path):
    made = labelled(60)
    messages = told(tmp_path, data, made, context_length=14, validation_share=0.3, truncation="drop")
    assert any("training rows are longer than 14 tokens and left out" in message for message in messages)
    with pytest.raises(DataError, match=r"row \d+: has \d+ tokens, expected at most 6"):
        told(tmp_path, data, made, context_length=8, truncation="refuse")


def test_a_number_that_is_none_is_told_and_never_the_best(data, tmp_path):
    made = [row | {"label": 1.5} for row in labelled(60)]  # of equal numbers there is no correlation
    messages = told(tmp_path, data, made, metric="pearson", classification={"kind": "regression"})
    assert "step 1: pearson is nan, so it cannot be the best" in messages
    assert not (tmp_path / "run" / "best.safetensors").exists()


def changed(**values):
    return [*labelled(60), labelled(61)[60] | values]


@pytest.mark.parametrize(
    ("made", "settings", "message"),
    [
        (changed(label=None), {}, r"rows.jsonl: row 61: the label is missing \(column 'label'\)"),
        (changed(label=" "), {}, r"rows.jsonl: row 61: the label is missing"),
        (labelled(60), {"label_column": "star"}, r"row 1: the label is missing \(column 'star'\)"),
        ([{"text": f"t{i}", "label": "a"} for i in range(60)], {}, "its training rows have 1 labels, expected 2 or"),
        (labelled(60), {"classification": {"labels": "bad,good"}}, "the label 'so-so' is none of classification.lab"),
        (labelled(60), {"classification": {"labels": "bad,good,so-so,odd"}}, "no training row has the label 'odd'"),
        (labelled(60), {"classification": {"kind": "regression"}}, "the label is '.*', expected a finite number"),
        (labelled(60), {"classification": {"class_weights": "1,2"}}, "class_weights is '1,2', expected balanced or 3"),
        (labelled(60), {"validation_share": 0.0}, "validation_share = 0.0 of 60 rows leaves 60 to train on and 0 held"),
        (labelled(60), {"tokenizer": ""}, "tokenizer names none, and there is no init that has one"),
        (labelled(60), {"model": "gpt"}, "model is 'gpt', expected bert for objective classification"),
        (labelled(60), {"metric": "f1"}, "metric is 'f1', expected accuracy or macro_f1 or matthews or loss"),
        (labelled(60), {"validation": "none.jsonl"}, "none.jsonl"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(data, tmp_path, made, settings, message):
    rows = table(tmp_path / "rows.jsonl", made)
    with pytest.raises((ConfigError, DataError), match=message) as error:
        run(tmp_path / "run", **{"data": rows, "objective": "classification", "tokenizer": str(data)} | settings)
    assert "\n" not in str(error.value)


def test_a_held_out_label_that_no_training_row_has_is_named(data, rows, tmp_path):
    held_out = table(tmp_path / "held_out.jsonl", [{"text": "odd", "label": "odd"}])
    with pytest.raises(DataError, match=r"held_out.jsonl: row 1: the label 'odd' is in no training row"):
        run(tmp_path / "run", data=rows, objective="classification", tokenizer=str(data), validation=held_out)


def test_prepared_text_is_no_table_and_a_table_no_prepared_text(data, rows, tmp_path):
    with pytest.raises(DataError, match="is prepared text; objective classification is trained on a table"):
        run(tmp_path / "run", data=str(data), objective="classification", tokenizer=str(data))
    with pytest.raises(DataError, match="not a prepared folder"):
        run(tmp_path / "run", data=rows)


def test_another_table_is_not_gone_on_with(data, rows, tmp_path):
    settings = {"objective": "classification", "tokenizer": str(data)}
    run(tmp_path / "run", data=rows, max_steps=1, **settings)
    other = table(tmp_path / "other.jsonl", labelled(80, 9))
    with pytest.raises(CheckpointError, match="trained on other data: the sha256 of its train split"):
        run(tmp_path / "run", data=other, resume=True, **settings)
