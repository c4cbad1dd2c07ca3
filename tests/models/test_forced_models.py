"""A forced backend reaches every product of a model, not only the ops that are called by name."""

import pytest
import torch

import fastlm
from fastlm.backends import cpu
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

pytestmark = pytest.mark.skipif(cpu.missing_reason is not None, reason="no CPU extension")

WIDTH, LENGTH, VOCABULARY = (
    256,
    256,
    4200,
)  # products that are our own where they lead, and an output layer of many classes
ABOUT = ("is_intel", "isa", "best_isa", "set_isa", "gemm_serves", "omp_threads")  # questions, not kernels


class Counter:
    """Stands before the extension and counts the kernels that are called."""

    def __init__(self, extension):
        self.extension, self.calls = extension, []

    def __getattr__(self, name):
        value = getattr(self.extension, name)
        if name in ABOUT or not callable(value):
            return value
        return lambda *args: (self.calls.append(name), value(*args))[1]


@pytest.fixture
def kernels(monkeypatch):
    counter = Counter(cpu._cpu)
    monkeypatch.setattr(cpu, "_cpu", counter)
    return counter


def _gpt(tied):
    model = GPT(GPTConfig(VOCABULARY, LENGTH, n_layer=1, n_head=4, n_embd=WIDTH, dropout=0.1, tie_embeddings=tied))
    return model, lambda tokens: model(tokens, tokens)


def _llama(model=Llama, config=LlamaConfig, **options):
    model = model(config(VOCABULARY, LENGTH, n_layer=1, n_head=4, n_embd=WIDTH, n_inner=512, n_kv_head=2, **options))
    return model, lambda tokens: model(tokens, tokens)


def _bert():
    model = BERT(BERTConfig(VOCABULARY, LENGTH, n_layer=1, n_head=4, n_embd=WIDTH))
    return model, lambda tokens: model.loss(tokens, tokens)


def _seq2seq():
    model = Seq2Seq(Seq2SeqConfig(VOCABULARY, LENGTH, 1, 1, n_head=4, n_embd=WIDTH))
    return model, lambda tokens: model.loss(tokens, tokens)


MODELS = {
    "gpt": lambda: _gpt(True), "gpt untied": lambda: _gpt(False), "llama": _llama, "bert": _bert, "seq2seq": _seq2seq,
    "llama tied": lambda: _llama(tie_embeddings=True), "qwen3": lambda: _llama(Qwen3, Qwen3Config, head_size=32),
    "phi3": lambda: _llama(Phi3, Phi3Config, rotary_share=0.75, sliding_window=100, residual_dropout=0.1),
}  # fmt: skip
WITH_ROTARY = ("llama", "llama tied", "qwen3", "phi3")


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", MODELS)
def test_no_kernel_of_ours_runs_under_the_reference(kernels, name, autocast):
    _, loss = MODELS[name]()
    tokens = torch.randint(3, VOCABULARY, (2, LENGTH))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss(tokens).backward()
        assert kernels.calls  # what counts them sees them
        kernels.calls.clear()
        for forced in ("reference", "torch") if name not in WITH_ROTARY else ("reference",):
            with fastlm.backend(forced):
                try:
                    loss(tokens).backward()
                except fastlm.BackendError:  # an op that PyTorch has no operator for
                    assert forced == "torch"
            assert kernels.calls == [], forced


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("kind", ["Linear", "FeedForward"])
def test_layers_are_explained(kind, rows):
    layer = fastlm.nn.Linear(512, 512) if kind == "Linear" else fastlm.nn.FeedForward(512, 512)
    found = fastlm.explain(layer, torch.randn(rows, 512))
    assert found.op == "linear"
    assert found.selected in ("cpu", "torch")
    assert set(found.reasons) == {"cpu", "triton", "cuda", "torch", "reference"}
