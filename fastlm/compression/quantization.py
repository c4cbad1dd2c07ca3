"""Weight-only quantization: linear layers that hold 8 or 4 bits a weight, so that decoding reads less.

int8 has one scale an output feature. int4 has one scale for each group of inputs of an output feature, in bf16, and
each scale is the best of a few in the sense of least squares. Activations and sums stay in floating point, as
csrc/cpu/quantized_linear.cpp says, which also has the layouts in words.
"""

from __future__ import annotations

import dataclasses
import json
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core.dispatch import forced_backend, must_trace, needs_grad
from .._core.tensor_file import open_safetensors, parse_json
from .._core.tensor_writer import write_tensors
from ..backends import cpu as _native
from ..backends.cpu import quantized_linear as _kernels
from ..backends.cpu.linear import LINEAR_ROWS
from ..errors import CheckpointError, ConfigError
from ..formats.checkpoint import format_of
from ..formats.filling import blank, fill
from ..formats.load import FORMS, MODELS, Form, described
from ..formats.saving import misfits
from ..models.common.generation import Generation, carry, generation_of
from ..nn.linear import Linear
from ..ops.linear import layer_linear, quantized_kernel_is_chosen

Scheme = Literal["int8", "int4"]
FORMAT = "fastlm-quantized-1"
GROUP_SIZES = (32, 64, 128)
# The largest weight of a group may lie outside the range: clipping it to this fraction often costs less than it saves.
CLIPPED = tuple(1 - i / 32 for i in range(8))
WORD_WEIGHTS, RUN = 4, 8  # weights in a word of 16 bits; words that hold neighbouring weights


def _padded(K: int, group_size: int) -> int:
    """K as the kernel's rows hold it, in weights."""
    unit = 128 if group_size else 32
    return -(-K // unit) * unit


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K) -> (N, K padded to 32) int8 and scale (N,) fp32, with weight = scale * int8 + rounding."""
    wide = weight.detach().float()
    scale = wide.abs().amax(1) / 127
    q = (wide / torch.where(scale > 0, scale, 1.0)[:, None]).round()
    return F.pad(q, (0, _padded(wide.shape[1], 0) - wide.shape[1])).to(torch.int8), scale


def quantize_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """weight (N, K) -> (N, K padded to 128, over 2) uint8 and scale (N, padded K / group_size) bf16."""
    N, K = weight.shape
    groups = F.pad(weight.detach().float(), (0, _padded(K, group_size) - K)).view(N, -1, group_size)
    # The extreme weight maps to -8, the end of the range that has one step more.
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True)) / -8
    best, scale = None, torch.zeros_like(extreme)
    for part in CLIPPED:
        tried = (extreme * part).bfloat16().float()
        error = (_rounded(groups, tried) * tried - groups).square().sum(2, keepdim=True)
        better = torch.ones_like(error, dtype=torch.bool) if best is None else error < best
        scale, best = torch.where(better, tried, scale), error if best is None else torch.where(better, error, best)
    q = (_rounded(groups, scale) + 8).to(torch.int32).view(N, -1, WORD_WEIGHTS, RUN)
    words = sum(q[:, :, i] << (4 * i) for i in range(WORD_WEIGHTS))  # (N, padded K / 32, RUN)
    assert isinstance(words, Tensor)
    pairs = torch.stack([words & 255, words >> 8], -1)  # low byte first
    return pairs.to(torch.uint8).view(N, -1), scale.squeeze(2).bfloat16()


def _rounded(groups: Tensor, scale: Tensor) -> Tensor:
    return (groups / torch.where(scale == 0, 1.0, scale)).round().clamp(-8, 7)


def dequantize(weight: Tensor, scale: Tensor, K: int, group_size: int) -> Tensor:
    """The fp32 weight (N, K) that the quantized one stands for; see `quantize_int8` and `quantize_int4`."""
    N = weight.shape[0]
    if not group_size:
        return (weight.float() * scale[:, None])[:, :K]
    pairs = weight.view(N, -1, RUN, 2).to(torch.int32)
    words = pairs[..., 0] | pairs[..., 1] << 8
    q = torch.stack([words >> (4 * i) & 15 for i in range(WORD_WEIGHTS)], 2).float() - 8
    return (q.view(N, -1, group_size) * scale.float()[:, :, None]).view(N, -1)[:, :K]


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is held in 8 or 4 bits; it cannot be trained.

    Up to 8 rows on the CPU are multiplied with the quantized weight itself; for more, as in reading a prompt, it is
    dequantized into the activations' dtype first.

    Args:
        in_features, out_features: K and N.
        bias: whether there is one, kept in fp32.
        scheme: "int8", one scale an output feature, or "int4", one for each group of inputs.
        group_size: inputs that share a scale under int4: 32, 64 or 128.

    Raises:
        ConfigError: for an unknown scheme or group size.
    """

    qweight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, scheme: Scheme = "int8", group_size: int = 32
    ):
        super().__init__()
        check_scheme(scheme, group_size)
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.group_size = group_size if scheme == "int4" else 0
        self.dtype = torch.float32  # what `weight` is made in
        self.padded = _padded(in_features, self.group_size)
        if self.group_size:
            qweight = torch.zeros(out_features, self.padded // 2, dtype=torch.uint8)
            scale = torch.zeros(out_features, self.padded // self.group_size, dtype=torch.bfloat16)
        else:
            qweight = torch.zeros(out_features, self.padded, dtype=torch.int8)
            scale = torch.zeros(out_features)
        self.register_buffer("qweight", qweight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    @classmethod
    def from_weight(
        cls, weight: Tensor, bias: Tensor | None = None, scheme: Scheme = "int8", group_size: int = 32
    ) -> QuantizedLinear:
        """Quantize weight (N, K) of any floating-point dtype.

        Raises:
            ConfigError: for an unknown scheme or group size, or a weight that is not finite.
        """
        N, K = weight.shape
        if not weight.isfinite().all():
            raise ConfigError("quantize: a weight is not finite")
        layer = cls(K, N, bias is not None, scheme, group_size)
        layer.qweight, layer.scale = (
            quantize_int4(weight, layer.group_size) if layer.group_size else quantize_int8(weight)
        )
        if bias is not None:
            layer.bias = bias.detach().float().clone()
        layer.dtype = weight.dtype
        return layer

    def _apply(self, fn, recurse=True):
        """As of a layer in `dtype`; the buffers follow to a device, but keep the dtypes of their format."""
        held = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for name, before in held.items():
            setattr(self, name, before.to(getattr(self, name).device))
        return self

    @property
    def weight(self) -> Tensor:
        """The weight (N, K) that is meant, rounded to `dtype`: made anew at each look."""
        return self._dequantized(self.dtype)

    def _dequantized(self, dtype: torch.dtype) -> Tensor:
        K = self.in_features
        if self._has_kernel(self.qweight, dtype):
            return _kernels.dequantize(self.qweight, self.scale, K, self.padded, self.group_size, dtype)
        return dequantize(self.qweight, self.scale, K, self.group_size).to(dtype)

    @staticmethod
    def _has_kernel(t: Tensor, dtype: torch.dtype) -> bool:
        if forced_backend() not in (None, "cpu") or _native.missing_reason is not None:
            return False
        return t.is_cpu and dtype in _KERNEL_DTYPES and not must_trace(t)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N), like x.

        Raises:
            ValueError: if x's last dimension is not in_features.
        """
        K = self.in_features
        if x.shape[-1:] != (K,):
            raise ValueError(f"QuantizedLinear: x has shape {tuple(x.shape)}, expected (..., {K})")
        few = K <= x.numel() <= LINEAR_ROWS * K and not needs_grad(x)
        if few and self._has_kernel(x, x.dtype) and quantized_kernel_is_chosen(x):
            held: Any = self._buffers  # nn.Module's __getattr__ takes 0.4 us for each
            return _kernels.quantized_linear_fwd(
                x.contiguous(), held["qweight"], held["scale"], held["bias"], self.padded, self.group_size
            )
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return layer_linear(x, self._dequantized(x.dtype), bias)

    def extra_repr(self) -> str:
        group = f", group_size={self.group_size}" if self.group_size else ""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.scheme}{group}"


_LINEAR: tuple[type, ...] = (nn.Linear, Linear)  # what another subclass is for may be lost with its class
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_scheme(scheme: str, group_size: int) -> None:
    """Raise ConfigError for a scheme or group size that there is not."""
    if scheme not in ("int8", "int4"):
        raise ConfigError(f"quantize: scheme is {scheme!r}, expected 'int8' or 'int4'")
    if scheme == "int4" and group_size not in GROUP_SIZES:
        raise ConfigError(f"quantize: group_size is {group_size}, expected one of {GROUP_SIZES}")


@torch.no_grad()
def quantize(model: nn.Module, scheme: Scheme = "int8", group_size: int = 32) -> nn.Module:
    """Replace a model's linear layers by quantized ones, for decoding with less to read.

    A GPT's output head, which is a third of what GPT-2 reads for a token, is quantized too. Where it was tied to the
    token embedding, the model is untied: tokens are still looked up in the embedding as it was.

    Args:
        model: any module; changed in place. Embeddings, norms and biases keep their dtypes.
        scheme: "int8", one scale an output feature, or "int4", one for each group of inputs.
        group_size: inputs that share a scale under int4: 32, 64 or 128. Smaller is more accurate, and larger.

    Returns:
        The model itself; its quantized layers cannot be trained.

    Raises:
        ConfigError: for an unknown scheme or group size, or a weight that is not finite; the model is then as it was.
    """
    from ..models.gpt import GPT

    check_scheme(scheme, group_size)
    found: list[tuple[nn.Module, str, Any]] = [(parent, name, layer) for parent in model.modules()
             for name, layer in parent.named_children() if type(layer) in _LINEAR]  # fmt: skip
    made = [QuantizedLinear.from_weight(layer.weight, layer.bias, scheme, group_size) for _, _, layer in found]
    if isinstance(model, GPT) and model.config.tie_embeddings:
        head = QuantizedLinear.from_weight(model.wte.weight, None, scheme, group_size)
        model.add_module("lm_head", head.train(model.training))
        model.config = dataclasses.replace(model.config, tie_embeddings=False)
    for (parent, name, _), quantized in zip(found, made, strict=True):
        setattr(parent, name, quantized.train(parent.training))
    return model


def quantized_layers(model: nn.Module) -> list[QuantizedLinear]:
    return [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]


def save_quantized(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write one of fastlm's models, quantized in part or whole, to one safetensors file that `fastlm.load` reads too.

    Raises:
        CheckpointError: if the file cannot be written, or could not be read again; an older one is then untouched.
        ConfigError: if the model is not quantized, or none of fastlm's.
    """

    name = type(model).__name__
    if type(model) not in [kind for kind, _ in MODELS.values()]:
        raise ConfigError(f"save_quantized: the model is a {name}, expected one of {', '.join(MODELS)}")
    layers = quantized_layers(model)
    if not layers:
        raise ConfigError("save_quantized: the model is not quantized; call fastlm.quantize first")
    config: Any = model.config
    about = {"format": FORMAT, "model": name, "config": json.dumps(config.to_dict())}
    about |= {"scheme": layers[-1].scheme, "group_size": str(layers[-1].group_size)}  # each layer's is in its shapes
    about["generation"] = json.dumps(generation_of(model).to_dict())
    state = model.state_dict()
    if problems := misfits(state, _blank(about, state, Path(path)).state_dict()):
        raise CheckpointError(f"{path}: load could not read the model's tensors again: {problems}")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, state, about)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from error


def is_quantized_file(path: str | PathLike[str]) -> bool:
    """Whether `save_quantized` wrote a safetensors file.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    return format_of(Path(path)) == FORMAT


def load_quantized(path: str | PathLike[str]) -> Any:
    """Read what `save_quantized` wrote: a model in evaluation mode, on the CPU.

    Raises:
        CheckpointError: if the file is missing, damaged, or none of these.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: cannot be read: no such file")
    file = open_safetensors(Path(path))
    if file.metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a quantized model of fastlm")
    stored = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in file.tensors.items()}
    model = _blank(file.metadata, stored, file.path)
    if problems := misfits(stored, model.state_dict(), in_file=True):
        raise CheckpointError(f"{path}: its tensors are not those of a quantized model: {problems}")
    fill(model, {name: t.read(None) for name, t in file.tensors.items()})
    if "generation" in file.metadata:
        said = parse_json(file.metadata["generation"].encode(), lambda reason: CheckpointError(f"{path}: {reason}"))
        carry(model, Generation.from_dict(said, str(path)))
    return model.eval()


def _blank(about: dict[str, str], state: dict[str, Tensor], path: Path) -> nn.Module:
    """The model on the meta device that a file's metadata names, quantized where `state` is."""

    def refused(reason: str) -> CheckpointError:
        return CheckpointError(f"{path}: its configuration is not JSON: {reason}")

    settings = parse_json(about.get("config", "").encode(), refused)
    kind, config = described(about.get("model", "GPT"), settings, path)
    model = blank(kind, config, len(state), path)
    for prefix, parent in list(model.named_modules()):
        for name, layer in list(parent.named_children()):
            stem = f"{prefix}.{name}".removeprefix(".")
            if isinstance(layer, nn.Linear) and f"{stem}.qweight" in state:
                quantized = _blank_layer(layer, state[f"{stem}.qweight"], state.get(f"{stem}.scale"))
                quantized.dtype = state["wte.weight"].dtype if "wte.weight" in state else torch.float32
                setattr(parent, name, quantized)
    return model


def _blank_layer(layer: nn.Linear, qweight: Tensor, scale: Tensor | None) -> QuantizedLinear:
    """A layer's quantized form: int4 packs two weights a byte, and has a scale for each group of them."""
    scheme: Scheme = "int4" if qweight.dtype == torch.uint8 else "int8"
    group_size = GROUP_SIZES[0]
    if scheme == "int4" and scale is not None and scale.dim() == 2 and scale.shape[1]:
        fits = [size for size in GROUP_SIZES if _padded(layer.in_features, size) == size * scale.shape[1]]
        group_size = fits[0] if fits else group_size
    with torch.device("meta"):
        return QuantizedLinear(layer.in_features, layer.out_features, layer.bias is not None, scheme, group_size)


FORMS[FORMAT] = Form(lambda model: bool(quantized_layers(model)), load_quantized, save_quantized)
