"""Token embeddings and the ways of telling a Transformer where a token stands."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.rotary import rotary


def sinusoid_angles(positions: Tensor, d_model: int, base: float = 10000.0) -> Tensor:
    """Angles p / base^(2 i / d_model) of `positions` (T,), (T, d_model / 2) in their dtype; Vaswani et al. 2017."""
    rates = base ** (-torch.arange(0, d_model, 2, device=positions.device, dtype=positions.dtype) / d_model)
    return positions[:, None] * rates


def rotary_rates(
    rotary_dim: int,
    base: float,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    factors: Tensor | float = 1.0,
) -> Tensor:
    """Radians a token, base^(-2 i / rotary_dim) / factors, for each pair of a head's elements that turn: (R,)."""
    return 1.0 / (factors * base ** (torch.arange(0, rotary_dim, 2, dtype=dtype, device=device) / rotary_dim))


class SinusoidalPositions(nn.Module):
    """Adds sines and cosines of the position to a sequence (Vaswani et al. 2017); has no parameters.

    Element 2 i of position p is sin(p / base^(2 i / d_model)), element 2 i + 1 its cosine.
    """

    table: Tensor

    def __init__(self, d_model: int, max_length: int = 5000, base: float = 10000.0, device=None, dtype=None) -> None:
        super().__init__()
        angles = sinusoid_angles(torch.arange(max_length, device=device, dtype=torch.float64), d_model, base)
        table = torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)[:, :d_model]
        self.register_buffer("table", table.to(dtype or torch.get_default_dtype()), persistent=False)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """`x` (..., T, d_model) plus the rows of positions start to start + T - 1, in x's dtype.

        Raises:
            ValueError: if a position is beyond max_length.
        """
        return x + _rows(self, self.table, x, start).to(x.dtype)


class LearnedPositions(nn.Module):
    """Adds a learned vector a position to a sequence (Gehring et al. 2017); weight (max_length, d_model)."""

    def __init__(self, d_model: int, max_length: int, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_length, d_model, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """`x` (..., T, d_model) plus the weights of positions start to start + T - 1.

        Raises:
            ValueError: if a position is beyond max_length.
        """
        return x + _rows(self, self.weight, x, start)


def _rows(module: nn.Module, table: Tensor, x: Tensor, start: int) -> Tensor:
    T, max_length = x.shape[-2], table.shape[0]
    if start < 0 or start + T > max_length:
        name = type(module).__name__
        raise ValueError(f"{name}: x has positions {start} to {start + T - 1}, expected them below {max_length}")
    return table[start : start + T]


class Embedding(nn.Embedding):
    """`torch.nn.Embedding`, optionally scaled and with positions added.

    Args (beside torch's):
        scale: factor of the token's vector before the position is added; sqrt(embedding_dim) in the paper.
        positions: None, "sinusoidal" or "learned"; adds a submodule `positions` of that kind.
        max_length: the most positions; needed for "learned".

    Raises:
        ValueError: for another kind of positions, or learned ones without max_length.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device=None,
        dtype=None,
        *,
        scale: float = 1.0,
        positions: str | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type,
            scale_grad_by_freq, sparse, _weight, _freeze, device, dtype,
        )  # fmt: skip
        self.scale = scale
        self.positions = _positions(positions, embedding_dim, max_length, device, dtype)

    def forward(self, input: Tensor, start: int = 0) -> Tensor:
        """Vectors (..., T, embedding_dim) of the indices `input` (..., T), the first at position `start`."""
        x = super().forward(input)
        x = x if self.scale == 1.0 else x * self.scale
        return x if self.positions is None else self.positions(x, start)


def _positions(kind: str | None, d_model: int, max_length: int | None, device, dtype) -> nn.Module | None:
    if kind is None:
        return None
    if kind == "sinusoidal":
        return SinusoidalPositions(d_model, max_length or 5000, device=device, dtype=dtype)
    if kind != "learned":
        raise ValueError(f"Embedding: positions is {kind!r}, expected None, 'sinusoidal' or 'learned'")
    if max_length is None:
        raise ValueError("Embedding: max_length is None, expected the number of learned positions")
    return LearnedPositions(d_model, max_length, device, dtype)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al. 2021) of queries and keys on `fastlm.rotary`; has no parameters.

    Args:
        head_dim: size of a head.
        base: the longest wavelength's base; 10000 in the paper, 500000 in Llama 3.
        rotary_dim: how many of a head's elements turn, an even number; all of them if None.
        interleaved: pairs are neighbours, as in the paper, instead of halves, as in Hugging Face's Llama.

    Raises:
        ValueError: if rotary_dim is odd or larger than head_dim.
    """

    def __init__(
        self,
        head_dim: int,
        base: float = 10000.0,
        rotary_dim: int | None = None,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            raise ValueError(f"RotaryEmbedding: rotary_dim is {rotary_dim}, expected an even number up to {head_dim}")
        self.head_dim, self.base = head_dim, base
        self.rotary_dim, self.interleaved = rotary_dim, interleaved

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of `positions` (T,) or (B, T), each (..., T, rotary_dim / 2) in fp32; one pair serves all layers.

        The frequencies are made anew each time: as a buffer they would be rounded by `module.to(torch.bfloat16)`.
        """
        angles = positions[..., None] * rotary_rates(self.rotary_dim, self.base, torch.float64, positions.device)
        return angles.cos().float(), angles.sin().float()

    def forward(
        self, query: Tensor, key: Tensor, positions: Tensor | None = None, start: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Turn `query` and `key`, (B, H, T, head_dim) and (B, Hkv, T, head_dim), by their positions.

        Args:
            positions: (T,) or (B, T); start to start + T - 1 if None.

        Raises:
            ValueError: if shapes or devices disagree.
        """
        if positions is None:
            positions = torch.arange(start, start + query.shape[-2], device=query.device)
        cos, sin = self.angles(positions)
        q, k = (rotary(x, cos, sin, interleaved=self.interleaved) for x in (query, key))
        return q, k

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base}, rotary_dim={self.rotary_dim}, interleaved={self.interleaved}"
