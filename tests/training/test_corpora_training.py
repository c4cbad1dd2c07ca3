"""Training on packed documents and on several corpora, through the command: resumed bit for bit, refused in a line."""

import pytest
from safetensors.torch import load_file

from fastlm.cli import main
from fastlm.data import PrepareConfig, Tokenizer, prepare

SIZES = "--n-layer 1 --n-head 2 --n-embd 16 --context-length 16 --batch-size 4 --device cpu --threads 1 --dtype float32"
STEPS = "--max-steps 6 --eval-interval 3 --warmup-steps 0 --log-interval 1 --learning-rate 0.01 --decay-steps 6"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    Tokenizer.train_bpe(["the cat sat on a mat " * 20, "one two three four " * 20], 300).save(folder / "tokenizer.json")
    Tokenizer.train_bpe(["other"], 270).save(folder / "other.json")
    for name, text, tokenizer in (
        ("a", "the cat sat", "tokenizer"),
        ("b", "one two three four", "tokenizer"),
        ("c", "x", "other"),
    ):
        (folder / f"{name}.txt").write_text("\n".join(f"{text} {number} " * (number % 7 + 1) for number in range(200)))
        options = {"tokenizer": str(folder / f"{tokenizer}.json"), "document_separator": "\\n", "val_fraction": 0.2}
        prepare(PrepareConfig(folder / f"{name}.txt", folder / name, **options))
    return folder


def run(*arguments):
    return main(["train", *map(str, arguments)])


@pytest.mark.parametrize("flags", [
    "--packing best-fit",
    "--separate-documents",
    "--packing best-fit --separate-documents --data-weights 0.7,0.3",
])  # fmt: skip
def test_a_resumed_run_is_that_which_was_not_stopped(flags, folders, tmp_path):
    data = f"{folders / 'a'},{folders / 'b'}" if "weights" in flags else folders / "a"
    options = [*SIZES.split(), *STEPS.split(), *flags.split()]
    assert run(data, "--out", tmp_path / "whole", *options) == 0
    assert run(data, "--out", tmp_path / "halves", *options, "--max-steps", "3") == 0
    assert run("--out", tmp_path / "halves", "--resume", "--max-steps", "6") == 0
    whole, halves = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "halves"))
    assert whole.keys() == halves.keys()
    for name, tensor in whole.items():
        if name.startswith("model"):
            assert tensor.equal(halves[name]), name


@pytest.mark.parametrize(
    ("names", "flags", "message"),
    [
        ("a,c", "", "c: its tokenizer is not that of"),
        ("a,b", "--data-weights 1", "--data-weights has 1 numbers, expected 2"),
        ("a,b", "--data-weights 1,x", "--data-weights is '1,x', expected numbers"),
        ("a,b", "--data-weights 1,-1", "expected positive finite numbers"),
        ("a,nowhere", "", "nowhere: not a prepared folder"),
    ],
)
def test_corpora_that_do_not_go_together_are_refused_in_a_line(names, flags, message, folders, tmp_path, capsys):
    data = ",".join(str(folders / name) for name in names.split(","))
    assert run(data, "--out", tmp_path / "run", *SIZES.split(), *flags.split()) == 1
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.count("\n") == 1
