"""Several texts in one row against each by itself: outputs, loss and gradients, for every model that continues text."""

import pytest
import torch

from fastlm.models import GPT, GPTConfig, Llama, LlamaConfig, Phi3, Phi3Config, Qwen3, Qwen3Config

SIZES = {"vocab_size": 50, "context_length": 12, "n_layer": 2, "n_head": 4, "n_embd": 32}
MODELS = {
    "gpt": lambda: GPT(GPTConfig(**SIZES)),
    "llama": lambda: Llama(LlamaConfig(**SIZES, n_inner=48, n_kv_head=2)),
    "window": lambda: Llama(LlamaConfig(**SIZES, n_inner=48, n_kv_head=2, sliding_window=3)),
    "qwen3": lambda: Qwen3(Qwen3Config(**SIZES, n_inner=48, n_kv_head=2)),
    "phi3": lambda: Phi3(Phi3Config(**SIZES, n_inner=48)),
}
LENGTHS = (5, 1, 12, 0, 7)


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]()


def row():
    torch.manual_seed(1)
    tokens = torch.randint(50, (1, sum(LENGTHS)))
    targets = torch.randint(50, (1, sum(LENGTHS)))
    return tokens, targets, torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


def test_each_text_is_as_by_itself(model):
    tokens, targets, bounds = row()
    logits = model(tokens, cu_seqlens=bounds)
    loss = model(tokens, targets, cu_seqlens=bounds)
    loss.backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    alone = [model(part)[0] for part in tokens.split(LENGTHS, 1) if part.numel()]
    want = torch.nn.functional.cross_entropy(torch.cat(alone), targets[0])
    want.backward()
    torch.testing.assert_close(logits[0], torch.cat(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    for grad, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-6)


def test_one_text_in_a_row_is_a_plain_call(model):
    tokens, *_ = row()
    tokens = tokens[:, :12]
    one = model(tokens, cu_seqlens=torch.tensor([0, 12], dtype=torch.int32))
    torch.testing.assert_close(one, model(tokens), rtol=1e-4, atol=1e-5)


BAD = {
    "expected (1, length) with cu_seqlens": lambda t, b: (t.expand(2, -1), b),
    "expected (texts + 1,) and torch.int32": lambda t, b: (t, b.long()),
    "must rise from 0 to the length, 25": lambda t, b: (t, b[:-1]),
    "a text of 18 tokens, which does not fit the context of 12": lambda t, b: (t, b[[0, 2, 3, 5]][[0, 2, 3]]),
    "tokens holds the id": lambda t, b: (t + 50, b),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_bounds_are_named(message):
    model = MODELS["gpt"]()
    tokens, _, bounds = row()
    tokens, bounds = BAD[message](tokens, bounds)
    with pytest.raises(ValueError, match="GPT: ") as caught:
        model(tokens, cu_seqlens=bounds)
    assert message in str(caught.value)
