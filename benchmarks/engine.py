"""What the engine's benchmarks share: sizes, weights, and the three models that load them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastlm.models.gpt import GPT, GPTConfig

from .case import Unavailable
from .peers import attribute
from .plain_gpt import PlainGPT

SIZES = {
    "gpt2-124m": GPTConfig(vocab_size=50257, context_length=1024, n_layer=12, n_head=12, n_embd=768),
    "gpt2-8m": GPTConfig(vocab_size=8192, context_length=256, n_layer=6, n_head=4, n_embd=256),
}


def weights(config: GPTConfig) -> dict[str, Tensor]:
    """GPT-2's initialisation, the same for everyone."""
    torch.manual_seed(0)
    return {name: t.detach() for name, t in GPT(config).state_dict().items()}


def plain(config: GPTConfig, state: dict[str, Tensor]) -> PlainGPT:
    model = PlainGPT(config)
    model.load_state_dict(state)
    return model


def fused(config: GPTConfig, state: dict[str, Tensor]) -> GPT:
    model = GPT(config)
    model.load_state_dict(state)
    return model


def hugging_face(config: GPTConfig, state: dict[str, Tensor]) -> nn.Module:
    """transformers' GPT-2; its linear layers hold their weights transposed."""
    settings = attribute("transformers", "GPT2Config")(
        vocab_size=config.vocab_size, n_positions=config.context_length, n_embd=config.n_embd, n_layer=config.n_layer,
        n_head=config.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = attribute("transformers", "GPT2LMHeadModel")(settings)
    model.transformer.load_state_dict({n: t.T if transposed(n) else t for n, t in state.items()})
    model.tie_weights()
    return model


def transposed(name: str) -> bool:
    return name.startswith("h.") and name.endswith("weight") and ".ln_" not in name


def build(provider: str, config: GPTConfig, state: dict[str, Tensor]) -> nn.Module:
    """The model that a provider runs."""
    makers: dict[str, Callable[..., nn.Module]] = {
        "fastlm": fused, "torch": plain, "compile": plain, "transformers": hugging_face,
    }  # fmt: skip
    if provider not in makers:
        raise Unavailable("it has no such model")
    return makers[provider](config, state)
