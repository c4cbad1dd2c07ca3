"""Models of Hugging Face transformers as they are, and after `fastlm.accelerate`: B sequences of T tokens.

Inference runs in the case's dtype, training under autocast to it. Sequences of the padded variants have lengths
from T down to an eighth of it, as sentences have; there fastlm runs unpadded, and the work counted is the real
tokens'. Right and wrong are told on two short sequences, against fp64.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastlm

from . import providers
from .case import Built, Case, Counts
from .kernel import each_dtype
from .peers import attribute

CHECKED = (2, 24)  # sequences and tokens of the comparison with fp64
NEW_TOKENS = 32  # of a generation
PATCH = 16
PROVIDERS = ("fastlm", "torch", "compile")


class Variant(NamedTuple):
    """What is run: a family, a size, and one of "forward", "train" and "generate"."""

    family: str
    task: str = "forward"
    padded: bool = False
    small: bool = False


VARIANTS = {
    "bert-base": Variant("bert"),
    "bert-base-padded": Variant("bert", padded=True),
    "bert-base-padded-train": Variant("bert", "train", padded=True),
    "gpt2-124m-train": Variant("gpt2", "train"),
    "gpt2-124m-generate": Variant("gpt2", "generate"),
    "vit-base": Variant("vit"),
    "bert-small-padded": Variant("bert", padded=True, small=True),
    "gpt2-small-train": Variant("gpt2", "train", small=True),
}
COMMONEST = (("bert-base-padded", "bfloat16"), ("gpt2-124m-train", "bfloat16"))
SHAPES = {"bert": (8, 128), "gpt2": (4, 256), "vit": (4, 196)}


class HuggingFace:
    name, dims, variants = "huggingface", ("B", "T"), tuple(VARIANTS)

    def cases(self, device: str, quick: bool) -> list[Case]:
        cases = []
        for name, variant in VARIANTS.items():
            if variant.small == quick:
                B, T = (2, 64) if quick else SHAPES[variant.family]
                shape = (1, 16) if variant.task == "generate" else (B, T)
                passes = ("full",) if variant.task == "train" else ("fwd",)
                cases.append(Case(self.name, shape, "", name, passes))
        cases = each_dtype(cases)
        return [replace(c, extra=not quick and (c.variant, c.dtype) not in COMMONEST) for c in cases]

    def providers(self) -> tuple[str, ...]:
        return PROVIDERS

    def session(self, case: Case, device: str) -> HuggingFaceSession:
        return HuggingFaceSession(case, device)


class HuggingFaceSession:
    counts_state = True

    def __init__(self, case: Case, device: str):
        self.case, self.device = case, device
        self.variant = VARIANTS[case.variant]
        self.inputs = self._inputs(*case.shape)
        B, T = (min(given, most) for given, most in zip(case.shape, CHECKED, strict=True))
        self.checked = self._inputs(B, case.shape[1] if self.variant.family == "vit" else T)
        self.tokens = (
            int(self.inputs["attention_mask"].sum()) if self.variant.family != "vit" else math.prod(case.shape)
        )
        self.work = {"tokens": case.shape[0] * NEW_TOKENS if self.variant.task == "generate" else self.tokens}
        model: Any = self._model()
        self.parameters = sum(p.numel() for p in model.parameters())
        self.terms = 4 * model.config.hidden_size * model.config.num_hidden_layers
        if self.variant.task != "train":  # weights rounded to the dtype are the given
            model.to(case.torch_dtype)
        self.state = {name: t.clone() for name, t in model.state_dict().items()}
        self.truth = self._results(model.double(), {n: _wide(x, torch.float64) for n, x in self.checked.items()}, False)
        gc.collect()

    def _model(self) -> nn.Module:
        torch.manual_seed(0)
        small = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2}
        small |= {"n_layer": 2, "n_embd": 128, "n_head": 2}
        sizes: dict[str, Any] = small if self.variant.small else {}
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        if self.variant.family == "gpt2":
            sizes = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} | {
                k: v for k, v in sizes.items() if k.startswith("n_")
            }
            return attribute("transformers", "GPT2LMHeadModel")(attribute("transformers", "GPT2Config")(**sizes))
        sizes = no_dropout | {k: v for k, v in sizes.items() if not k.startswith("n_")}
        if self.variant.family == "vit":
            config = attribute("transformers", "ViTConfig")(image_size=PATCH * math.isqrt(self.case.shape[1]), **sizes)
            return attribute("transformers", "ViTModel")(config, add_pooling_layer=False)
        config = attribute("transformers", "BertConfig")(**sizes)
        if self.variant.task == "train":
            return attribute("transformers", "BertForMaskedLM")(config)
        return attribute("transformers", "BertModel")(config, add_pooling_layer=False)

    def _inputs(self, B: int, T: int) -> dict[str, Tensor]:
        torch.manual_seed(1)
        if self.variant.family == "vit":
            side = PATCH * math.isqrt(T)
            return {"pixel_values": torch.randn(B, 3, side, side, device=self.device)}
        ids = torch.randint(5, 30000, (B, T), device=self.device)
        lengths = torch.linspace(T, max(1, T // 8) if self.variant.padded else T, B, device=self.device).long()
        mask = torch.arange(T, device=self.device) < lengths[:, None]
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
        if self.variant.task == "train":
            chosen = mask if self.variant.family == "gpt2" else mask & (torch.rand(B, T, device=self.device) < 0.15)
            chosen[:, 1] |= mask[:, 1]  # masked language models learn from some, and at least these
            inputs["labels"] = ids.masked_fill(~chosen, -100)
        return inputs

    def providers(self) -> tuple[str, ...]:
        return PROVIDERS

    def counts(self, which: str) -> Counts:
        """2 operations a parameter and token forward, 6 with the backward pass; attention's own are left out."""
        steps = NEW_TOKENS if self.variant.task == "generate" else 1
        flops = (6 if which == "full" else 2) * self.parameters * (self.tokens + (steps - 1) * self.case.shape[0])
        traffic = self.parameters * self.case.torch_dtype.itemsize * steps * (3 if which == "full" else 1)
        return Counts(traffic, flops, self.case.dtype, reads_only=steps > 1)

    def build(self, provider: str) -> Built:
        providers.require(provider)
        model = self._model()
        model.load_state_dict(self.state)
        model = model.to(self.device).train(self.variant.task == "train")
        if self.variant.task != "train":
            model.to(self.case.torch_dtype)
        label = {"torch": "transformers", "compile": "transformers, compile"}.get(provider, "accelerated")
        if provider == "fastlm":
            fastlm.accelerate(model, unpad=self.variant.padded)
            label += ", unpadded" if self.variant.padded else ""
        checked = {name: _wide(x, self._input_dtype) for name, x in self.checked.items()}
        results = self._results(model, checked, self.variant.task == "train")
        model.zero_grad(set_to_none=True)
        forward = providers.compiled(model) if provider == "compile" and self.variant.task != "generate" else model
        return Built({self.case.passes[0]: self._call(forward, model)}, results, label)

    @property
    def _input_dtype(self) -> torch.dtype:
        return torch.float32 if self.variant.task == "train" else self.case.torch_dtype

    def _call(self, forward: Callable[..., Any], model: nn.Module) -> Callable[[], object]:
        inputs = {name: _wide(x, self._input_dtype) for name, x in self.inputs.items()}
        if self.variant.task == "generate":
            options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
            return lambda: model.generate(**inputs, **options, pad_token_id=0)  # type: ignore[operator]
        if self.variant.task == "forward":
            return torch.no_grad()(lambda: forward(**inputs))

        def step() -> None:
            model.zero_grad(set_to_none=True)
            with self._autocast(True):
                loss = forward(**inputs).loss
            loss.backward()

        return step

    def _autocast(self, enabled: bool) -> torch.autocast:
        lower = enabled and self.case.dtype != "float32"
        return torch.autocast(torch.device(self.device).type, self.case.torch_dtype, enabled=lower)

    def _results(self, model: nn.Module, inputs: dict[str, Tensor], autocast: bool) -> dict[str, Tensor]:
        """Loss and a gradient of a training step, or the outputs of real tokens."""
        model.to(self.device)
        if self.variant.task == "train":
            with self._autocast(autocast):
                loss = model(**inputs).loss
            loss.backward()
            norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
            grad = norms[-1].weight.grad
            assert grad is not None
            return {"output 0": loss.detach(), "gradient of the last norm": grad}
        with torch.no_grad():
            output = model(**inputs)[0]
        return {"output 0": output[inputs["attention_mask"].bool()] if "attention_mask" in inputs else output}


def _wide(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


HUGGING_FACE = HuggingFace()
