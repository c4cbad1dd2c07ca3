#!/usr/bin/env bash
# PyTorch 2.13 on a CPU: the gradient of an attention row whose additive mask is the dtype's lowest number everywhere.
#
# Such rows are common: a left-padded batch of a Hugging Face decoder has one for each padding token, since its float
# masks hold finfo.min and not -inf. The forward pass gives them the mean of the values, every weight being 1 / S.
#
# Guess, written down first: the backward pass of the fused CPU kernel uses those weights, so that the sum of a row's
# outputs has the gradient 1 / S with respect to every value, as the math backend gives.
# Found: it uses weights of 1. The gradients of such rows are S times too large, in float32 and float64 alike. The
# forward pass agrees with the math backend, so nothing shows unless a loss reaches those rows. What is kept of a row is
# the logarithm of its sum of exponentials, and beside a maximum of finfo.min the logarithm of S is rounded away.
#
# Exits with 1 if PyTorch does something else by now.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

S = 37
torch.manual_seed(0)
print(f"torch {torch.__version__}; one query, {S} keys, a mask of finfo.min everywhere")
as_found = True
for dtype in (torch.float32, torch.float64):
    query = torch.randn(1, 1, 1, 16, dtype=dtype)
    key, value = (torch.randn(1, 1, S, 16, dtype=dtype) for _ in range(2))
    value.requires_grad_()
    mask = torch.full((1, S), torch.finfo(dtype).min, dtype=dtype)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(query, key, value, mask)
            (gradient,) = torch.autograd.grad(out.sum(), value)
        off = (out - value.mean(2, keepdim=True)).abs().max().item()
        low, high = gradient.min().item(), gradient.max().item()
        print(f"{str(dtype)[6:]} {backend.name}: output off the mean by {off:.1e}, dV {low:.6f} to {high:.6f}, 1 / S {1 / S:.6f}")
        expected = 1.0 if backend is SDPBackend.FLASH_ATTENTION else 1 / S
        as_found &= off < 1e-6 and abs(low - expected) < 1e-6 and abs(high - expected) < 1e-6
sys.exit(0 if as_found else "PyTorch behaves differently now")
PYTHON
