"""A hundred steps of training follow stock PyTorch's from the same weights and data.

The truth of a loss curve is the stock model's in fp64. How far rounding takes a curve from it is seen in runs of the
stock model in the dtype under test, whose first weights differ in their last places. The rule is that of
`tolerances.py`: twice the farthest of those, and what rounding does to a mean over the targets.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlm
from fastlm.benchmarks.plain_bert import PlainBERT
from fastlm.benchmarks.plain_gpt import PlainGPT
from fastlm.formats.hf.layout import export
from fastlm.models import BERT, GPT, BERTConfig, GPTConfig
from fastlm.ops._shadow import prepare_weights
from fastlm.runtime import cpu_bfloat16_feature
from fastlm.training.adamw import AdamW
from hf import transformers
from tolerances import RATIO_TO_TORCH, atol, max_error

STEPS, B, T, V = 100, 8, 24, 32
SIZES = {"vocab_size": V, "context_length": T, "n_layer": 2, "n_head": 2, "n_embd": 32}
LR, WEIGHT_DECAY, CLIP = 3e-3, 0.1, 1.0
IGNORED, PAD_ID, MASK_ID = -100, 0, 1
ROUNDED_RUNS = 4  # of the stock model

no_bf16 = pytest.mark.skipif(cpu_bfloat16_feature() is None, reason="no bf16 products in this CPU")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=[no_bf16, pytest.mark.slow])]


class Batch(NamedTuple):
    """(B, T) inputs, targets (-100 where none counts), and 0 for padding in `mask`."""

    tokens: Tensor
    targets: Tensor
    mask: Tensor


class Family(NamedTuple):
    """Models that compute the same from the same weights.

    Attributes:
        batch: the step's data.
        stock: plain PyTorch, or transformers' model.
        loss: the stock model's, by PyTorch's cross-entropy.
        ours: the same weights in a model of fastlm's, or the stock model accelerated.
        our_loss: its loss, as its users ask for it.
    """

    batch: Callable[[int], Batch]
    stock: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]
    ours: Callable[[], nn.Module]
    our_loss: Callable[[nn.Module, Batch], Tensor]


def text(step: int) -> Tensor:
    """(B, T + 1) tokens, each row of one of eight topics: what to learn is which words go together.

    Ids of padding and masks do not occur.
    """
    scores = 4 * torch.randn(8, V, generator=torch.Generator().manual_seed(0))
    scores[:, [PAD_ID, MASK_ID]] = -math.inf
    generator = torch.Generator().manual_seed(1 + step)
    topics = torch.randint(8, (B,), generator=generator)
    return torch.multinomial(scores.softmax(-1)[topics], T + 1, replacement=True, generator=generator)


def next_token(step: int) -> Batch:
    tokens = text(step)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(B, T, dtype=torch.long))


def masked_tokens(step: int) -> Batch:
    """A quarter of the tokens hidden; two sequences end early."""
    tokens, mask = text(step)[:, :T], torch.ones(B, T, dtype=torch.long)
    mask[-2:, T // 2 :] = 0
    chosen = torch.rand(B, T, generator=torch.Generator().manual_seed(step)) < 0.25
    tokens, hidden = tokens.masked_fill(mask == 0, PAD_ID), chosen & (mask > 0)
    return Batch(tokens.masked_fill(hidden, MASK_ID), tokens.masked_fill(~hidden, IGNORED), mask)


def mean_loss(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)


def widened(model: nn.Module) -> nn.Module:
    """The model with matrices of a deviation that suits its width, where GELU and softmax are not nearly linear."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter *= SIZES["n_embd"] ** -0.5 / 0.02
    return model


def gpt() -> GPT:
    torch.manual_seed(0)
    return widened(GPT(GPTConfig(**SIZES, dropout=0.0)))


def bert() -> BERT:
    torch.manual_seed(0)
    return widened(BERT(BERTConfig(**SIZES, dropout=0.0, attention_dropout=0.0)))


def plain_gpt() -> nn.Module:
    model = PlainGPT(gpt().config)
    model.load_state_dict(gpt().state_dict())
    return model


def theirs(kind: str, ours: nn.Module) -> nn.Module:
    """transformers' model with the weights of ours."""
    settings, tensors = export(ours)
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, {"GPT2": "GPT2LMHeadModel", "Bert": "BertForMaskedLM"}[kind])(config)
    model.load_state_dict(tensors, strict=False)  # the output layer is the embedding
    model.tie_weights()
    return model.train()


def accelerated(model: nn.Module) -> nn.Module:
    assert fastlm.accelerate(model).replaced
    return model


FAMILIES = {
    "GPT": Family(
        next_token,
        plain_gpt,
        lambda model, b: model(b.tokens, b.targets),
        gpt,
        lambda model, b: model(b.tokens, b.targets),
    ),
    "BERT": Family(
        masked_tokens,
        lambda: PlainBERT(bert().config).load(bert().state_dict()),
        lambda model, b: model.loss(b.tokens, b.targets, b.mask),
        bert,
        lambda model, b: model.loss(b.tokens, b.targets, b.mask),
    ),
    "transformers GPT-2, accelerated": Family(
        next_token,
        lambda: theirs("GPT2", gpt()),
        lambda model, b: mean_loss(model(input_ids=b.tokens, use_cache=False).logits, b),
        lambda: accelerated(theirs("GPT2", gpt())),
        lambda model, b: model(input_ids=b.tokens, labels=b.tokens, shift_labels=b.targets, use_cache=False).loss,
    ),
    "transformers BERT, accelerated": Family(
        masked_tokens,
        lambda: theirs("Bert", bert()),
        lambda model, b: mean_loss(model(input_ids=b.tokens, attention_mask=b.mask).logits, b),
        lambda: accelerated(theirs("Bert", bert())),
        lambda model, b: model(input_ids=b.tokens, attention_mask=b.mask, labels=b.targets).loss,
    ),
}


def groups(model: nn.Module) -> list[dict]:
    """Matrices decay; biases and norms do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    return [{"params": matrices}, {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]


def autocast(dtype: torch.dtype) -> contextlib.AbstractContextManager:
    return torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16)


def stock_curve(family: Family, model: nn.Module, dtype: torch.dtype, **options) -> Tensor:
    """The losses of PyTorch's layers, clipping and AdamW."""
    optimizer = torch.optim.AdamW(groups(model), **{"lr": LR, "weight_decay": WEIGHT_DECAY} | options)
    losses = []
    for step in range(STEPS):
        batch = family.batch(step)
        with autocast(dtype):
            loss = family.loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def our_curve(family: Family, dtype: torch.dtype) -> Tensor:
    """The losses of the same model on fastlm, with its AdamW."""
    model = family.ours()
    if dtype is torch.bfloat16 and isinstance(model, GPT):  # as `fastlm train` does
        prepare_weights(model.product_weights(), accumulate=False)
    optimizer = AdamW(groups(model), lr=LR, weight_decay=WEIGHT_DECAY)
    losses = []
    for step in range(STEPS):
        with autocast(dtype):
            loss = family.our_loss(model, family.batch(step))
        loss.backward()
        optimizer.step(max_norm=CLIP)
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def rounded(model: nn.Module, dtype: torch.dtype, seed: int) -> nn.Module:
    """The model with every weight moved by up to half a unit of `dtype` in its last place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p *= 1 + torch.finfo(dtype).eps * (torch.rand(p.shape, generator=generator, dtype=torch.float64) - 0.5)
    return model


@functools.cache
def truth(name: str) -> Tensor:
    family = FAMILIES[name]
    return stock_curve(family, family.stock().double(), torch.float64)


@functools.cache
def bound(name: str, dtype: torch.dtype) -> float:
    """How far a right curve may be from the truth."""
    family = FAMILIES[name]
    runs = [stock_curve(family, rounded(family.stock(), dtype, seed), dtype) for seed in range(ROUNDED_RUNS)]
    own = max(max_error(run, truth(name)) for run in runs)
    return RATIO_TO_TORCH * own + atol(torch.float32, float(truth(name).max()), B * T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_hundred_steps_follow_stock_torch(name, dtype):
    assert truth(name)[-10:].mean() < 0.5 * truth(name)[0]  # something is learned
    assert max_error(our_curve(FAMILIES[name], dtype), truth(name)) <= bound(name, dtype)


def other_eps(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    return model


FAULTS = {
    "eps of the norms": (other_eps, {}),
    "learning rate": (lambda model: model, {"lr": 1.0001 * LR}),
    "eps of AdamW": (lambda model: model, {"eps": 1e-7}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_slight_fault_is_outside_the_bound(fault):
    change, options = FAULTS[fault]
    family = FAMILIES["GPT"]
    curve = stock_curve(family, change(family.stock()), torch.float32, **options)
    assert max_error(curve, truth("GPT")) > bound("GPT", torch.float32)
