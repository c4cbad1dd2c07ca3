"""Phi-3 and Phi-4-mini: a Llama whose heads turn in part, with LongRoPE for long contexts.

Abdin et al. 2024, "Phi-3 Technical Report"; Ding et al. 2024, "LongRoPE: Extending LLM Context Window Beyond 2
Million Tokens": each rotary wavelength is stretched by a factor of its own, of one list for sequences within the
original context and of another for longer ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..nn.embedding import rotary_rates
from .llama import Llama, LlamaBlock, LlamaConfig, rotations

if TYPE_CHECKING:
    from .common.cache import KVCache


@dataclass(frozen=True)
class Phi3Config(LlamaConfig):
    """The sizes that define a Phi-3; see `LlamaConfig`.

    Attributes:
        rotary_share: share of a head's elements that turn; an even number of elements.
        rope_scaling: None or "longrope"; then
        rope_short_factors, rope_long_factors: what the wavelengths are multiplied by, one each, in sequences of up to
            rope_original_context tokens and in longer ones.
        rope_extension: how many times the original context is the longest; None means context_length over
            rope_original_context.
        rope_attention_factor: what cosines and sines are multiplied by; None means sqrt(1 + ln e / ln original), with
            e the extension, or 1 where that is at most 1.
        residual_dropout: rate on both residual branches in training.
    """

    families: ClassVar[tuple[str, ...]] = ("phi3",)
    scalings: ClassVar[tuple[str | None, ...]] = (None, "longrope")

    rms_norm_eps: float = 1e-5
    rope_original_context: int = 4096
    rotary_share: float = 1.0
    rope_short_factors: tuple[float, ...] = ()
    rope_long_factors: tuple[float, ...] = ()
    rope_extension: float | None = None
    rope_attention_factor: float | None = None
    residual_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_rates("residual_dropout")
        self._check_positive("rotary_share")
        if self.rotary_share > 1 or self.rotary_size % 2 or not self.rotary_size:
            self._refuse("rotary_share", f"at most 1, for an even number of a head's {self.head_size} elements")
        for name in ("rope_extension", "rope_attention_factor"):
            if getattr(self, name) is not None:
                self._check_positive(name)
        if self.rope_original_context < 2:  # whose logarithm is divided by
            self._refuse("rope_original_context", "at least 2")
        for name in ("rope_short_factors", "rope_long_factors"):
            self._check_numbers(name, self.rotary_size // 2 if self.rope_scaling else 0)

    @property
    def rotary_size(self) -> int:
        return int(self.head_size * self.rotary_share)

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.rope_scaling is None:
            return 1.0
        if self.rope_attention_factor is not None:
            return self.rope_attention_factor
        extension = self.rope_extension or self.context_length / self.rope_original_context
        return 1.0 if extension <= 1 else math.sqrt(1 + math.log(extension) / math.log(self.rope_original_context))


class Phi3Block(LlamaBlock):
    def __init__(self, config: Any, layer: int):
        super().__init__(config, layer)
        self.dropout = config.residual_dropout


class Phi3(Llama):
    """Phi-3: rotary positions of a part of each head, pre-norm blocks, grouped-query attention, SwiGLU.

    Keys that a cache holds of a sequence within the original context do not fit a longer one, whose positions turn
    otherwise: `forward` refuses to go on with them, and `fastlm.inference.generate` reads the sequence again.
    """

    block = Phi3Block

    def blocks(self, rows: Tensor, start: int, cache: KVCache | None) -> Tensor:
        if start and self.outgrows(start, start + rows.shape[1]):
            raise ValueError(
                f"Phi3: tokens reach position {start + rows.shape[1]}, beyond rope_original_context "
                f"{self.config.rope_original_context}, expected all tokens again, as the {start} cached ones turned by "
                "the factors of shorter sequences"
            )
        return super().blocks(rows, start, cache)

    def outgrows(self, before: int, after: int) -> bool:
        return self.config.rope_scaling is not None and before <= self.config.rope_original_context < after

    def rotations(self, start: int, T: int, device: torch.device) -> tuple[Tensor, Tensor]:
        config = self.config
        factors: Tensor | float = 1.0
        if config.rope_scaling is not None:
            long = start + T > config.rope_original_context
            factors = torch.tensor(config.rope_long_factors if long else config.rope_short_factors)
        frequencies = rotary_rates(config.rotary_size, config.rope_theta, torch.float32, factors=factors)
        cos, sin = rotations(frequencies, start, T, device)
        scale = config.attention_factor
        return (cos, sin) if scale == 1 else (cos * scale, sin * scale)
