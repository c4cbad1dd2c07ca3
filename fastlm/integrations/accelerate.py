"""`accelerate(model)`: every module that fastlm knows gets fastlm's forward, in place; `restore(model)` undoes it.

A module is swapped by giving it another class, a subclass of its own: parameters, buffers, hooks, dtype, device,
training flag, state dict and identity stay what they are, and isinstance still holds. The new class equals the old one,
so that what goes by a table of classes, as quantization does, finds it there.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from . import rules

_ORIGINAL = "_fastlm_original"  # of a swapped module: the class that it had


class Row(NamedTuple):
    """What became of one module: its name in the model, its class, what serves it now, or why it was left alone."""

    name: str
    kind: str
    replacement: str = ""
    reason: str = ""


@dataclass
class Report:
    """What `accelerate` did; printing it gives a table, with one line for modules of one class and one outcome."""

    rows: list[Row] = field(default_factory=list)

    @property
    def replaced(self) -> list[Row]:
        return [row for row in self.rows if row.replacement]

    @property
    def kept(self) -> list[Row]:
        return [row for row in self.rows if not row.replacement]

    def __str__(self) -> str:
        groups = Counter((row.kind, row.replacement, row.reason) for row in self.replaced + self.kept)
        lines = [
            (f"{count:>5} x {kind}", f"-> {replacement}" if replacement else f"left alone: {reason}")
            for (kind, replacement, reason), count in groups.items()
        ]
        width = max((len(left) for left, _ in lines), default=0)
        head = f"{len(self.replaced)} of {len(self.rows)} replaced"
        return "\n".join([head, *(f"{left:<{width}}  {right}" for left, right in lines)])


def accelerate(model: nn.Module, *, attention: bool = True, loss: bool = True, unpad: bool = False) -> Report:
    """Swap, in place, every module of `model` that fastlm knows a faster forward of.

    Known are torch.nn's LayerNorm, RMSNorm, GELU, MultiheadAttention, the Transformer classes, CrossEntropyLoss and
    LinearCrossEntropyLoss, and subclasses that keep their forward; Linear itself; RMSNorm and GELU classes of any
    library, by what they compute; the feed-forward and residual blocks of Hugging Face's BERT, GPT-2, ViT, CLIP and
    Llama families and of timm's, by their forward's code. Results stay within rounding; dropout draws other masks
    of the same law.

    Args:
        model: any module; calling this again is harmless.
        attention: Hugging Face models: also switch their attention to "fastlm".
        loss: Hugging Face models: also switch transformers' own loss of language models to `fastlm.cross_entropy`.
            The logits stay the ordinary tensor that they are without; what never holds them is
            `fastlm.linear_cross_entropy` on the base model's states.
        unpad: BERT-type encoders of Hugging Face: compute nothing for padding tokens. Their outputs are then 0, where
            stock computes values that no caller should use.

    Returns:
        A `Report`; printing it says what was replaced, what not, and why.
    """
    report = Report()
    # Innermost first: whether a block can be swapped depends on its parts.
    rows = [_swap(name, module, unpad) for name, module in reversed(list(model.named_modules()))]
    report.rows += [row for row in reversed(rows) if row is not None]
    if "transformers" in sys.modules:
        from . import huggingface

        report.rows += [Row(*found) for found in huggingface.accelerate_models(model, attention, loss)]
    return report


def _swap(name: str, module: nn.Module, unpad: bool) -> Row | None:
    kind = type(module).__name__
    if _ORIGINAL in module.__dict__:
        return None
    found = rules.replacement(module, unpad)
    if found is None:
        return None
    if isinstance(found, str):
        return Row(name, kind, reason=found)
    swap_class(module, found.cls)
    return Row(name, kind, replacement=found.label)


def swap_class(module: nn.Module, cls: type) -> None:
    """Give `module` the class `cls`, a subclass of its own, remembering the one that it had at first."""
    original = module.__dict__.setdefault(_ORIGINAL, type(module))
    module.__dict__["__module__"] = original.__module__  # by which torch.fx knows torch's own, which it does not trace
    module.__class__ = cls


def restore(model: nn.Module) -> int:
    """Undo `accelerate`: every module of `model` gets its own class, attention and loss back.

    Returns:
        The number of modules that were restored.

    Raises:
        ValueError: if a module was given yet another class meanwhile, as by a parametrization; nothing is undone.
    """
    swapped = [(name, module) for name, module in model.named_modules() if _ORIGINAL in module.__dict__]
    for name, module in swapped:
        if not rules.is_replacement(type(module)):
            raise ValueError(f"restore: {name or 'model'} has become {type(module)!r}, expected what accelerate made")
    for _, module in swapped:
        module.__class__ = module.__dict__.pop(_ORIGINAL)
        module.__dict__.pop("__module__", None)
    if "transformers" in sys.modules:
        from . import huggingface

        huggingface.restore_models(model)
    return len(swapped)
