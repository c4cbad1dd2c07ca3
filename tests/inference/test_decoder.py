"""The native decode step against the modules' own forward pass."""

import pytest
import torch
from torch import nn

import fastlm
from fastlm.compression.quantization import quantize
from fastlm.inference import KVCache, generate
from fastlm.inference.decoder import Decoder, unsupported
from fastlm.models import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=67, context_length=24, n_layer=3, n_head=2, n_embd=20, n_inner=36)


def random_model(config: GPTConfig = CONFIG) -> GPT:
    torch.manual_seed(0)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def logits_of_both(model: GPT, B: int, pack: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (12, B, V) that follow single tokens after a prompt, by the modules and by the decoder."""
    tokens = torch.randint(CONFIG.vocab_size, (B, 20))
    dtype = model.wte.weight.dtype
    ours, theirs = KVCache(model.config, B, dtype), KVCache(model.config, B, dtype)
    expected, got = [], []
    with torch.no_grad():
        for cache in (ours, theirs):
            model.hidden(tokens[:, :8], cache)
        decoder = Decoder(model, ours, pack)
        for i in range(8, 20):
            expected.append(model.logits(model.hidden(tokens[:, i : i + 1], theirs)[:, -1]).float())
            got.append(decoder.step(tokens[:, i]).clone())
    assert ours.length == theirs.length == 20
    return torch.stack(expected), torch.stack(got)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("pack", [True, False], ids=["packed", "in-place"])
@pytest.mark.parametrize("B", [1, 3, 8])
def test_fp32_equals_the_modules(isa, B, pack, tied):
    model = random_model(GPTConfig(**{**CONFIG.to_dict(), "tie_embeddings": tied}))
    expected, got = logits_of_both(model, B, pack)
    # fp32 sums of 20 to 36 terms of order 1, taken in another order through three layers.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bits_are_closer_to_the_truth_than_the_modules(every_isa, dtype):
    model = random_model().to(dtype)
    theirs, ours = logits_of_both(model, 2)
    torch.manual_seed(0)
    truth_model = random_model().to(dtype).float()
    truth, _ = logits_of_both(truth_model, 2)
    assert float((ours - truth).square().mean()) <= float((theirs - truth).square().mean())


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_models(isa, scheme):
    expected, got = logits_of_both(quantize(random_model(), scheme), 2)
    # Activations are rounded to 16 bits of their row's largest on both sides, but not from the same fp32 values.
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-3)


def test_threads_do_not_matter(threads):
    model = random_model(GPTConfig(vocab_size=600, context_length=24, n_layer=1, n_head=2, n_embd=64))
    runs = []
    for count in (1, 2):
        threads(count)
        torch.manual_seed(1)
        cache = KVCache(model.config, 2)
        with torch.no_grad():
            runs.append(Decoder(model, cache).step(torch.tensor([5, 6])).clone())
    assert torch.equal(*runs)


def test_generation_follows_weights_that_change_between_calls():
    model = random_model()
    prompt = torch.randint(67, (1, 4))

    def tokens():
        return torch.cat(list(generate(model, prompt, 30, temperature=0)))

    first = tokens()
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight.data.mul_(-1)  # unseen by version counters
    changed = tokens()
    with fastlm.backend("reference"):
        assert torch.equal(changed, tokens())
    assert not torch.equal(changed, first)


def test_says_what_it_cannot_decode():
    model = random_model()
    assert unsupported(model, 1) is None
    assert "9 rows" in unsupported(model, 9)
    with fastlm.backend("torch"):
        assert "torch backend is forced" in unsupported(model, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in unsupported(model, 1)
    assert "float64" in unsupported(random_model().double(), 1)
    assert "in training mode" in unsupported(random_model().train(), 1)
    assert "not a GPT" in unsupported(nn.Linear(2, 2), 1)


def test_hooks_and_foreign_layers_are_respected():
    model = random_model()
    handle = model.h[0].mlp.register_forward_hook(lambda module, args, out: out * 0)
    assert "h.0.mlp has a hook" in unsupported(model, 1)
    handle.remove()
    model.h[1].attn.c_proj = nn.Sequential(model.h[1].attn.c_proj)
    assert "h.1.attn.c_proj" in unsupported(model, 1)
    silenced = random_model()
    silenced.h[0].mlp.register_forward_hook(lambda module, args, out: out * 0)
    prompt = torch.randint(67, (1, 4))
    with_hook = torch.cat(list(generate(silenced, prompt, 8, temperature=0)))
    assert not torch.equal(with_hook, torch.cat(list(generate(random_model(), prompt, 8, temperature=0))))


def test_a_full_cache_is_refused():
    model = random_model()
    cache = KVCache(model.config, 1, max_length=1)
    with torch.no_grad():
        decoder = Decoder(model, cache)
        decoder.step(torch.tensor([1]))
        with pytest.raises(ValueError, match="exceed its max_length of 1"):
            decoder.step(torch.tensor([1]))
