"""Errors a user can cause. Each is also the built-in kind that a caller would expect to catch."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any


class FastlmError(Exception):
    """Base of fastlm's own errors; the command line prints its message as one line and exits with 1."""


class BackendError(FastlmError, RuntimeError):
    """A forced backend cannot serve the call, or its name is unknown."""


class ConfigError(FastlmError, ValueError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class ConfigFileError(ConfigError):
    """A file of settings cannot be read or holds a bad one; names are spelled as in the file."""


class DataError(FastlmError, ValueError):
    """Text, token files or a tokenizer are missing, damaged, or do not belong together."""


class CheckpointError(FastlmError, ValueError):
    """A checkpoint is missing, damaged, or of another model."""


def shown(value: Any, write: Callable[[Any], str] = repr) -> str:
    """A value for an error message, cut where it is long."""
    if isinstance(value, int) and value.bit_length() > 64:  # with thousands of digits it has no text in Python
        return f"an integer of {value.bit_length()} bits"
    try:
        text = write(value)
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"
    text = text if len(text) <= 80 else f"{text[:77]}..."
    return text if text.isprintable() else text.encode("unicode_escape").decode()  # one line, whatever it is


def nearest(name: str, valid: Sequence[str]) -> str:
    """The tail of an error message that offers the closest valid name, if one is close."""
    close = difflib.get_close_matches(name[:80].replace("-", "_"), valid, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
