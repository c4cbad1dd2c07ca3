"""BERT on B sequences of up to T tokens: reading them (fwd), or a step of masked-lm training with AdamW (full).

Padded batches hold sequences of 17 % to 100 % of T, half of all positions; the others are full. Reading runs in the
case's dtype, training below float32 under autocast with fp32 parameters; dropout is off. Right and wrong are told on
the hidden states, or the loss and some gradients, of a few tokens, against fp64.
"""

from __future__ import annotations

import dataclasses
import gc

import torch
from torch import Tensor, nn

from fastlm.formats.hf.layout import export
from fastlm.models.bert import BERT, BERTConfig
from fastlm.ops.cross_entropy import IGNORE_INDEX

from . import providers
from .case import Built, Case, Counts, Unavailable
from .kernel import each_dtype
from .peers import attribute
from .plain_bert import PlainBERT
from .train import CLIP, OPTIMIZER_BYTES

SIZES = {
    "base": BERTConfig(30522, 512, 12, 12, 768, dropout=0.0, attention_dropout=0.0),
    "small": BERTConfig(8192, 512, 4, 4, 256, dropout=0.0, attention_dropout=0.0),
}
VARIANTS = tuple(size + kind for size in SIZES for kind in ("", "-padded"))
LENGTHS = (1.0, 0.76, 0.62, 0.55, 0.43, 0.33, 0.23, 0.17)  # of T, in turn
MASKED = 0.15
CHECKED_ROWS, CHECKED_TOKENS = 2, 64
# A name of ours -> transformers'.
CHECKED = {
    "wte.weight": "bert.embeddings.word_embeddings.weight",
    "embedding_norm.weight": "bert.embeddings.LayerNorm.weight",
}
PROVIDERS = ("fastlm", "torch", "transformers")


class Bert:
    name, dims, variants = "bert", ("B", "T"), VARIANTS

    def cases(self, device: str, quick: bool) -> list[Case]:
        size, shape = ("small", (4, 32)) if quick else ("base", (8, 128))
        kinds = [(size + kind, which) for which in ("fwd", "full") for kind in ("-padded", "")]
        cases = each_dtype([Case("bert", shape, "", variant, (which,)) for variant, which in kinds])
        # All of them take a minute, and `huggingface` measures the same model.
        return [dataclasses.replace(c, extra=not quick) for c in cases]

    def providers(self) -> tuple[str, ...]:
        return PROVIDERS

    def session(self, case: Case, device: str) -> BertSession:
        return BertSession(case, device)


class BertSession:
    counts_state = True

    def __init__(self, case: Case, device: str):
        self.case, self.device = case, device
        size, _, padded = case.variant.partition("-")
        self.config = SIZES[size]
        self.trains = case.passes == ("full",)
        torch.manual_seed(0)
        self.state = {name: t.detach() for name, t in BERT(self.config).state_dict().items()}
        if not self.trains:  # weights in the case's dtype are the given; the truth computes with them in fp64
            self.state = {name: t.to(case.torch_dtype) for name, t in self.state.items()}
        B, T = case.shape
        share = torch.tensor([LENGTHS[row % len(LENGTHS)] if padded else 1.0 for row in range(B)])
        self.lengths = (share * T).round().long().clamp(min=1)
        self.mask = (torch.arange(T) < self.lengths[:, None]).long().to(device)
        self.tokens = torch.randint(self.config.vocab_size, (B, T), device=device)
        chosen = (torch.rand(B, T, device=device) < MASKED) & (self.mask > 0)
        chosen[:, 0] = True
        self.targets = self.tokens.masked_fill(~chosen, IGNORE_INDEX)
        self.terms = CHECKED_TOKENS * self.config.n_embd
        self.work = {"tokens": int(self.lengths.sum())}
        truth = PlainBERT(self.config).double().load({n: t.double() for n, t in self.state.items()}).to(device)
        self.truth = self._check("torch", truth, enabled=False)
        gc.collect()

    def providers(self) -> tuple[str, ...]:
        return PROVIDERS

    def counts(self, which: str) -> Counts:
        """2 operations a parameter that multiplies and token, and attention's 4 L T C; three times as many to train.

        Tokens are those that are no padding, and in training the vocabulary sees the masked ones alone.
        """
        c, tokens = self.config, int(self.lengths.sum())
        layer = c.n_embd * (4 * c.n_embd + 2 * c.n_inner)
        flops = 2 * tokens * c.n_layer * layer + 4 * c.n_layer * c.n_embd * int(self.lengths.square().sum())
        parameters = sum(t.numel() for t in self.state.values())
        if which == "fwd":
            return Counts(c.n_layer * layer * self.case.torch_dtype.itemsize, flops, self.case.dtype)
        masked = int((self.targets != IGNORE_INDEX).sum())
        flops = 3 * (flops + 2 * masked * c.n_embd * (c.n_embd + c.vocab_size))
        traffic = parameters * (3 * self.case.torch_dtype.itemsize + OPTIMIZER_BYTES)
        return Counts(traffic, flops, self.case.dtype)

    def build(self, provider: str) -> Built:
        providers.require(provider)
        model = self._model(provider).to(self.device)
        label = "fastlm engine" if provider == "fastlm" else provider
        if not self.trains:
            model = model.to(self.case.torch_dtype).eval()
            results = self._check(provider, model)
            mask = self.mask if self.case.variant.endswith("padded") else None
            return Built({"fwd": lambda: self._hidden(provider, model, self.tokens, mask)}, results, label)
        results = self._check(provider, model.train())
        model.zero_grad(set_to_none=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        return Built({"full": lambda: self._step(provider, model, optimizer)}, results, label)

    def _model(self, provider: str) -> nn.Module:
        if provider == "torch":
            return PlainBERT(self.config).load(self.state)
        ours = BERT(self.config)
        ours.load_state_dict(self.state)
        if provider == "fastlm":
            return ours
        if provider == "transformers":
            settings, tensors = export(ours)
            config = attribute("transformers", "BertConfig")(**settings, attn_implementation="sdpa")
            model = attribute("transformers", "BertForMaskedLM")(config)
            model.load_state_dict(tensors, strict=False)  # the decoder is the embedding
            model.tie_weights()
            return model
        raise Unavailable("it has no such model")

    def _hidden(self, provider: str, model: nn.Module, tokens: Tensor, mask: Tensor | None) -> Tensor:
        with torch.inference_mode():
            if provider == "fastlm":
                hidden, packing = model.encode(tokens, mask)  # type: ignore[operator]
                return packing.unpack(hidden)
            if provider == "transformers":
                return model.bert(tokens, attention_mask=mask).last_hidden_state  # type: ignore[operator]
            return model.hidden(tokens, mask)  # type: ignore[operator]

    def _loss(self, provider: str, model: nn.Module, rows: slice, columns: slice, enabled: bool = True) -> Tensor:
        tokens, targets, mask = (x[rows, columns].contiguous() for x in (self.tokens, self.targets, self.mask))
        given = mask if self.case.variant.endswith("padded") else None
        lower = enabled and self.case.dtype != "float32"
        with torch.autocast(torch.device(self.device).type, self.case.torch_dtype, enabled=lower):
            if provider == "transformers":
                return model(tokens, attention_mask=given, labels=targets).loss
            return model.loss(tokens, targets, given)  # type: ignore[operator]

    def _step(self, provider: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        self._loss(provider, model, slice(None), slice(None)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    def _check(self, provider: str, model: nn.Module, enabled: bool = True) -> dict[str, Tensor]:
        """Hidden states of the first tokens; or the loss on them, and gradients."""
        rows, columns = slice(-CHECKED_ROWS, None), slice(CHECKED_TOKENS)
        if not self.trains:
            mask = self.mask[rows, columns]
            hidden = self._hidden(provider, model.eval(), self.tokens[rows, columns], mask)
            return {"output 0": hidden[mask > 0].clone()}
        loss = self._loss(provider, model, rows, columns, enabled)
        loss.backward()
        found = {"output 0": loss.detach()}
        named = dict(model.named_parameters())
        for ours, theirs in CHECKED.items():
            gradient = named[theirs if provider == "transformers" else ours].grad
            assert gradient is not None
            found[f"gradient {ours}"] = gradient
        return found


BERT_BENCHMARK = Bert()
