"""`fastlm train DATA --out RUN`: pretrain a GPT on prepared data."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..errors import CheckpointError, ConfigError
from ..runtime import keep_freed_memory
from ..training.config import TrainConfig
from ..training.loop import train
from ..training.progress import ConsoleReporter, clock
from ..training.state import TrainResult
from . import flags


@dataclass
class Arguments(TrainConfig):
    """Pretrain a GPT on the folder that `fastlm prepare` wrote.

    Settings come from --config, a TOML file of `name = value` lines; flags win over it. With --resume
    they come from the run's own config.toml, and the data folder need not be named, unless it has moved. A decay
    without --decay-steps ends at --max-steps, so that a larger one raises the learning rate of a resumed run.
    """

    data: Annotated[str, tyro.conf.Positional] = ""  # folder that `fastlm prepare` wrote
    config: str = ""  # TOML file with settings
    resume: bool = False  # continue the run in --out from its last checkpoint
    overwrite: bool = False  # start afresh in a run folder that holds a checkpoint

    def __post_init__(self) -> None:
        """Left to the TrainConfig that `main` makes, whose errors tyro would dress up."""


def main(argv: list[str]) -> int:
    """Run the verb. Returns 0, or 130 after Ctrl-C, when the run was saved."""
    arguments = parse(argv)
    config = TrainConfig.from_dict({name: getattr(arguments, name) for name in arguments.to_dict()})
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


def parse(argv: list[str]) -> Arguments:
    """Defaults, then the TOML file, then flags."""
    path = _flag_value(argv, "--config")
    defaults = TrainConfig.load(path) if path else TrainConfig()
    if "--resume" in argv and not path:
        out = _flag_value(argv, "--out") or TrainConfig.out
        if not (Path(out) / "config.toml").is_file():
            raise CheckpointError(f"{out}: no run to resume, config.toml is missing")
        # Its folder may have been moved or is named from another one.
        defaults = dataclasses.replace(TrainConfig.load(Path(out) / "config.toml"), out=out)
    return flags.parse(
        Arguments,
        "fastlm train",
        argv,
        default=Arguments(**defaults.to_dict()),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def describe(result: TrainResult) -> str:
    """How a run ended, in a line or two."""
    speed = f"{result.tokens_per_second:,.0f} tokens/s"
    text = f"{result.reason} after {result.step} steps in {clock(result.seconds)} at {speed}"
    if result.best_loss is not None:
        text += f"; best validation loss {result.best_loss:.4f} nats/token at step {result.best_step}"
    return f"{text}\ncheckpoints, metrics.jsonl and loss.png are in {result.out}"


def resume_command(config: TrainConfig) -> str:
    return shlex.join(["fastlm", "train", "--out", config.out, "--resume"])


def _flag_value(argv: list[str], flag: str) -> str:
    """Value of a flag that must be known before the rest is parsed, in either spelling; the last one, as to tyro."""
    value = ""
    for i, text in enumerate(argv):
        if text.startswith(flag + "="):
            value = text[len(flag) + 1 :]
        elif text == flag:
            value = "".join(argv[i + 1 : i + 2])
    return value
