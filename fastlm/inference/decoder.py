"""Decoding a GPT on the CPU with one native call a token.

The module path costs a dozen Python calls a layer, as long as reading the layer's weights takes. `Decoder` hands the
addresses of all weights and buffers to csrc/cpu/decode.cpp once, which then runs every layer by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .._core.dispatch import forced_backend
from ..backends import cpu as _native
from ..backends.cpu.decode import decode_step, huge_pages
from ..backends.cpu.linear import LINEAR_ROWS
from ..compression.quantization import QuantizedLinear
from ..models.common.cache import KVCache
from ..nn._plain import plain, redirected

if TYPE_CHECKING:
    from ..models.gpt import GPT

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HELD = (*DTYPES, torch.int8, torch.uint8)
# Copying the weights into huge pages is repaid by about this many steps.
STEPS_WORTH_PACKING = 24
ALIGNMENT = 64
QUANTIZED = 4  # kQuantized of decode.h, beside the codes of dtypes


def unsupported(model: nn.Module, batch_size: int) -> str | None:
    """Why this model cannot be decoded by `Decoder`, or None where it can."""
    from ..models.gpt import GPT

    if type(model) is not GPT:
        return f"the model is a {type(model).__name__}, not a GPT"
    if _native.missing_reason:
        return _native.missing_reason
    if forced_backend() not in (None, "cpu"):
        return f"the {forced_backend()} backend is forced"
    if not 1 <= batch_size <= LINEAR_ROWS:
        return f"there are {batch_size} rows, its kernels take 1 to {LINEAR_ROWS}"
    weight = model.wte.weight
    if weight.device.type != "cpu" or weight.dtype not in DTYPES:
        return f"the weights are {weight.dtype} on {weight.device}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    return _changed(model)


def _changed(model: GPT) -> str | None:
    """What only the modules' own calls respect: hooks, foreign layers, dropout, tensors of other kinds."""
    from ..models import gpt

    own: tuple[type, ...] = (nn.Linear, QuantizedLinear, nn.LayerNorm, nn.Embedding, nn.ModuleList)
    own = (*own, gpt.GPT, gpt.Block, gpt.CausalSelfAttention, gpt.MLP)
    for name, module in model.named_modules():
        if type(module) not in own or redirected(module):
            return f"{name or 'the model'} is a {type(module).__name__} of its own"
        if not plain(module, type(module)):
            return f"{name or 'the model'} has a hook or a parameter of a tensor subclass"
        if module.training:
            return f"{name or 'the model'} is in training mode"
        if isinstance(module, nn.LayerNorm) and module.eps != model.ln_f.eps:
            return f"{name} has an eps of its own"
    for name, t in model.state_dict().items():
        if type(t) is not Tensor or t.device.type != "cpu" or not t.is_contiguous() or t.dtype not in HELD:
            return f"{name} is not a contiguous tensor of the CPU in a dtype of the kernels"
    return None


class Decoder:
    """Runs single steps of a GPT, for 1 to 8 rows, into the model's own cache.

    Weights are read where they are, or copied into huge pages of memory, from which a GPT-2 124M in bf16 was decoded
    1.5 times as fast. They must not change while the decoder lives. The memory of the copy stays with the model for
    its next decoder; a decoder made after the weights have changed thus changes an older one's too.

    Args:
        model: a GPT for which `unsupported` returns None.
        cache: to read and append to; its length may grow by other means between steps.
        pack: whether to copy the weights.
    """

    def __init__(self, model: GPT, cache: KVCache, pack: bool = True):
        config = model.config
        self.model, self.cache = model, cache
        self._held: list[Tensor] = []  # what the table of addresses points at
        self._arena = _Arena(_memory_for(model) if pack else None)
        B, C, H = cache.keys.shape[1], config.n_embd, config.n_head
        hidden = config.n_inner or 4 * C
        self.x = torch.empty(B, C)
        self.logits = torch.empty(B, config.vocab_size)
        layers = self._table([self._layer(block, i) for i, block in enumerate(model.h)])
        self._model = self._table([[
            B, C, H, hidden, cache.max_length, _native.TYPE_CODE[cache.keys.dtype], len(model.h), layers,
            *self._norm(model.ln_f), *self._head(model), self.x.data_ptr(),
            *(self._buffer(B, width) for width in (C, max(3 * C, hidden))), self.logits.data_ptr(),
            self._buffer(2 * B, C, cache.keys.dtype),
        ]])  # fmt: skip

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) fp32 that follow `tokens` (B,), which are valid until the next step."""
        model, cache = self.model, self.cache
        position = cache.length
        if position >= cache.max_length:
            raise ValueError(f"KVCache: {position} + 1 tokens exceed its max_length of {cache.max_length}")
        torch.add(model.wte.weight[tokens], model.wpe.weight[position], out=self.x)
        decode_step(self._model, position, model.ln_f.eps)
        cache.advance(1)
        return self.logits

    def _layer(self, block: Any, i: int) -> list[int]:
        keys, values = self.cache.keys[i], self.cache.values[i]
        return [
            *self._norm(block.ln_1), *self._linear(block.attn.c_attn), *self._linear(block.attn.c_proj),
            *self._norm(block.ln_2), *self._linear(block.mlp.c_fc), *self._linear(block.mlp.c_proj),
            keys.data_ptr(), values.data_ptr(),
        ]  # fmt: skip

    def _head(self, model: GPT) -> list[int]:
        head = None if model.config.tie_embeddings else model.lm_head
        if head is not None:
            return self._linear(head)
        weight = model.wte.weight
        return [self._weight(weight), 0, 0, *weight.shape, weight.shape[1], _native.TYPE_CODE[weight.dtype], 0]

    def _norm(self, norm: nn.LayerNorm) -> list[int]:
        return [self._fp32(norm.weight), self._fp32(norm.bias)]

    def _linear(self, layer: nn.Linear | QuantizedLinear) -> list[int]:
        sizes = [layer.out_features, layer.in_features]
        if isinstance(layer, QuantizedLinear):
            data = [self._weight(layer.qweight), self._weight(layer.scale), self._fp32(layer.bias)]
            return [*data, *sizes, layer.padded, QUANTIZED, layer.group_size]
        weight = layer.weight
        return [self._weight(weight), 0, self._fp32(layer.bias), *sizes, sizes[1], _native.TYPE_CODE[weight.dtype], 0]

    def _weight(self, weight: Tensor) -> int:
        return self._hold(self._arena.copy(weight.detach()))

    def _fp32(self, t: Tensor | None) -> int:
        return 0 if t is None else self._hold(t.detach().float())

    def _buffer(self, *size: Any) -> int:
        dtype = size[-1] if isinstance(size[-1], torch.dtype) else torch.float32
        return self._hold(torch.zeros([n for n in size if isinstance(n, int)], dtype=dtype))

    def _table(self, rows: list[list[int]]) -> int:
        return self._hold(torch.tensor(rows, dtype=torch.int64))

    def _hold(self, t: Tensor) -> int:
        self._held.append(t)
        return t.data_ptr()


def _weights(model: GPT) -> list[Tensor]:
    """The tensors whose reading takes the time."""
    found = [model.wte.weight] if model.config.tie_embeddings else []
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            found += [module.qweight, module.scale]
        elif isinstance(module, nn.Linear):
            found.append(module.weight)
    return found


def _memory_for(model: GPT) -> Tensor:
    """Memory for copies of a model's weights: the same one as long as the model lives, since new pages cost more
    than the copying."""
    size = sum(-(-weight.nbytes // ALIGNMENT) * ALIGNMENT for weight in _weights(model))
    memory = _MEMORY.get(model)
    if memory is None or memory.numel() < size:
        with torch.inference_mode(False):  # it outlives the mode of this call
            memory = _MEMORY[model] = huge_pages(size)
    return memory


_MEMORY: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


class _Arena:
    """Copies of tensors, laid into one piece of memory one after the other."""

    def __init__(self, memory: Tensor | None):
        self.memory, self.used = memory, 0

    def copy(self, t: Tensor) -> Tensor:
        """A copy of `t`, or `t` itself where there is no memory."""
        if self.memory is None:
            return t
        place = self.memory[self.used : self.used + t.nbytes].view(t.dtype).view(t.shape)
        self.used += -(-t.nbytes // ALIGNMENT) * ALIGNMENT
        return place.copy_(t)
