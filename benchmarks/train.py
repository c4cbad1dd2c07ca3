"""One training step of a GPT-2: forward, backward, gradient clipping and AdamW, on B sequences of T tokens.

Below float32 the model runs under autocast, with fp32 parameters. Right and wrong are told on the loss and some
gradients of a smaller batch, against fp64.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.ops._shadow import prepare_weights
from fastlm.training.adamw import AdamW

from . import providers
from .case import Built, Case, Counts, Unavailable
from .engine import SIZES, build, plain, transposed, weights
from .kernel import each_dtype

CHECKED_TOKENS = 64
CHECKED = ("wte.weight", "h.0.attn.c_attn.weight", "h.0.mlp.c_fc.bias", "ln_f.weight")
CLIP = 1.0
OPTIMIZER_BYTES = 28  # a parameter: its fp32 gradient, value and two moments read, the last three written
PROVIDERS = ("fastlm", "torch", "compile", "transformers")


class Train:
    name, dims, variants = "train", ("B", "T"), tuple(SIZES)

    def cases(self, device: str, quick: bool) -> list[Case]:
        """torch.compile in 16 bits only: in fp32 on a CPU it saves nothing and takes most of a minute."""
        variant, shape = ("gpt2-8m", (2, 128)) if quick else ("gpt2-124m", (4, 256) if device == "cpu" else (16, 1024))
        cases = each_dtype([Case("train", shape, "", variant, ("full",), headline=True)])
        return [dataclasses.replace(c, slow=not quick and (device != "cpu" or c.dtype != "float32")) for c in cases]

    def providers(self) -> tuple[str, ...]:
        return PROVIDERS

    def session(self, case: Case, device: str) -> TrainSession:
        return TrainSession(case, device)


class TrainSession:
    counts_state = True

    def __init__(self, case: Case, device: str):
        self.case, self.device = case, device
        self.config = SIZES[case.variant]
        self.state = weights(self.config)
        self.terms = CHECKED_TOKENS * self.config.n_embd
        B, T = case.shape
        self.tokens, self.targets = torch.randint(self.config.vocab_size, (2, B, T), device=device)
        self.work = {"tokens": B * T}
        self.truth = self._check(plain(self.config, self.state).to(device).double(), enabled=False)
        gc.collect()

    def providers(self) -> tuple[str, ...]:
        return PROVIDERS

    def counts(self, which: str) -> Counts:
        """6 operations a parameter that multiplies and token, and the causal half of attention's 12 L T C."""
        B, T = self.case.shape
        c = self.config
        parameters = sum(t.numel() for t in self.state.values())
        multiplied = parameters - c.context_length * c.n_embd
        flops = B * T * (6 * multiplied + 6 * c.n_layer * T * c.n_embd)
        traffic = parameters * (3 * self.case.torch_dtype.itemsize + OPTIMIZER_BYTES)
        return Counts(traffic, flops, self.case.dtype)

    def build(self, provider: str) -> Built:
        providers.require(provider)
        if provider == "transformers" and self.device == "cpu":
            raise Unavailable("on a CPU `fastlm bench huggingface` times its GPT-2, as it is and accelerated")
        model = build(provider, self.config, self.state).to(self.device).train()
        results = self._check(model, enabled=True)
        model.zero_grad(set_to_none=True)
        if provider == "fastlm":
            ours = self._engine(model)
            return Built({"full": lambda: self._our_step(model, ours)}, results, "fastlm engine")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        forward = providers.compiled(model) if provider == "compile" else model
        return Built({"full": lambda: self._step(forward, model, optimizer)}, results, provider)

    def _engine(self, model: Any) -> AdamW:
        """The optimizer of `fastlm train`, and the weights as it keeps them."""
        if self.device == "cpu" and self.case.dtype == "bfloat16":
            prepare_weights(model.product_weights(), accumulate=False)
        return AdamW(model.parameters(), lr=1e-4, fused=True)

    def _our_step(self, model: nn.Module, optimizer: AdamW) -> None:
        optimizer.zero_grad(set_to_none=True)
        self._loss(model, self.tokens, self.targets).backward()
        optimizer.step(max_norm=CLIP)

    def _loss(self, forward: Callable[..., Any], tokens: Tensor, targets: Tensor, enabled: bool = True) -> Tensor:
        lower = enabled and self.case.dtype != "float32"
        with torch.autocast(torch.device(self.device).type, self.case.torch_dtype, enabled=lower):
            if "transformers" in type(forward).__module__:
                logits = forward(input_ids=tokens, use_cache=False).logits
                return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            return forward(tokens, targets)

    def _step(self, forward: Callable[..., Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        self._loss(forward, self.tokens, self.targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    def _check(self, model: nn.Module, enabled: bool) -> dict[str, Tensor]:
        """Loss and gradients on the first tokens of the first sequence."""
        part = slice(0, CHECKED_TOKENS)
        loss = self._loss(model, self.tokens[:1, part], self.targets[:1, part], enabled)
        loss.backward()
        found = {"output 0": loss.detach()}
        named: dict[str, Any] = {n.removeprefix("transformer."): p.grad for n, p in model.named_parameters()}
        foreign = hasattr(model, "transformer")
        for name in CHECKED:
            grad = named[name]
            found[f"gradient {name}"] = grad.T if foreign and transposed(name) else grad
        return found


TRAIN = Train()
