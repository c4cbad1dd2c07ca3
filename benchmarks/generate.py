"""Greedy generation by a GPT-2: B prompts of P tokens, N new ones each, weights in the case's dtype.

Right and wrong are told on the logits that follow the prompt, against fp64.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastlm.inference import generate

from . import providers
from .case import Built, Case, Counts, Unavailable
from .engine import SIZES, build, plain, weights
from .kernel import each_dtype

PROVIDERS = ("fastlm", "torch", "transformers", "ctranslate2")


class Generate:
    name, dims, variants = "generate", ("B", "P", "N"), tuple(SIZES)

    def cases(self, device: str, quick: bool) -> list[Case]:
        variant, shape = ("gpt2-8m", (1, 16, 32)) if quick else ("gpt2-124m", (1, 16, 128))
        # Whether freed memory is kept makes no difference to it: a step allocates little.
        return each_dtype([Case("generate", shape, "", variant, ("fwd",))], ("bfloat16",))

    def providers(self) -> tuple[str, ...]:
        return PROVIDERS

    def session(self, case: Case, device: str) -> GenerateSession:
        return GenerateSession(case, device)


class GenerateSession:
    counts_state = True

    def __init__(self, case: Case, device: str):
        self.case, self.device = case, device
        self.config = SIZES[case.variant]
        self.terms = self.config.n_embd * self.config.n_layer
        B, P, N = case.shape
        # Weights in the case's dtype are the given; the truth computes with them in fp64.
        self.state = {name: t.to(case.torch_dtype) for name, t in weights(self.config).items()}
        self.tokens = torch.randint(self.config.vocab_size, (B, P), device=device)
        self.work = {"tokens": B * N}
        doubled = {name: t.double() for name, t in self.state.items()}
        with torch.no_grad():
            model = plain(self.config, doubled).double()
            model.load_state_dict(doubled)
            self.truth = {"output 0": model.to(device)(self.tokens)[:, -1]}
        gc.collect()

    def providers(self) -> tuple[str, ...]:
        return PROVIDERS

    def counts(self, which: str) -> Counts:
        """Every weight but the position table is read for each new token, and the keys and values before it."""
        B, P, N = self.case.shape
        c = self.config
        parameters = sum(t.numel() for t in self.state.values()) - c.context_length * c.n_embd
        held = sum(2 * c.n_layer * c.n_embd * (P + i) for i in range(N)) * B
        flops = 2 * parameters * B * (P + N - 1) + 2 * held
        traffic = (parameters * N + held) * self.case.torch_dtype.itemsize
        return Counts(traffic, flops, self.case.dtype, reads_only=True)

    def build(self, provider: str) -> Built:
        providers.require(provider)
        if provider == "ctranslate2":
            from .ctranslate2_gpt import build_ctranslate2

            return build_ctranslate2(self.config, self.state, self.tokens, self.case)
        model = build(provider, self.config, self.state).to(self.device, self.case.torch_dtype).eval()
        with torch.no_grad():
            logits = model(self.tokens)
        logits = logits if isinstance(logits, Tensor) else logits.logits
        label = "fastlm engine" if provider == "fastlm" else provider
        return Built({"fwd": self._loop(provider, model)}, {"output 0": logits[:, -1]}, label)

    def _loop(self, provider: str, model: nn.Module) -> Callable[[], object]:
        N = self.case.shape[2]
        if provider == "fastlm":
            return lambda: list(generate(model, self.tokens, N, temperature=0.0))  # type: ignore[arg-type]
        if provider == "torch":
            return lambda: model.generate(self.tokens, N)  # type: ignore[operator]
        if provider == "transformers":
            mask = torch.ones_like(self.tokens)
            return lambda: model.generate(  # type: ignore[operator]
                input_ids=self.tokens, attention_mask=mask, do_sample=False, max_new_tokens=N, min_new_tokens=N
            )
        raise Unavailable("it has no such loop")


GENERATE = Generate()
