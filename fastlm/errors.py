"""Errors a user can cause. Each is also the built-in kind that a caller would expect to catch."""


class FastlmError(Exception):
    """Base of fastlm's own errors; the command line prints its message as one line and exits with 1."""


class BackendError(FastlmError, RuntimeError):
    """A forced backend cannot serve the call, or its name is unknown."""


class ConfigError(FastlmError, ValueError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class DataError(FastlmError, ValueError):
    """Text, token files or a tokenizer are missing, damaged, or do not belong together."""


class CheckpointError(FastlmError, ValueError):
    """A checkpoint is missing, damaged, or of another model."""
