"""`fastlm train DATA --out RUN`: train a model for an objective, on prepared text or on tables."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..errors import CheckpointError, ConfigError
from ..objectives import objectives
from ..objectives.common.models import MODELS
from ..runtime import keep_freed_memory
from ..training.config import TrainConfig, field_types
from ..training.loop import train
from ..training.progress import ConsoleReporter, clock
from ..training.resume import check_objective
from ..training.state import TrainResult
from . import flags


@dataclass
class Arguments(TrainConfig):
    """Train a model for an objective.

    Settings come from --config, a TOML file of `name = value` lines; flags win over it. With --resume
    they come from the run's own config.toml, and the data folder need not be named, unless it has moved. A decay
    without --decay-steps ends at --max-steps, so that a larger one raises the learning rate of a resumed run.
    """

    data: Annotated[str, tyro.conf.Positional] = ""  # folder that `fastlm prepare` wrote, or a table
    config: str = ""  # TOML file with settings
    resume: bool = False  # continue the run in --out from its last checkpoint
    overwrite: bool = False  # start afresh in a run folder that holds a checkpoint, and replace an earlier export
    options: Annotated[Any, tyro.conf.Suppress] = None  # which are flags of their own

    def __post_init__(self) -> None:
        """Left to the TrainConfig that `main` makes, whose errors tyro would dress up."""


def with_objectives(kind: type[Arguments]) -> type[Arguments]:
    """Such arguments with every objective's settings, and the choices of objective and model in the help."""
    known = objectives()
    summaries = "; ".join(f"{name}: {each.summary}" for name, each in known.items())
    choices = {
        "objective": tyro.conf.arg(metavar=_choices(known), help=f"what the model is trained for: {summaries}"),
        "model": tyro.conf.arg(metavar=_choices(MODELS)),
    }
    fields: list[tuple[str, Any, Any]] = [
        (name, Annotated[str, note], getattr(kind, name)) for name, note in choices.items()
    ]
    for name, each in known.items():
        if dataclasses.fields(each.settings):
            fields.append((name, each.settings, dataclasses.field(default_factory=each.settings)))
    made = dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,))
    made.__module__, made.__doc__ = kind.__module__, kind.__doc__
    return made


def _choices(names: Iterable[str]) -> str:
    return f"{{{','.join(names)}}}"


Arguments = with_objectives(Arguments)  # type: ignore[misc]


def main(argv: list[str]) -> int:
    """Run the verb. Returns 0, or 130 after Ctrl-C, when the run was saved."""
    return run(argv, "fastlm train", Arguments)


def run(argv: list[str], verb: str, kind: type[Arguments], defaults: TrainConfig | None = None) -> int:
    """Train by a command line, of which what is not given is as in `defaults`."""
    arguments = parse(argv, verb, kind, defaults or TrainConfig())
    if arguments.resume:  # before the settings of the run's own objective are found not to fit another
        check_objective(Path(arguments.out), arguments.objective)
    config = config_of(arguments)
    if arguments.resume and arguments.overwrite:
        raise ConfigError("--resume continues a run and --overwrite discards it: give one of them")
    reporter = ConsoleReporter(settings=True)
    if config.keep_freed_memory:
        keep_freed_memory()
    result = train(config, resume=arguments.resume, overwrite=arguments.overwrite, reporter=reporter)
    reporter.message(describe(result))
    if result.interrupted:
        reporter.message(f"to continue: {resume_command(config)}")
        return 130
    return 0


def parse(argv: list[str], verb: str, kind: type[Arguments], defaults: TrainConfig) -> Arguments:
    """Defaults, then the TOML file, then flags."""
    if path := flags.value_of(argv, "--config"):
        defaults = TrainConfig.load(path, defaults)
    if "--resume" in argv and not path:
        out = flags.value_of(argv, "--out") or defaults.out
        if not (Path(out) / "config.toml").is_file():
            raise CheckpointError(f"{out}: no run to resume, config.toml is missing")
        # Its folder may have been moved or is named from another one.
        defaults = dataclasses.replace(TrainConfig.load(Path(out) / "config.toml"), out=out)
    values = {name: getattr(defaults, name) for name in field_types()}
    own = {defaults.objective: defaults.options} if dataclasses.fields(defaults.options) else {}
    return flags.parse(kind, verb, argv, default=kind(**values, **own), config=(tyro.conf.FlagCreatePairsOff,))


def config_of(arguments: Arguments) -> TrainConfig:
    """The settings; those of an objective that is not the chosen one must be its defaults."""
    values: dict[str, Any] = {name: getattr(arguments, name) for name in field_types()}
    for name, each in objectives().items():
        settings = getattr(arguments, name, None)
        if settings is not None and (name == arguments.objective or settings != each.settings()):
            values[name] = dataclasses.asdict(settings)
    return TrainConfig.from_dict(values)


def describe(result: TrainResult) -> str:
    """How a run ended, in a line or two."""
    speed = f"{result.tokens_per_second:,.0f} tokens/s"
    text = f"{result.reason} after {result.step} steps in {clock(result.seconds)} at {speed}"
    if result.best is not None:
        units = f" {result.units.replace(' per ', '/')}" if result.metric == "loss" and result.units else ""
        text += f"; best validation {result.metric} {result.best:.4f}{units} at step {result.best_step}"
    return f"{text}\ncheckpoints, metrics.jsonl and loss.png are in {result.out}"


def resume_command(config: TrainConfig) -> str:
    return shlex.join(["fastlm", "train", "--out", config.out, "--resume"])
