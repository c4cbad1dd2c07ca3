"""Forwards for modules of other libraries: what each computes, on fastlm's ops.

A forward is made from the class that it replaces, to which it hands a call that it does not serve: a replaced
submodule, a hook on one that is fused, a mixture of dtypes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import nn as ours
from .._core.dispatch import needs_grad
from ..nn._fused import add_norm, linear_gelu
from ..nn._plain import plain
from ..ops._thresholds import SMALL_GATE
from ..ops.gelu import bias_gelu, gelu
from ..ops.linear import layer_linear
from ..ops.rms_norm import rms_norm
from ..ops.swiglu import swiglu
from . import templates

Forward = Callable[..., Tensor]


def eps_of(module: nn.Module) -> float | None:
    """The epsilon of a normalization, whatever it is called there."""
    attributes = module.__dict__  # a name that getattr does not find costs 1 us
    for name in ("variance_epsilon", "eps", "epsilon", "norm_eps"):
        if isinstance(attributes.get(name), float):
            return attributes[name]
    return None


def _rms_norm(original: Any) -> Forward:
    """weight * x / rms(x), as in Llama, Qwen and T5."""

    def forward(self, hidden_states):
        weight = self._parameters.get("weight")  # not there if it is parametrized, and to be computed once
        if weight is None or hidden_states.dtype is not weight.dtype:  # the result's dtype is the library's affair
            return original.forward(self, hidden_states)
        return rms_norm(hidden_states, hidden_states.shape[-1], weight, eps_of(self))

    return forward


def _rms_norm_offset(original: Any) -> Forward:
    """(1 + weight) * x / rms(x), as in Gemma."""

    def forward(self, x):
        return rms_norm(x, x.shape[-1], 1.0 + self.weight.float(), eps_of(self))

    return forward


def _gelu(form: str) -> Callable[[Any], Forward]:
    def make(original: Any) -> Forward:
        def forward(self, input):
            return gelu(input, form)

        return forward

    return make


def gelu_form(activation: Any) -> str | None:
    """GELU's `approximate` for an activation module that may be read instead of called; None for another."""
    if plain(activation, ours.GELU):
        return activation.approximate
    kind = _kind(activation)
    if kind not in ("gelu_none", "gelu_tanh") or not plain(activation, type(activation)):
        return None
    return kind.removeprefix("gelu_")


def _kind(module: Any) -> str:
    """What `accelerate` made of the module's very class, "" for what it did not."""
    return vars(type(module)).get("_fastlm_kind", "")


def _residual_norm(original: Any) -> Forward:
    """LayerNorm(dropout(dense(x)) + residual): the end of BERT's sublayers."""

    def forward(self, hidden_states, input_tensor):
        if hidden_states.dtype != input_tensor.dtype:
            return original.forward(self, hidden_states, input_tensor)
        return add_norm(self.dense(hidden_states), input_tensor, self.LayerNorm, self.dropout)[0]

    return forward


def _linear_gelu(original: Any) -> Forward:
    """gelu(dense(x)): BERT's intermediate layer."""

    def forward(self, hidden_states):
        form = gelu_form(self.intermediate_act_fn)
        if form is None:
            return original.forward(self, hidden_states)
        return linear_gelu(hidden_states, self.dense, form)

    return forward


def _feed_forward(original: Any) -> Forward:
    """fc2(gelu(fc1(x))): ViT and CLIP."""

    def forward(self, hidden_states):
        form = gelu_form(self.activation_fn)
        if form is None:
            return original.forward(self, hidden_states)
        return self.fc2(linear_gelu(hidden_states, self.fc1, form))

    return forward


def _timm_mlp(original: Any) -> Forward:
    """drop2(fc2(norm(drop1(gelu(fc1(x)))))): timm."""

    def forward(self, x):
        form, drop = gelu_form(self.act), self.drop1
        if form is None or not plain(drop, nn.Dropout):
            return original.forward(self, x)
        hidden = linear_gelu(x, self.fc1, form, drop.p if drop.training else 0.0)
        return self.drop2(self.fc2(self.norm(hidden)))

    return forward


def _conv1d_mlp(original: Any) -> Forward:
    """dropout(c_proj(gelu(c_fc(x)))), with weights stored (in, out): GPT-2."""

    def forward(self, hidden_states):
        form, c_fc = gelu_form(self.act), self.c_fc
        if form is None or _kind(c_fc) != "conv1d" or not plain(c_fc, type(c_fc)):
            return original.forward(self, hidden_states)
        hidden = bias_gelu(layer_linear(hidden_states, c_fc.weight.t()), c_fc.bias, form)
        return self.dropout(self.c_proj(hidden))

    return forward


def _conv1d(original: Any) -> Forward:
    """x weight + bias, with the weight stored (in, out): GPT-2's linear layers."""

    def forward(self, x):
        return layer_linear(x, self.weight.t(), self.bias)

    return forward


def _gated(original: Any) -> Forward:
    """down_proj(silu(gate_proj(x)) * up_proj(x)): Llama, Qwen, Mistral."""

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        short = gate.numel() < SMALL_GATE and not needs_grad(gate, up)
        if short or not _is_silu(self) or not plain(self.act_fn, type(self.act_fn)) or gate.dtype != up.dtype:
            return self.down_proj(self.act_fn(gate) * up)
        return self.down_proj(swiglu(gate, up))

    return forward


def _unpadded(original: Any) -> Forward:
    from .unpad import unpadded_forward

    return unpadded_forward(original)


FORWARDS: dict[str, Callable[[Any], Forward]] = {
    "rms_norm": _rms_norm,
    "rms_norm_offset": _rms_norm_offset,
    "gelu_none": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "residual_norm": _residual_norm,
    "linear_gelu": _linear_gelu,
    "feed_forward": _feed_forward,
    "timm_mlp": _timm_mlp,
    "conv1d": _conv1d,
    "conv1d_mlp": _conv1d_mlp,
    "gated": _gated,
    "unpadded": _unpadded,
}

# Encoders that hand (hidden_states, attention_mask) and keyword arguments on to their layers.
ENCODERS = ("BertEncoder", "RobertaEncoder", "XLMRobertaEncoder", "CamembertEncoder", "ElectraEncoder")


def _is_silu(module: nn.Module) -> bool:
    return type(module.act_fn) is nn.SiLU or type(module.act_fn).__name__ == "SiLUActivation"


def _gelu_in(name: str) -> Callable[[nn.Module], bool]:
    return lambda module: gelu_form(getattr(module, name)) is not None


def _always(module: nn.Module) -> bool:
    return True


class Block(NamedTuple):
    """A forward known by its instructions: the template's, and a condition on the module's parts."""

    kind: str
    template: Callable
    label: str
    fits: Callable[[nn.Module], bool] = _always


BLOCKS = (
    Block("residual_norm", templates.residual_norm, "fastlm.add_layer_norm"),
    Block("linear_gelu", templates.linear_gelu, "fastlm.bias_gelu", _gelu_in("intermediate_act_fn")),
    Block("feed_forward", templates.feed_forward, "fastlm.bias_gelu", _gelu_in("activation_fn")),
    Block("timm_mlp", templates.timm_mlp, "fastlm.bias_gelu", _gelu_in("act")),
    Block("conv1d", templates.conv1d, "fastlm.nn.Linear's product"),
    Block("conv1d_mlp", templates.conv1d_mlp, "fastlm.bias_gelu", _gelu_in("act")),
    Block("gated", templates.gated, "fastlm.swiglu", _is_silu),
)
