"""GPT-2 in plain PyTorch, of nanoGPT's shape: what the engine is measured against.

Its parameters have the names and shapes of `fastlm.models.GPT`, so one state dict serves both. The MLP has GPT-2's
tanh-GELU. `step` decodes with a preallocated cache: the leanest loop that stock operators allow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.models.gpt import GPTConfig

Cache = list[tuple[Tensor, Tensor]]


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None, start: int = 0) -> Tensor:
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).split(C, 2))  # (B, H, T, D)
        if cache is not None:
            for held, new in zip(cache, (k, v), strict=True):
                held[:, :, start : start + T] = new
            k, v = (held[:, :, : start + T] for held in cache)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.attn, self.mlp = Attention(config), MLP(config)

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None, start: int = 0) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, start)
        return x + self.mlp(self.ln_2(x))


class PlainGPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.context_length, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """(B, T) ids -> logits (B, T, V), or the mean loss against `targets` (B, T)."""
        logits = F.linear(self._hidden(tokens), self.wte.weight)
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _hidden(self, tokens: Tensor, cache: Cache | None = None, start: int = 0) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[start : start + tokens.shape[1]]
        for i, block in enumerate(self.h):
            x = block(x, cache[i] if cache else None, start)
        return self.ln_f(x)

    @torch.inference_mode()
    def generate(self, tokens: Tensor, new_tokens: int) -> Tensor:
        """Continue (B, P) prompts greedily; returns the new (B, new_tokens) ids."""
        config, weight = self.config, self.wte.weight
        size = (tokens.shape[0], config.n_head, tokens.shape[1] + new_tokens, config.head_size)
        cache = [(weight.new_empty(size), weight.new_empty(size)) for _ in self.h]
        found, start, unread = [], 0, tokens
        for _ in range(new_tokens):
            hidden = self._hidden(unread, cache, start)[:, -1]
            start += unread.shape[1]
            unread = F.linear(hidden, weight).argmax(-1, keepdim=True)
            found.append(unread)
        return torch.cat(found, 1)
