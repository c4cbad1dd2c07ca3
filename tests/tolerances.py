"""The tolerance rule of every parity test; it lives in the package, where `fastlm verify` applies it too."""

from fastlm.verify.tolerance import RATIO_TO_TORCH, assert_as_close_as_torch, atol, max_error

__all__ = ["RATIO_TO_TORCH", "assert_as_close_as_torch", "atol", "max_error"]
