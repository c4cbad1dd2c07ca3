"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..objectives import Evaluation
from .config import TrainConfig


@dataclass(frozen=True)
class StepReport:
    """One step as it is shown.

    Attributes:
        loss: nats a token.
        fraction: of the whole run, by steps or by the clock, whichever is further.
        seconds_left: at the present pace.
    """

    step: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    fraction: float
    seconds_left: float


class Reporter:
    """Told what happens; this one stays silent. A subclass shows it."""

    def start(self, config: TrainConfig) -> None:
        """The run begins, or goes on."""

    def message(self, text: str) -> None:
        """Something worth a line of its own."""

    def step(self, report: StepReport) -> None:
        """A step is done."""

    def evaluation(self, step: int, result: Evaluation, best: bool) -> None:
        """An evaluation is done."""

    def close(self) -> None:
        """The run is over, for whatever reason."""


class Callbacks(Reporter):
    """Calls functions, each of which may be None, and tells another reporter, if there is one."""

    def __init__(
        self,
        on_step: Callable[[StepReport], None] | None = None,
        on_evaluation: Callable[[int, Evaluation, bool], None] | None = None,
        on_message: Callable[[str], None] | None = None,
        other: Reporter | None = None,
    ):
        self.on_step, self.on_evaluation, self.on_message = on_step, on_evaluation, on_message
        self.other = other or Reporter()

    def start(self, config: TrainConfig) -> None:
        self.other.start(config)

    def message(self, text: str) -> None:
        self.other.message(text)
        if self.on_message:
            self.on_message(text)

    def step(self, report: StepReport) -> None:
        self.other.step(report)
        if self.on_step:
            self.on_step(report)

    def evaluation(self, step: int, result: Evaluation, best: bool) -> None:
        self.other.evaluation(step, result, best)
        if self.on_evaluation:
            self.on_evaluation(step, result, best)

    def close(self) -> None:
        self.other.close()


class PipeConsole(Console):
    """A console that tells when the reader of its pipe has gone, where rich's own ends the process with status 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class ConsoleReporter(Reporter):
    """Reports to a console, standard output by default; with `settings`, those of the run too."""

    def __init__(self, console: Console | None = None, settings: bool = False):
        self.console = console or PipeConsole()
        self.settings = settings
        self.live = self.console.is_terminal
        self.interval = self.max_steps = 1
        self.progress: Progress | None = None
        self.task: Any = None

    def start(self, config: TrainConfig) -> None:
        self.interval, self.max_steps = config.log_interval, config.max_steps
        if self.settings:
            self.message(config.to_toml())
        if self.live:
            self.progress = Progress(BarColumn(), TextColumn("{task.description}"), console=self.console)
            self.progress.start()
            self.task = self.progress.add_task("starting", total=1.0)

    def message(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, report: StepReport) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=report.fraction, description=self._describe(report))
        elif report.step % self.interval == 0:
            self.message(self._describe(report))

    def evaluation(self, step: int, result: Evaluation, best: bool) -> None:
        self.message(f"step {step}: validation {result.describe()}{', best so far' if best else ''}")

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def _describe(self, report: StepReport) -> str:
        return (
            f"step {report.step}/{self.max_steps}  loss {report.loss:.3f}  "
            f"{report.tokens_per_second:,.0f} tokens/s  lr {report.learning_rate:.2e}  "
            f"{clock(report.seconds_left)} left"
        )


def clock(seconds: float) -> str:
    """65 -> "1:05", 3700 -> "1:01:40"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
