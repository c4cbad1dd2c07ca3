"""The one configuration of a training run: defaults, TOML file, checks."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from .._core.files import replace_text
from ..errors import ConfigError, ConfigFileError, shown
from ..runtime import memory_of

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the same parser under its older name
    import tomli as tomllib

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

MAX_THREADS = 1024  # OpenMP ends the process where the system refuses it a thread
MOST_BYTES = 1 << 14  # of a file of settings: two long paths and comments; a name of many dots takes its square
BLOCK_BYTES = 30_000  # of Python objects in a Transformer block, whatever its width

# Where each group of fields starts; only the printed and saved form uses it.
GROUPS = {
    "data": "input and output",
    "batch_size": "data",
    "n_layer": "model",
    "learning_rate": "optimizer",
    "schedule": "schedule",
    "device": "system",
}


@dataclass
class TrainConfig:
    """Every setting of a training run; the same names in TOML, on the command line and in Python.

    Raises:
        ConfigError: on a value of the wrong type or outside its range, naming the field.
    """

    data: str = ""  # folder that `fastlm prepare` wrote, or several of one tokenizer with commas between them
    data_weights: str = ""  # shares of several folders in training, such as 0.7,0.3; empty: by their size
    out: str = "runs/train"  # run folder: checkpoints, metrics, plot
    log_interval: int = 10  # steps between lines of metrics.jsonl
    eval_interval: int = 250  # steps between evaluations, each followed by a checkpoint
    eval_tokens: int = 1_048_576  # validation tokens read by one evaluation; 0 reads the whole split

    batch_size: int = 16  # sequences in one forward pass
    gradient_accumulation: int = 1  # forward passes added up into one step
    context_length: int = 256  # tokens in a sequence
    packing: Literal["stream", "best-fit"] = "stream"  # cut the text as it runs, or fit whole documents together
    separate_documents: bool = False  # tokens attend to their own document alone, from position 0 on
    seed: int = 1337  # decides weights, data order and dropout

    n_layer: int = 6  # Transformer blocks
    n_head: int = 6  # attention heads; divides n_embd
    n_embd: int = 384  # width of the residual stream
    dropout: float = 0.0  # for pretraining 0 is good; a corpus read many times needs 0.1 or more

    learning_rate: float = 1e-3  # the peak, reached after the warm-up
    weight_decay: float = 0.1  # on matrices and embeddings only
    beta1: float = 0.9  # decay of AdamW's mean of gradients
    beta2: float = 0.99  # of its mean of squares; below 0.999 since small batches give few steps
    grad_clip: float = 1.0  # largest global gradient norm; 0 does not clip

    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt"] = "cosine"  # after the warm-up
    warmup_steps: int = 100  # steps of linear rise from 0
    decay_steps: int = 0  # step at which the schedule reaches its minimum; 0: max_steps
    min_lr_ratio: float = 0.1  # floor of the schedule, as a part of learning_rate
    max_steps: int = 5000  # optimizer steps
    max_minutes: float = 0.0  # stops earlier than max_steps, and the schedule follows the clock; 0: no limit
    patience: int = 0  # stop after so many evaluations without a better validation loss; 0: never
    max_bad_steps: int = 5  # skipped steps in a row (loss or gradient not finite) before giving up

    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto takes a GPU where there is one
    dtype: Dtype = "auto"  # of matrix products; weights, norms and the optimizer stay float32
    threads: int = 0  # CPU threads; 0: one a core, within a container's share
    compile: bool = False  # torch.compile the model: slow first step, then faster
    keep_freed_memory: bool = True  # glibc only: reuse freed tensors' pages and never return them

    def __post_init__(self) -> None:
        for name, kind in field_types().items():
            setattr(self, name, _checked(name, getattr(self, name), kind))
        _check_ranges(self)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation * self.context_length

    def to_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(TrainConfig)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Build a configuration from a mapping.

        Raises:
            ConfigError: on an unknown key (with the nearest valid one), a wrong type or a bad value.
        """
        for name in values:
            if name not in field_types():
                raise ConfigError(f"unknown key {shown(name)}{nearest(name, list(field_types()))}")
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> TrainConfig:
        """Read a TOML file of flat `key = value` lines.

        Raises:
            ConfigFileError: if the file is missing, too long, is not TOML, or holds an unknown key or a bad value.
        """
        try:
            with open(path, "rb") as file:
                text = file.read(MOST_BYTES + 1)
        except FileNotFoundError:
            raise ConfigFileError(f"{path} does not exist") from None
        if len(text) > MOST_BYTES:
            raise ConfigFileError(f"{path}: has more than {MOST_BYTES} bytes, too many for a file of settings")
        try:
            values = tomllib.loads(text.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # also an integer of more digits than Python reads
            raise ConfigFileError(f"{path}: not valid TOML: {error}") from None
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigFileError(f"{path}: {error}") from None

    def to_toml(self) -> str:
        """The configuration as TOML, grouped, every field written out."""
        lines = []
        for name, value in self.to_dict().items():
            if name in GROUPS:
                lines += ["", f"# {GROUPS[name]}"]
            # JSON's strings, numbers and booleans are TOML's too, but for a delete character.
            text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            lines.append(f"{name} = {text}")
        return "\n".join(lines[1:]) + "\n"

    def save(self, path: str | Path) -> None:
        replace_text(path, self.to_toml())


@functools.cache
def field_types() -> dict[str, Any]:
    return get_type_hints(TrainConfig)


def nearest(name: str, valid: list[str]) -> str:
    """The tail of an error message that offers the closest valid name, if one is close."""
    close = difflib.get_close_matches(name[:80].replace("-", "_"), valid, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_memory(config: TrainConfig, vocab_size: int, device: torch.device) -> None:
    """Raise ConfigError if the least that the sizes need is more than the machine has, before any of it is made.

    That is 16 bytes a parameter (weight, gradient and AdamW's two moments), the blocks' own objects, and a batch.
    """
    width, tokens = config.n_embd, config.batch_size * (config.context_length + 1)
    parameters = width * (vocab_size + config.context_length + 12 * config.n_layer * width)
    least = 16 * parameters + 4 * tokens * width + (BLOCK_BYTES * config.n_layer if device.type == "cpu" else 0)
    there = memory_of(device)
    if there and least > there:
        sizes = ", ".join(f"{name} = {getattr(config, name)}" for name in ("n_layer", "n_embd", "batch_size"))
        raise ConfigError(
            f"{sizes}, context_length = {config.context_length} and {vocab_size} token ids need at least "
            f"{least / 1e9:.3g} GB, but {device} has {there / 1e9:.3g} GB"
        )


def _checked(name: str, value: Any, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        choices = list(get_args(kind))
        if value not in choices:
            hint = nearest(value, choices) if isinstance(value, str) else ""
            raise ConfigError(f"{name} is {shown(value)}, expected one of {', '.join(choices)}{hint}")
        return value
    # A bool is an int to Python, never to a user; a whole number may stand for a float.
    if type(value) is int and kind in (int, float):
        if value.bit_length() > 64 or (value.bit_length() == 64 and name != "seed"):
            raise ConfigError(f"{name} is {shown(value)}, expected an integer of 64 bits")
        return kind(value)
    if type(value) is not kind:
        raise ConfigError(f"{name} is {shown(value)} ({type(value).__name__}), expected {kind.__name__}")
    if kind is str and ("\0" in value or not _is_unicode(value)):
        raise ConfigError(f"{name} is {shown(value)}, expected text in UTF-8 without NUL")
    return value


def _is_unicode(text: str) -> bool:
    """Whether no byte of a command line or file name was put in as a lone surrogate."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _check_ranges(config: TrainConfig) -> None:
    def require(name: str, ok: bool, wanted: str) -> None:
        if not ok:
            raise ConfigError(f"{name} is {getattr(config, name)!r}, expected {wanted}")

    for name, kind in field_types().items():
        if kind is float:
            require(name, math.isfinite(getattr(config, name)), "a finite number")
    for name in _AT_LEAST_ONE:
        require(name, getattr(config, name) >= 1, "at least 1")
    for name in _AT_LEAST_ZERO:
        require(name, getattr(config, name) >= 0, "at least 0")
    for name in ("dropout", "beta1", "beta2"):
        require(name, 0 <= getattr(config, name) < 1, "at least 0 and below 1")
    require("learning_rate", config.learning_rate > 0, "more than 0")
    require("min_lr_ratio", 0 <= config.min_lr_ratio <= 1, "from 0 to 1")
    require("threads", config.threads <= MAX_THREADS, f"at most {MAX_THREADS}")
    require("n_head", config.n_embd % config.n_head == 0, f"a divisor of n_embd = {config.n_embd}")


_AT_LEAST_ONE = (
    "log_interval",
    "eval_interval",
    "batch_size",
    "gradient_accumulation",
    "context_length",
    "n_layer",
    "n_head",
    "n_embd",
    "max_steps",
    "max_bad_steps",
)
_AT_LEAST_ZERO = (
    "eval_tokens",
    "seed",
    "weight_decay",
    "grad_clip",
    "warmup_steps",
    "decay_steps",
    "max_minutes",
    "patience",
    "threads",
)
