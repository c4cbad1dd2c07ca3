"""A forced backend reaches every product of a model, not only the ops that are called by name."""

import importlib

import pytest
import torch
from torch import nn

import fastlm
from fastlm.backends import cpu
from fastlm.backends.cpu import gemm
from fastlm.compression.quantization import quantize
from fastlm.inference import generate
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


@pytest.mark.parametrize("quantized", [False, True])
def test_no_kernel_of_ours_decodes_under_the_reference(kernels, quantized):
    model = _gpt(True)[0].eval()
    model = quantize(model) if quantized else model
    tokens = torch.randint(3, VOCABULARY, (1, 20))
    texts = []
    for forced in (None, "reference"):
        kernels.calls.clear()
        with fastlm.backend(forced):
            texts.append([token.tolist() for token in generate(model, tokens, 3, temperature=0.0)])
        assert bool(kernels.calls) is (forced is None)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("kind", ["Linear", "FeedForward"])
def test_layers_are_explained(kind, rows):
    layer = fastlm.nn.Linear(512, 512) if kind == "Linear" else fastlm.nn.FeedForward(512, 512)
    found = fastlm.explain(layer, torch.randn(rows, 512))
    assert found.op == "linear"
    assert found.selected in ("cpu", "torch")
    assert set(found.reasons) == {"cpu", "triton", "cuda", "torch", "reference"}


# What decides between the kernels of linear: (our GEMM leads, AMX is there).
CPUS = {"zen4": (True, False), "sapphire rapids": (False, True), "avx2": (False, False)}


@pytest.fixture(params=CPUS)
def machine(request, monkeypatch):
    """A CPU on which other kernels of linear are the fastest ones; these run on any."""
    leads, tiles = CPUS[request.param]
    thresholds = importlib.import_module("fastlm.ops._thresholds")
    for name in ("linear", "_gemm"):
        module = importlib.import_module(f"fastlm.ops.{name}")
        monkeypatch.setattr(module, "leads", lambda dtype: leads and gemm.gemm_serves(dtype))
        monkeypatch.setattr(module, "has_tiles", lambda: tiles)
    monkeypatch.setitem(thresholds.FASTER_ROWS, torch.float32, thresholds.ROWS_IN_FP32[leads])
    return request.param


LAYERS = {
    "wide": lambda dtype: fastlm.nn.Linear(136, 1024, dtype=dtype),
    "small": lambda dtype: fastlm.nn.Linear(16, 24, dtype=dtype),
    "classes": lambda dtype: fastlm.nn.Linear(32, VOCABULARY, dtype=dtype),
    "quantized": lambda dtype: quantize(nn.Sequential(nn.Linear(136, 1024)))[0].to(dtype),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_explain_tells_what_a_layer_runs(kernels, machine, kind, dtype, autocast):
    """With few rows and many, with gradients and without, whatever is forced."""
    layer = LAYERS[kind](dtype)
    for rows in (1, 8, 9, 641):
        x = torch.randn(rows, layer.in_features, dtype=dtype)
        truth = x.float() @ layer.weight.detach().float().T + layer.bias.detach().float()
        for forced in (None, "cpu", "triton", "torch", "reference"):
            for gradients in (False, True):
                with (
                    torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16, enabled=autocast),
                    fastlm.backend(forced),
                ):  # fmt: skip
                    found = fastlm.explain(layer, x)
                    kernels.calls.clear()
                    y = layer(x)
                assert found.op == "linear"
                ours = {"linear_fwd", "gemm", "quantized_linear_fwd"} & set(kernels.calls)
                assert bool(ours) is (found.selected == "cpu"), str(found)
                if forced in ("torch", "reference"):
                    assert found.selected == forced
                assert y.dtype is (torch.bfloat16 if autocast and "quantized_linear_fwd" not in ours else dtype)
                torch.testing.assert_close(y.detach().float(), truth, rtol=0.02, atol=0.05)


def test_the_op_and_a_layer_decide_alike(machine):
    for rows in (1, 3, 8, 9, 641):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            layer, x = fastlm.nn.Linear(136, 1024, dtype=dtype), torch.randn(rows, 136).to(dtype)
            for gradients in (False, True):
                with torch.set_grad_enabled(gradients):
                    found = [fastlm.explain(layer, x), fastlm.explain(fastlm.linear, x, layer.weight, layer.bias)]
                    assert found[0].selected == found[1].selected
                    assert found[0].request.features[:-1] == found[1].request.features[:-1]
                    assert torch.equal(layer(x), fastlm.linear(x, layer.weight, layer.bias))


def _never(graph, inputs):
    raise AssertionError("explain compiled something")


def _calls(layer):
    return lambda x: layer(x)


COMPILED = {
    "function": lambda layer: torch.compile(_calls(layer), backend=_never, fullgraph=True),
    "module": lambda layer: torch.compile(layer, backend=_never),
    "in place": lambda layer: layer.compile(backend=_never) or layer,
    "inside another": lambda layer: _calls(torch.compile(layer, backend=_never)),
}


@pytest.mark.parametrize("way", COMPILED)
def test_what_is_compiled_is_explained(way):
    x = torch.randn(64, 512)
    found = fastlm.explain(COMPILED[way](fastlm.nn.Linear(512, 512)), x)
    assert found.op == "linear"
    assert found.compiled
    assert found.selected == "torch"
    assert "torch.compile traces linear" in found.reasons["cpu"]
    assert "under torch.compile" in str(found)
    assert not fastlm.explain(fastlm.nn.Linear(512, 512), x).compiled


def test_an_op_that_stays_whole_under_compile_is_chosen_as_without():
    q = torch.randn(1, 2, 300, 64)
    attend = fastlm.scaled_dot_product_attention
    compiled = fastlm.explain(torch.compile(attend, backend=_never), q, q, q)
    assert compiled.compiled
    assert compiled.selected == fastlm.explain(attend, q, q, q).selected == "cpu"


@pytest.mark.parametrize("name", ["gpt", "llama", "bert", "seq2seq"])
def test_models_are_explained_compiled_or_not(name):
    model, _ = MODELS[name]()
    tokens = torch.randint(3, VOCABULARY, (2, 16))
    arguments = (tokens, tokens) if name == "seq2seq" else (tokens,)
    plain = fastlm.explain(model, *arguments)
    compiled = fastlm.explain(torch.compile(model, backend=_never), *arguments)
    assert plain.op == compiled.op
    assert compiled.compiled
    assert not plain.compiled
