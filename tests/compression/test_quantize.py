"""Quantized linear layers: their kernels against the weight that is meant, that weight against the given one, and
models that hold them."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune

import fastlm
import fastlm.data
from fastlm._core.tensor_file import open_safetensors
from fastlm.cli import main as cli
from fastlm.compression.quantization import QuantizedLinear, dequantize, quantize_int4
from fastlm.errors import CheckpointError, ConfigError
from fastlm.inference import generate, load_quantized, quantize, save_quantized
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

FORMATS = [("int8", 32), ("int4", 32), ("int4", 64), ("int4", 128)]
IDS = [f"{scheme}-{group}" for scheme, group in FORMATS]
CONFIG = GPTConfig(vocab_size=101, context_length=48, n_layer=2, n_head=2, n_embd=32)


def trained_like(config: GPTConfig = CONFIG) -> GPT:
    torch.manual_seed(0)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("scheme", "group_size"), FORMATS, ids=IDS)
@pytest.mark.parametrize("rows", range(1, 9))
def test_the_kernel_multiplies_the_weight_that_is_meant(every_isa, poisoned, rows, scheme, group_size, dtype):
    """Rounding x to 16 bits is at most 2^-16 max|x| off an element; the rest is fp32 sums and the final store."""
    for N, K in ((3, 1), (19, 50), (64, 160), (5, 9000)):
        layer = QuantizedLinear.from_weight(torch.randn(N, K), torch.randn(N), scheme, group_size)
        x = torch.randn(rows, K).to(dtype)
        truth = F.linear(x.double(), layer.weight.double(), layer.bias.double())
        weights = layer.weight.double().abs().sum(1)
        bound = x.abs().amax(1, keepdim=True).double() * weights * (2**-16 + 4 * torch.finfo(torch.float32).eps)
        bound = bound + truth.abs() * torch.finfo(dtype).eps
        error = (layer(x).double() - truth).abs()
        assert (error <= bound).all(), f"{N}x{K}: {float((error / bound).max()):.2f} of the bound"


@pytest.mark.parametrize(("scheme", "group_size"), FORMATS, ids=IDS)
def test_bits_do_not_depend_on_threads_or_other_rows(every_isa, threads, scheme, group_size):
    layer = QuantizedLinear.from_weight(torch.randn(300, 130), None, scheme, group_size)
    x = torch.randn(8, 130)
    threads(2)
    together = layer(x)
    threads(1)
    assert torch.equal(layer(x), together)
    for row in range(8):
        assert torch.equal(layer(x[row]), together[row])
        assert torch.equal(layer(x[:row]), together[:row])


def test_special_values_stay_in_their_row(every_isa):
    for scheme, group_size in FORMATS:
        layer = QuantizedLinear.from_weight(torch.randn(5, 64), None, scheme, group_size)
        x = torch.randn(4, 64)
        x[1, 7], x[2, 9], x[3] = math.nan, math.inf, 0
        y = layer(x)
        assert y[0].isfinite().all()
        assert not y[1:3].isfinite().any()
        assert (y[3] == 0).all()


@pytest.mark.parametrize(("scheme", "group_size"), FORMATS, ids=IDS)
def test_many_rows_use_the_same_weight(scheme, group_size):
    layer = QuantizedLinear.from_weight(torch.randn(30, 70), torch.randn(30), scheme, group_size)
    x = torch.randn(3, 20, 70)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize(("scheme", "group_size"), FORMATS, ids=IDS)
def test_the_native_dequantizer_gives_the_reference_bits(isa, scheme, group_size):
    layer = QuantizedLinear.from_weight(torch.randn(17, 150), None, scheme, group_size)
    assert torch.equal(layer.weight, dequantize(layer.qweight, layer.scale, 150, layer.group_size))
    layer = layer.bfloat16()
    assert torch.equal(layer.weight, dequantize(layer.qweight, layer.scale, 150, layer.group_size).bfloat16())


def test_int8_is_half_a_step_off():
    weight = torch.randn(40, 100) * torch.logspace(-3, 3, 40)[:, None]
    error = (QuantizedLinear.from_weight(weight).weight - weight).abs()
    step = weight.abs().amax(1, keepdim=True) / 127
    assert (error <= 0.501 * step).all()


def test_int4_is_exact_on_its_own_grid():
    """Multiples of a power of two from -8 to 7 with the -8 in each group are what the format holds."""
    q = torch.randint(-8, 8, (6, 128))
    q[:, ::32] = -8
    for scale in (2.0**-10, 1.0, 2.0**10):
        packed, scales = quantize_int4(q * scale, 32)
        assert torch.equal(dequantize(packed, scales, 128, 32), q * scale)


def test_a_smaller_group_is_more_accurate():
    weight = torch.randn(64, 256)
    error = [
        (QuantizedLinear.from_weight(weight, None, "int4", group).weight - weight).norm() for group in (32, 64, 128)
    ]
    assert error[0] < error[1] < error[2]
    # A normal variable rounded to 16 levels, with the best uniform step, has an error of 0.107 of its deviation.
    assert error[0] / weight.norm() < 0.107


@pytest.mark.parametrize(("scheme", "tolerance"), [("int8", 0.02), ("int4", 0.25)])
def test_a_quantized_model_stays_near_its_origin(scheme, tolerance):
    """Relative to the logits' spread; and the loss moves by less than that spread's share of a nat."""
    model = trained_like()
    small = quantize(copy.deepcopy(model), scheme)
    tokens = torch.randint(101, (4, 40))
    with torch.no_grad():
        theirs, ours = model(tokens), small(tokens)
        losses = model(tokens, tokens), small(tokens, tokens)
    assert float((ours - theirs).pow(2).mean().sqrt() / theirs.std()) < tolerance
    assert abs(float(losses[1] - losses[0])) < tolerance


@pytest.mark.parametrize(("scheme", "group_size"), FORMATS, ids=IDS)
def test_a_model_survives_a_file(tmp_path, scheme, group_size):
    model = quantize(trained_like().bfloat16(), scheme, group_size)
    path = tmp_path / "model.safetensors"
    save_quantized(model, path)
    loaded = load_quantized(path)
    assert loaded.config == model.config
    assert {n: t.dtype for n, t in loaded.state_dict().items()} == {n: t.dtype for n, t in model.state_dict().items()}
    prompt = torch.randint(101, (2, 5))
    expected = torch.stack(list(generate(model, prompt, 12, temperature=0)), 1)
    assert torch.equal(torch.stack(list(generate(loaded, prompt, 12, temperature=0)), 1), expected)


def test_casting_keeps_the_format():
    layer = QuantizedLinear.from_weight(torch.randn(8, 64), torch.randn(8))
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    layer = torch.nn.Sequential(layer).bfloat16()[0]
    assert layer.weight.dtype == torch.bfloat16
    assert all(torch.equal(t, before[name]) and t.dtype == before[name].dtype for name, t in layer.state_dict().items())


def test_any_module_can_be_quantized():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3)).eval()
    x = torch.randn(2, 64)
    expected = model(x).detach()
    assert fastlm.quantize(model) is model
    assert [type(layer).__name__ for layer in model] == ["QuantizedLinear", "ReLU", "QuantizedLinear"]
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0.05)


def test_errors(tmp_path):
    with pytest.raises(ConfigError, match="scheme is 'int2'"):
        quantize(trained_like(), "int2")
    with pytest.raises(ConfigError, match="group_size is 48"):
        quantize(trained_like(), "int4", 48)
    with pytest.raises(ConfigError, match="not finite"):
        QuantizedLinear.from_weight(torch.tensor([[math.nan]]))
    with pytest.raises(ConfigError, match="not quantized"):
        save_quantized(trained_like(), tmp_path / "x")
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 64\)"):
        QuantizedLinear(64, 8)(torch.ones(2, 63))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_quantized(tmp_path / "missing")
    save_file({"a": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="not a quantized model"):
        load_quantized(tmp_path / "other")


OTHERS = {
    "Llama": lambda: Llama(LlamaConfig(101, 48, 2, 4, 32, 64, n_kv_head=2)),
    "Llama, tied": lambda: Llama(LlamaConfig(101, 48, 2, 4, 32, 64, n_kv_head=2, tie_embeddings=True)),
    "Qwen3": lambda: Qwen3(Qwen3Config(101, 48, 2, 4, 32, 64, n_kv_head=2, head_size=16, tie_embeddings=True)),
    "Phi3": lambda: Phi3(Phi3Config(101, 48, 2, 4, 32, 64, rotary_share=0.5, sliding_window=9)),
    "GPT": lambda: GPT(CONFIG),
    "GPT, untied": lambda: GPT(dataclasses.replace(CONFIG, tie_embeddings=False)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("scheme", "group_size"), FORMATS, ids=IDS)
@pytest.mark.parametrize("name", OTHERS)
def test_load_reads_what_save_wrote_of_a_quantized_model(name, scheme, group_size, dtype, tmp_path):
    torch.manual_seed(0)
    model = quantize(OTHERS[name]().eval().to(dtype), scheme, group_size)
    fastlm.save(model, tmp_path / "one", format="fastlm")
    save_quantized(model, tmp_path / "two.safetensors")
    for path in (tmp_path / "one", tmp_path / "two.safetensors"):
        again = fastlm.load(path, dtype=dtype)
        assert (type(again), again.config) == (type(model), model.config)
        for key, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], tensor), key
        tokens = torch.arange(20)[None]
        assert torch.equal(again(tokens), model(tokens))


SIZES = {"vocab_size": 101, "context_length": 48, "n_head": 2, "n_embd": 32}
WITH_OUR_LINEAR = {
    "BERT": lambda: BERT(BERTConfig(**SIZES, n_layer=2, head="none")),
    "BERT, masked-lm": lambda: BERT(BERTConfig(**SIZES, n_layer=2, head="masked-lm")),
    "BERT, untied": lambda: BERT(BERTConfig(**SIZES, n_layer=2, head="masked-lm", tie_decoder=False)),
    "Seq2Seq": lambda: Seq2Seq(Seq2SeqConfig(**SIZES, n_encoder_layer=1, n_decoder_layer=1)),
    "Seq2Seq, untied": lambda: Seq2Seq(
        Seq2SeqConfig(**SIZES, n_encoder_layer=1, n_decoder_layer=1, tie_embeddings=False)
    ),
}


def call(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.arange(3, 23)[None]
    return model(tokens, tokens) if isinstance(model, Seq2Seq) else model(tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("scheme", "group_size"), FORMATS[:2], ids=IDS[:2])
@pytest.mark.parametrize("name", WITH_OUR_LINEAR)
@torch.no_grad()
def test_layers_of_our_own_linear_class_are_quantized(name, scheme, group_size, dtype, tmp_path):
    torch.manual_seed(0)
    model = WITH_OUR_LINEAR[name]().eval().to(dtype)
    meant = copy.deepcopy(model)
    quantize(model, scheme, group_size)
    assert not [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    for key, layer in meant.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.copy_(model.get_submodule(key).weight)
    rounding = 1e-4 if dtype is torch.float32 else 0.1
    torch.testing.assert_close(call(model), call(meant), rtol=rounding, atol=rounding)
    save_quantized(model, tmp_path / "model.safetensors")
    assert torch.equal(call(fastlm.load(tmp_path / "model.safetensors", dtype=dtype)), call(model))


def test_a_model_quantized_in_part_and_in_two_ways_survives_a_file(tmp_path):
    model = trained_like()
    quantize(model.h[0].attn, "int4", 64)
    quantize(model.h[1].mlp, "int8")
    save_quantized(model, tmp_path / "model.safetensors")
    again = load_quantized(tmp_path / "model.safetensors")
    tokens = torch.arange(20)[None]
    assert torch.equal(again(tokens), model(tokens))


def test_quantized_models_that_cannot_be_saved(tmp_path):
    model = quantize(trained_like())
    with pytest.raises(CheckpointError, match="it is quantized; save it with format='fastlm'"):
        fastlm.save(model, tmp_path / "hf")
    prune.l1_unstructured(model.h[0].ln_1, "weight", 0.3)
    with pytest.raises(CheckpointError, match=r"missing h\.0\.ln_1\.weight; unexpected h\.0\.ln_1\.weight_mask"):
        fastlm.save(model, tmp_path / "new" / "model.safetensors", format="fastlm")
    with pytest.raises(ConfigError, match="the model is a Sequential, expected one of GPT"):
        save_quantized(quantize(torch.nn.Sequential(torch.nn.Linear(8, 8))), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_files_of_quantized_models_that_are_damaged(tmp_path):
    path = tmp_path / "model.safetensors"
    save_quantized(quantize(trained_like(), "int4"), path)
    tensors, about = load_file(path), open_safetensors(path).metadata
    whole = path.read_bytes()

    def refused(tensors, about, message):
        save_file(tensors, path, about)
        with pytest.raises(CheckpointError, match=message):
            load_quantized(path)

    key = "h.0.attn.c_attn.qweight"
    refused(tensors | {key: tensors[key][:, :5].contiguous()}, about, f"{key} has shape")
    refused(tensors | {key: tensors[key].to(torch.int16)}, about, "int16|has shape")
    refused({name: t for name, t in tensors.items() if name != "h.0.attn.c_attn.scale"}, about, "missing .*scale")
    refused(tensors, about | {"config": "{"}, "its configuration is not JSON")
    refused(tensors, about | {"model": "Mamba"}, "holds a Mamba, expected one of GPT")
    refused(tensors, about | {"config": about["config"].replace('"n_layer": 2', '"n_layer": 9999999')}, "n_layer is")
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=f"has {len(whole) - 1} bytes, its header promises {len(whole)}"):
        load_quantized(path)


def test_generate_reads_a_quantized_file(tmp_path, capsys):
    fastlm.save(quantize(trained_like()), tmp_path, format="fastlm")
    fastlm.data.Tokenizer.characters(["abcdefgh"]).save(tmp_path / "tokenizer.json")
    assert cli(["generate", str(tmp_path), "--prompt", "abc", "--max-new-tokens", "5", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out.startswith("abc")
    assert cli(["generate", str(tmp_path), "--prompt", "abc", "--weights", "int4"]) == 1
    assert "is quantized already" in capsys.readouterr().err
