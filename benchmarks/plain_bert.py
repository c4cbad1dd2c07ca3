"""BERT as one writes it with torch.nn alone: PyTorch's own encoder layers, padding masked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.models.bert import BERTConfig

RENAMED = {
    "attention.qkv.weight": "self_attn.in_proj_weight",
    "attention.qkv.bias": "self_attn.in_proj_bias",
    "attention.out": "self_attn.out_proj",
    "attention_norm": "norm1",
    "mlp_norm": "norm2",
    "up": "linear1",
    "down": "linear2",
}


class PlainBERT(nn.Module):
    """Computes what `fastlm.models.BERT` with a masked-lm head computes, from the same weights."""

    def __init__(self, config: BERTConfig):
        super().__init__()
        C = config.n_embd
        self.wte, self.wpe = nn.Embedding(config.vocab_size, C), nn.Embedding(config.context_length, C)
        self.wse = nn.Embedding(config.n_token_type, C)
        self.embedding_norm = nn.LayerNorm(C, config.layer_norm_eps)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(C, config.n_head, config.n_inner, 0.0, F.gelu, config.layer_norm_eps, True)
            for _ in range(config.n_layer)
        )
        self.dense, self.norm = nn.Linear(C, C), nn.LayerNorm(C, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def load(self, state: dict[str, Tensor]) -> PlainBERT:
        """Take a fastlm BERT's state dict."""
        self.load_state_dict({_renamed(name): tensor for name, tensor in state.items()})
        return self

    def hidden(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]] + self.wse.weight[0]
        x = self.embedding_norm(x)
        padding = None if mask is None else mask == 0
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return x

    def loss(self, tokens: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        x = self.norm(F.gelu(self.dense(self.hidden(tokens, mask))))
        return F.cross_entropy(F.linear(x, self.wte.weight, self.bias).flatten(0, 1), targets.flatten())


def _renamed(name: str) -> str:
    name = name.removeprefix("masked_lm.")
    if not name.startswith("layers."):
        return name
    _, layer, inner = name.split(".", 2)
    for ours, theirs in RENAMED.items():
        if inner.startswith(f"{ours}.") or inner == ours:
            return f"layers.{layer}.{theirs}{inner.removeprefix(ours)}"
    return name
