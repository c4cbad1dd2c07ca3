"""Layer normalization, alone and fused with the residual addition before it."""

import torch.nn.functional as F


def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    return F.layer_norm(x, normalized_shape, weight, bias, eps)


def add_layer_norm(x, residual, weight=None, bias=None, eps=1e-5, dropout_p=0.0):
    z = residual + F.dropout(x, dropout_p)
    return F.layer_norm(z, z.shape[-1:], weight, bias, eps), z
