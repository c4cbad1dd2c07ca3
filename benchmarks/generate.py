"""Greedy generation by a GPT-2: B prompts of P tokens, N new ones each, weights in the case's dtype.

Right and wrong are told on the logits that follow the prompt, against fp64. Under "int8" and "int4" the weights are
such as the format holds; fastlm then holds them so, and the others in the case's dtype.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastlm.compression.quantization import QuantizedLinear, Scheme, quantize
from fastlm.inference import generate

from . import providers
from .case import Built, Case, Counts, Unavailable
from .engine import SIZES, build, plain, transposed, weights
from .kernel import each_dtype

SCHEMES: dict[str, Scheme] = {" int8": "int8", " int4": "int4"}  # what follows the size in a variant's name
GROUP_SIZE = 32
PROVIDERS = ("fastlm", "torch", "transformers", "ctranslate2")


class Generate:
    name, dims, variants = "generate", ("B", "P", "N"), tuple(f"{n}{q}" for q in ("", *SCHEMES) for n in SIZES)

    def cases(self, device: str, quick: bool) -> list[Case]:
        variant, shape = ("gpt2-8m", (1, 16, 32)) if quick else ("gpt2-124m", (1, 16, 128))
        # Whether freed memory is kept makes no difference to it: a step allocates little.
        names = [variant + scheme for scheme in ("", *SCHEMES)]
        return each_dtype([Case("generate", shape, "", name, ("fwd",)) for name in names], ("bfloat16",))

    def providers(self) -> tuple[str, ...]:
        return PROVIDERS

    def session(self, case: Case, device: str) -> GenerateSession:
        return GenerateSession(case, device)


class GenerateSession:
    counts_state = True

    def __init__(self, case: Case, device: str):
        self.case, self.device = case, device
        size, _, scheme = case.variant.partition(" ")
        self.config, self.scheme = SIZES[size], scheme
        self.terms = self.config.n_embd * self.config.n_layer
        B, P, N = case.shape
        # Weights in the case's dtype are the given; the truth computes with them in fp64.
        state = weights(self.config)
        if scheme:
            for name, t in state.items():
                if transposed(name) or name == "wte.weight":
                    state[name] = _representable(t, SCHEMES[f" {scheme}"])
        self.state = {name: t.to(case.torch_dtype) for name, t in state.items()}
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
        size = {"int8": 1.0, "int4": 0.5 + 2 / GROUP_SIZE}.get(self.scheme, self.case.torch_dtype.itemsize)
        traffic = int(parameters * N * size + held * self.case.torch_dtype.itemsize)
        return Counts(traffic, flops, self.case.dtype, reads_only=True)

    def build(self, provider: str) -> Built:
        providers.require(provider)
        if provider == "ctranslate2":
            from .ctranslate2_gpt import build_ctranslate2

            return build_ctranslate2(self.config, self.state, self.tokens, self.case)
        if provider == "transformers" and self.scheme:
            raise Unavailable("its weights are those of the plain case, whose time is the same")
        model = build(provider, self.config, self.state).to(self.device, self.case.torch_dtype).eval()
        if provider == "fastlm" and self.scheme:
            model = quantize(model, SCHEMES[f" {self.scheme}"], GROUP_SIZE)
        with torch.no_grad():
            logits = model(self.tokens)
        logits = logits if isinstance(logits, Tensor) else logits.logits
        label = f"fastlm engine {self.scheme}".strip() if provider == "fastlm" else provider
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


def _representable(weight: Tensor, scheme: Scheme) -> Tensor:
    return QuantizedLinear.from_weight(weight, None, scheme, GROUP_SIZE).weight


GENERATE = Generate()
