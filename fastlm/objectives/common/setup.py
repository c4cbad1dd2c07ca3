"""What an objective makes its task of: the run's settings, and the model and tokenizer that it begins with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...data import Tokenizer
from ...errors import ConfigError, shown
from ...formats.load import load, resolve
from ...formats.tokenizer import check_trained_with, tokenizer_of
from ..registry import Registered, registered
from .models import adapted, check_memory, fresh, kind_of

if TYPE_CHECKING:
    from ...training.config import TrainConfig
    from .task import Task


def make_task(config: TrainConfig, device: torch.device) -> Task:
    """What the settings name.

    Raises:
        ConfigError, DataError, CheckpointError: for settings, data or a file to begin with that do not fit.
    """
    setup = Setup(config, device)
    return setup.objective.task(setup)


class Setup:
    """A run that is being made.

    Args:
        config: the settings.
        device: where it will be trained; what is made here is on the CPU.

    Attributes:
        objective: what the settings name.
        settings: its own.
        kind: the name of the model, in `MODELS`.

    Raises:
        ConfigError: for a model that the objective cannot train.
    """

    def __init__(self, config: TrainConfig, device: torch.device):
        self.config, self.device = config, device
        self.objective: Registered = registered(config.objective)
        self.settings: Any = config.options
        self.kind = self._kind()

    def _kind(self) -> str:
        asked, fit = self.config.model, self.objective.models
        wanted = f"{' or '.join(fit)} for objective {self.objective.name}"
        if asked and asked not in fit:
            raise ConfigError(f"model is {shown(asked)}, expected {wanted}")
        if not self.config.init:
            return asked or fit[0]
        found = kind_of(self.loaded)
        name = type(self.loaded).__name__
        if found not in fit:
            raise ConfigError(f"{self.config.init}: holds a {name}, expected {wanted}")
        if asked and asked != found:
            raise ConfigError(f"{self.config.init}: holds a {name}, but model is {asked!r}")
        return found

    @functools.cached_property
    def loaded(self) -> Any:
        """The model that `init` names, as the file has it."""
        return load(self.config.init, check_tensors=True)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The one of `init`, or that `tokenizer` names.

        Raises:
            ConfigError: if neither is given, or one with more ids than the model of `init` has.
        """
        if self.config.tokenizer:
            found = Tokenizer.load(self.config.tokenizer)
        elif self.config.init:
            found = self.init_tokenizer()
        else:
            raise ConfigError("tokenizer names none, and there is no init that has one: give --init or --tokenizer")
        self.check_vocabulary(found.vocab_size, self.config.tokenizer or self.config.init)
        return found

    def init_tokenizer(self) -> Tokenizer:
        """The tokenizer that lies with the model of `init`."""
        path = resolve(self.config.init)
        found = tokenizer_of(path)
        check_trained_with(path, found)
        return found

    def check_vocabulary(self, vocab_size: int, source: str) -> None:
        """Raise ConfigError for a tokenizer with more ids than the model of `init` has."""
        if self.config.init and vocab_size > (size := self.loaded.config.vocab_size):
            raise ConfigError(f"{source}: its tokenizer has {vocab_size} ids, but {self.config.init} has {size}")

    def check_memory(self, vocab_size: int) -> None:
        """Raise ConfigError if a model of the settings' sizes needs more memory than the device has."""
        if not self.config.init:
            check_memory(self.config, vocab_size, self.device)

    @property
    def most_tokens(self) -> int:
        """The longest example: `context_length`, or less where the model of `init` has a shorter context."""
        asked = self.config.context_length
        return min(asked, self.loaded.config.context_length) if self.config.init else asked

    def model(self, vocab_size: int, **fields: Any) -> nn.Module:
        """The model to train: of the settings' sizes, drawn anew, or of the weights of `init`.

        Args:
            vocab_size: of the tokenizer.
            fields: of the model's configuration, which the objective decides: the head, its classes.

        Raises:
            ConfigError: if `init` has another head, unless `new_head`.
        """
        if not self.config.init:
            return fresh(self.kind, self.config, vocab_size, fields)
        return adapted(self.loaded, fields, self.config.dropout, self.config.init, self.config.new_head)


def data_folders(data: str) -> list[str]:
    """The folders or files that a setting names, with commas between them; a name may itself hold some."""
    return [data] if data and Path(data).exists() else [name for name in data.split(",") if name]


def missing(data: str) -> Sequence[str]:
    """Those of them that are not there, but for patterns."""
    return [name for name in data_folders(data) if not Path(name).exists() and not set("*?[") & set(name)]
