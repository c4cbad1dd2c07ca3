"""What the tests against transformers share."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

# Logits and gradients in these tests are of order 1 to 10; 1e-4 is what the project promises in fp32.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def perturbed(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move every parameter, so that no bias is 0, no norm an identity and no branch negligible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # sinusoidal positions are constants
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def reload_as_theirs(kind, folder):
    """Load a folder of ours with transformers, which must find each tensor that it wants and no other."""
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def check_gradients(ours: torch.nn.Module, theirs: torch.nn.Module, parts: dict[str, tuple[str, ...]]) -> None:
    """Compare every gradient of ours with theirs; `parts` stack theirs where one of ours is several of them."""
    compared = set()
    for name, parameter in ours.named_parameters():
        names = parts[name]
        expected = torch.cat([theirs.get_parameter(each).grad for each in names])
        torch.testing.assert_close(parameter.grad, expected, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
        compared |= {id(theirs.get_parameter(each)) for each in names}
    assert compared == {id(p) for p in theirs.parameters() if p.grad is not None}
