"""The one configuration of a training run: defaults, TOML file, checks."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

from .._core.files import replace_text
from ..errors import ConfigError, ConfigFileError, nearest, shown
from ..objectives.common.models import MODELS
from ..objectives.registry import checked, objectives, settings_of

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the same parser under its older name
    import tomli as tomllib

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

MAX_THREADS = 1024  # OpenMP ends the process where the system refuses it a thread
MOST_BYTES = 1 << 14  # of a file of settings: two long paths and comments; a name of many dots takes its square

# Where each group of fields starts; only the printed and saved form uses it.
GROUPS = {
    "objective": "what is trained, and for what",
    "data": "input and output",
    "text_column": "tables",
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

    objective: str = "causal"  # what the model is trained for
    model: str = ""  # what is trained; empty: the objective's own, or what `init` holds
    init: str = ""  # begin with the weights and tokenizer of a Hugging Face folder, GGUF file or run
    new_head: bool = False  # drop a head of `init` that does not fit the objective
    tokenizer: str = ""  # for tables: file or folder with one; empty: that of `init`
    metric: str = ""  # number of an evaluation that decides which checkpoint is the best; empty: the objective's own

    data: str = ""  # folders that `fastlm prepare` wrote, of one tokenizer, with commas between them; or tables
    data_weights: str = ""  # shares of several folders in training, such as 0.7,0.3; empty: by their size
    out: str = "runs/train"  # run folder: checkpoints, metrics, plot
    export: str = ""  # Hugging Face folder that the best model is written to at the end
    log_interval: int = 10  # steps between lines of metrics.jsonl
    eval_interval: int = 250  # steps between evaluations, each followed by a checkpoint
    eval_tokens: int = 1_048_576  # validation tokens read by one evaluation; 0 reads the whole split

    text_column: str = "text"  # column or key of a table that holds the text
    pair_column: str = ""  # that holds a second text, which belongs to the first
    label_column: str = "label"  # that holds what is to be predicted
    header: bool = True  # the first row of CSV names the columns; where none does, they are called 1, 2 and so on
    validation: str = ""  # table of held-out examples; empty: a share of the rows
    validation_share: float = 0.1  # of the rows, by a hash of their text
    truncation: Literal["end", "start", "middle", "drop", "refuse"] = "end"  # where a longer text is cut, or else

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
    warmup_share: float = 0.0  # of max_steps, which then says warmup_steps; 0: as warmup_steps says
    decay_steps: int = 0  # step at which the schedule reaches its minimum; 0: max_steps
    min_lr_ratio: float = 0.1  # floor of the schedule, as a part of learning_rate
    max_steps: int = 5000  # optimizer steps
    epochs: float = 0.0  # passes over the examples, which then say max_steps; 0: as max_steps says
    max_minutes: float = 0.0  # stops earlier than max_steps, and the schedule follows the clock; 0: no limit
    patience: int = 0  # stop after so many evaluations without a better validation loss; 0: never
    max_bad_steps: int = 5  # skipped steps in a row (loss or gradient not finite) before giving up

    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto takes a GPU where there is one
    dtype: Dtype = "auto"  # of matrix products; weights, norms and the optimizer stay float32
    threads: int = 0  # CPU threads; 0: one a core, within a container's share
    compile: bool = False  # torch.compile the model: slow first step, then faster
    keep_freed_memory: bool = True  # glibc only: reuse freed tensors' pages and never return them

    options: Any = None  # the objective's own settings: an instance of its dataclass, a mapping, or None for defaults

    def __post_init__(self) -> None:
        for name, kind in field_types().items():
            setattr(self, name, checked(name, getattr(self, name), kind))
        self.options = settings_of(self.objective, self.options)
        _check_ranges(self)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation * self.context_length

    def to_dict(self) -> dict[str, Any]:
        """Every setting by name, and the objective's own, if it has any, as a table of the objective's name."""
        own = dataclasses.asdict(self.options)
        return {name: getattr(self, name) for name in field_types()} | ({self.objective: own} if own else {})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Build a configuration from a mapping.

        Raises:
            ConfigError: on an unknown key (with the nearest valid one), a wrong type or a bad value.
        """
        objective = values.get("objective", cls.objective)
        flat = {name: value for name, value in values.items() if name != objective}
        for name in flat:
            if name in field_types():
                continue
            if name in objectives() and isinstance(flat[name], dict):
                raise ConfigError(f"there are settings of {name}, but objective is {objective!r}")
            raise ConfigError(f"unknown key {shown(name)}{nearest(name, [*field_types(), *objectives()])}")
        return cls(**flat, options=values.get(objective) if isinstance(objective, str) else None)

    @classmethod
    def load(cls, path: str | Path, defaults: TrainConfig | None = None) -> TrainConfig:
        """Read a TOML file of `key = value` lines, and a table with the settings of the objective.

        Args:
            defaults: what is not in the file.

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
        before = {} if defaults is None else defaults.to_dict()
        if defaults is not None and values.get("objective", defaults.objective) != defaults.objective:
            before.pop(defaults.objective, None)
        try:
            return cls.from_dict(before | values)
        except ConfigError as error:
            raise ConfigFileError(f"{path}: {error}") from None

    def to_toml(self) -> str:
        """The configuration as TOML, grouped, every field written out."""
        lines = []
        for name in field_types():
            if name in GROUPS:
                lines += ["", f"# {GROUPS[name]}"]
            lines.append(f"{name} = {_toml(getattr(self, name))}")
        own = dataclasses.asdict(self.options)
        lines += ["", f"[{self.objective}]"] if own else []
        lines += [f"{name} = {_toml(value)}" for name, value in own.items()]
        return "\n".join(lines[1:]) + "\n"

    def save(self, path: str | Path) -> None:
        replace_text(path, self.to_toml())


@functools.cache
def field_types() -> dict[str, Any]:
    """The type of each setting, but for `options`."""
    return {name: kind for name, kind in get_type_hints(TrainConfig).items() if name != "options"}


def _toml(value: Any) -> str:
    """JSON's strings, numbers and booleans are TOML's too, but for a delete character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


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
    require("warmup_share", 0 <= config.warmup_share < 1, "at least 0 and below 1")
    require("validation_share", 0 <= config.validation_share < 1, "at least 0 and below 1")
    if config.model not in ("", *MODELS):
        hint = nearest(config.model, list(MODELS))
        raise ConfigError(f"model is {shown(config.model)}, expected one of {', '.join(MODELS)}{hint}")
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
    "epochs",
    "patience",
    "threads",
)
