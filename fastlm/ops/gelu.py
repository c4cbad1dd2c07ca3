"""GELU, alone and fused with the bias addition before it and the dropout after it."""

import torch.nn.functional as F


def gelu(x, approximate="none"):
    return F.gelu(x, approximate=approximate)


def bias_gelu(x, bias, approximate="none", dropout_p=0.0):
    return F.dropout(F.gelu(x + bias, approximate=approximate), dropout_p)
