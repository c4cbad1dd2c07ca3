"""Gradient clipping and AdamW over the parameters of a GPT-2 of L layers of width C with a vocabulary of V.

In bfloat16 the gradients come as the products of a mixed-precision step leave them, and bf16 copies of the matrices for
the next forward pass go out: PyTorch casts both, since its optimizer takes gradients of the parameters' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastlm.backends import cpu as _native
from fastlm.models.gpt import GPT, GPTConfig
from fastlm.ops._shadow import prepare_weights
from fastlm.training.adamw import AdamW

from . import providers
from .case import Built, Case, Counts, Unavailable
from .kernel import each_dtype

CLIP = 1.0
LR, WEIGHT_DECAY = 1e-3, 0.1
CHECKED = 4  # parameters, from the last: small ones, a matrix and its bias
FLOPS = 16  # a parameter: square and add; scale, two moments, root, quotient, decay
PROVIDERS = ("fastlm", "torch")


class AdamWBenchmark:
    name, dims, variants = "adamw", ("L", "C", "V"), ("",)

    def cases(self, device: str, quick: bool) -> list[Case]:
        shape = (2, 128, 1024) if quick else (12, 768, 50257)
        return each_dtype([Case("adamw", shape, "", passes=("full",))])

    def session(self, case: Case, device: str) -> AdamWSession:
        return AdamWSession(case, device)

    def providers(self) -> tuple[str, ...]:
        return PROVIDERS


class AdamWSession:
    counts_state = False
    terms = 1

    def __init__(self, case: Case, device: str):
        L, C, V = case.shape
        self.case, self.device = case, device
        config = GPTConfig(vocab_size=V, context_length=1024, n_layer=L, n_head=1, n_embd=C)
        with torch.device("meta"):
            self.shapes = [p.shape for p in GPT(config).parameters()]
        self.low = case.dtype != "float32"
        values = [p.detach().double() for p in self._parameters(self.shapes[-CHECKED:])]
        self.truth = self._one_step("truth", [nn.Parameter(v) for v in values])

    def providers(self) -> tuple[str, ...]:
        return PROVIDERS

    def counts(self, which: str) -> Counts:
        """The norm reads the gradients; the update reads them, values and moments, and writes the last two."""
        n = sum(shape.numel() for shape in self.shapes)
        matrices = sum(shape.numel() for shape in self.shapes if len(shape) > 1)
        size = self.case.torch_dtype.itemsize
        return Counts(n * (2 * size + 24) + (2 * matrices if self.low else 0), FLOPS * n)

    def _parameters(self, shapes: list[torch.Size]) -> list[nn.Parameter]:
        generator = torch.Generator(self.device).manual_seed(0)
        drawn = (torch.randn(s, generator=generator, device=self.device) for s in shapes)
        return [nn.Parameter(0.02 * t) for t in drawn]

    def _give_gradients(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Gradients of the case's dtype, as values of the parameters' own where nothing else is taken."""
        generator = torch.Generator(self.device).manual_seed(1)
        grads = [
            torch.randn(p.shape, generator=generator, device=self.device).to(self.case.torch_dtype) for p in parameters
        ]
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad.to(p.grad_dtype or grad.dtype)
        return grads

    def _one_step(self, provider: str, parameters: list[nn.Parameter]) -> dict[str, Tensor]:
        self._stepper(provider, parameters)()
        return {f"output {i}": p.detach().clone() for i, p in enumerate(parameters)}

    def _stepper(self, provider: str, parameters: list[nn.Parameter]):
        matrices: list[Tensor] = [p for p in parameters if p.dim() > 1]
        if provider == "fastlm":
            if self.low:
                prepare_weights(matrices, accumulate=False)
                for p in parameters:
                    p.grad_dtype = self.case.torch_dtype
            self._give_gradients(parameters)
            ours = AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
            return lambda: ours.step(max_norm=CLIP)
        grads = self._give_gradients(parameters)
        theirs = torch.optim.AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)

        def step() -> list[Tensor]:
            if self.low:
                for p, grad in zip(parameters, grads, strict=True):
                    p.grad = grad.to(p.dtype)
            nn.utils.clip_grad_norm_(parameters, CLIP)
            theirs.step()
            return [p.detach().to(self.case.torch_dtype) for p in matrices] if self.low else []

        return step

    def build(self, provider: str) -> Built:
        if provider == "fastlm" and (self.device != "cpu" or _native.missing_reason):
            raise Unavailable(_native.missing_reason or "on this device it is PyTorch's")
        results = self._one_step(provider, self._parameters(self.shapes[-CHECKED:]))
        step = self._stepper(provider, self._parameters(self.shapes))
        label = providers.label("fastlm-cpu", self.device) if provider == "fastlm" else provider
        return Built({"full": step}, results, label)


ADAMW = AdamWBenchmark()
