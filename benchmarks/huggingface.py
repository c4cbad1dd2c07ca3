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


class Family(NamedTuple):
    """A type of model: its configuration class, the model class of each task, and sizes.

    Sizes that are not given are the configuration's own. Llama, Qwen and Gemma are as wide as published models of
    1.1, 0.6 and 0.3 billion parameters, with fewer layers and a vocabulary that is smaller alike.
    """

    config: str
    models: dict[str, str]
    sizes: dict[str, Any]
    shape: tuple[int, int]


def _causal(kind: str) -> dict[str, str]:
    return dict.fromkeys(("train", "generate"), kind)


GROUPED = {"vocab_size": 32000, "num_hidden_layers": 4, "pad_token_id": 0}
FAMILIES = {
    "bert": Family("BertConfig", {"forward": "BertModel", "train": "BertForMaskedLM"}, {}, (8, 128)),
    "roberta": Family("RobertaConfig", {"forward": "RobertaModel"}, {"max_position_embeddings": 514}, (8, 128)),
    "vit": Family("ViTConfig", {"forward": "ViTModel"}, {}, (4, 196)),
    "gpt2": Family("GPT2Config", _causal("GPT2LMHeadModel"), {}, (4, 256)),
    "t5": Family("T5Config", _causal("T5ForConditionalGeneration"), {"decoder_start_token_id": 0}, (4, 128)),
    "bart": Family(
        "BartConfig", _causal("BartForConditionalGeneration"),
        {
            "d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072,
            "encoder_attention_heads": 12, "decoder_attention_heads": 12,
        }, (4, 128),
    ),
    "llama": Family(
        "LlamaConfig", _causal("LlamaForCausalLM"),
        GROUPED | {"hidden_size": 2048, "intermediate_size": 5632, "num_key_value_heads": 4}, (2, 256),
    ),
    "qwen3": Family(
        "Qwen3Config", _causal("Qwen3ForCausalLM"),
        GROUPED | {
            "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        }, (2, 256),
    ),
    "gemma3": Family(
        "Gemma3TextConfig", _causal("Gemma3ForCausalLM"),
        GROUPED | {
            "num_hidden_layers": 6, "hidden_size": 640, "intermediate_size": 2048, "num_key_value_heads": 1,
            "sliding_window": 512,
        }, (2, 256),
    ),
}  # fmt: skip
SMALL = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2}
SMALL_INNER = {"bert": {"intermediate_size": 512}, "gpt2": {"n_inner": 512}}


class Variant(NamedTuple):
    """What is run: a family, and one of "forward", "train" and "generate"."""

    family: str
    task: str = "forward"
    padded: bool = False
    small: bool = False


VARIANTS = {
    "bert-base": Variant("bert"),
    "bert-base-padded": Variant("bert", padded=True),
    "bert-base-train": Variant("bert", "train"),
    "bert-base-padded-train": Variant("bert", "train", padded=True),
    "roberta-base": Variant("roberta"),
    "vit-base": Variant("vit"),
    "gpt2-124m-train": Variant("gpt2", "train"),
    "gpt2-124m-generate": Variant("gpt2", "generate"),
    "t5-small-train": Variant("t5", "train"),
    "t5-small-generate": Variant("t5", "generate"),
    "bart-base-train": Variant("bart", "train"),
    "bart-base-generate": Variant("bart", "generate"),
    "llama-4-layers-train": Variant("llama", "train"),
    "llama-4-layers-generate": Variant("llama", "generate"),
    "qwen3-4-layers-train": Variant("qwen3", "train"),
    "qwen3-4-layers-generate": Variant("qwen3", "generate"),
    "gemma3-6-layers-train": Variant("gemma3", "train"),
    "gemma3-6-layers-generate": Variant("gemma3", "generate"),
    "bert-small-padded": Variant("bert", padded=True, small=True),
    "gpt2-small-train": Variant("gpt2", "train", small=True),
}


class HuggingFace:
    name, dims, variants = "huggingface", ("B", "T"), tuple(VARIANTS)

    def cases(self, device: str, quick: bool) -> list[Case]:
        cases = []
        for name, variant in VARIANTS.items():
            if variant.small == quick:
                B, T = (2, 64) if quick else FAMILIES[variant.family].shape
                shape = (1, 16) if variant.task == "generate" else (B, T)
                passes = ("full",) if variant.task == "train" else ("fwd",)
                cases.append(Case(self.name, shape, "", name, passes))
        cases = each_dtype(cases)
        return [replace(c, extra=not quick) for c in cases]

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
        self.parameters = _multiplied(model)
        self.terms = 4 * model.config.hidden_size * model.config.num_hidden_layers
        if self.variant.task != "train":  # weights rounded to the dtype are the given
            model.to(case.torch_dtype)
        self.state = {name: t.clone() for name, t in model.state_dict().items()}
        self.truth = self._results(model.double(), {n: _wide(x, torch.float64) for n, x in self.checked.items()}, False)
        gc.collect()

    def _model(self) -> nn.Module:
        torch.manual_seed(0)
        family, task, _, small = self.variant
        kind = FAMILIES[family]
        sizes = kind.sizes | (SMALL | SMALL_INNER[family] if small else {})
        if family == "vit":
            sizes |= {"image_size": PATCH * math.isqrt(self.case.shape[1])}
        config = attribute("transformers", kind.config)(**sizes)
        for name in config.to_dict():
            if "dropout" in name or name.endswith("pdrop"):
                setattr(config, name, 0.0)
        pooled = {} if task != "forward" else {"add_pooling_layer": False}
        return attribute("transformers", kind.models[task])(config, **pooled)

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
            chosen = mask.clone()
            if self.variant.family == "bert":  # masked language models learn from some, and at least one a sequence
                chosen &= torch.rand(B, T, device=self.device) < 0.15
                chosen[:, 1] = mask[:, 1]
            inputs["labels"] = ids.masked_fill(~chosen, -100)
        return inputs

    def providers(self) -> tuple[str, ...]:
        return PROVIDERS

    def counts(self, which: str) -> Counts:
        """2 operations a parameter that multiplies and token forward, 6 with the backward pass.

        Attention's own are left out, and all of a generation but the new tokens' in an encoder-decoder.
        """
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
            norms: list[Any] = [m for m in model.modules() if "Norm" in type(m).__name__]
            return {"output 0": loss.detach(), "gradient of the last norm": norms[-1].weight.grad}
        if self.variant.family in ("t5", "bart"):
            inputs = inputs | {"decoder_input_ids": inputs["input_ids"]}
        with torch.no_grad():
            output = model(**inputs)[0]
        return {"output 0": output[inputs["attention_mask"].bool()] if "attention_mask" in inputs else output}


def _multiplied(model: Any) -> int:
    """Parameters that a token is multiplied with: no embedding, unless it is the output layer too."""
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()
    tables -= {head.weight} if head is not None else set()
    return sum(p.numel() for p in model.parameters() if p.dim() > 1 and p not in tables)


def _wide(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


HUGGING_FACE = HuggingFace()
