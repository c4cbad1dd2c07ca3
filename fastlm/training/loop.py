"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._core.files import remove_leftovers, replacing
from ..data import Tokenizer
from ..data.loader import Loader, in_order
from ..errors import CheckpointError, ConfigError, DataError, FastlmError, shown
from ..formats import checkpoint as ckpt
from ..objectives import Evaluation, Task, make_task
from ..objectives.common.setup import missing
from ..ops._shadow import prepare_weights
from ..runtime import Interrupt, catch_interrupts, choose_device, choose_dtype, choose_threads, refuse_ranks
from . import rng
from .config import TrainConfig
from .derived import from_anywhere, with_lengths
from .evaluation import evaluate
from .export import check_export, export
from .lock import run_lock
from .metrics import MetricsLog, finite_or_none, plot_losses
from .optimizer import build_optimizer, set_learning_rate
from .progress import Reporter, StepReport
from .resume import check_objective, describe_changes, learning_rate, recorded
from .state import State, TrainResult


class DivergenceError(FastlmError, ArithmeticError):
    """The loss stayed infinite or NaN for too many steps in a row."""


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    task: Callable[[TrainConfig, torch.device], Task] = make_task,
) -> TrainResult:
    """Train a model for an objective and leave checkpoints, metrics and a plot in the run folder.

    A run that is interrupted (SIGINT, SIGTERM) or killed and then resumed with the same settings ends with
    the same parameters, bit for bit, as one that was not, on the same machine and number of threads; only
    `max_minutes`, which follows the clock, cannot promise that.

    Args:
        config: every setting; `config.data` is a folder that `fastlm prepare` wrote.
        resume: continue from the run folder's `last.safetensors`, or, if that is damaged, from its
            `previous.safetensors`. The data must be the same, wherever they lie now.
        overwrite: start afresh in a run folder that holds a checkpoint, and replace a model in `config.export`.
        reporter: told what happens; silent by default.
        task: makes what is trained, on what and for what; by default what the settings name. It is called
            with the seed set, so that what it draws from torch's generator is always the same.

    Raises:
        ConfigError: if settings contradict each other or need more memory than there is, if the run folder holds
            another run or one that is under way, if `config.export` holds another model, and in one of several
            processes of a launcher.
        DataError: if the prepared data are missing, damaged or too short.
        CheckpointError: if the checkpoint cannot be resumed from or cannot be written.
        DivergenceError: if the loss is not finite for `max_bad_steps` steps in a row, in the last step, or on the
            held-out examples. The checkpoints are then those from before.
    """
    reporter = reporter or Reporter()
    refuse_ranks()
    if not config.out:
        raise ConfigError("out names no folder; give one to write the run to")
    for name in missing(config.data) if resume else ():
        raise DataError(f"{name}: no such folder; if the run's data moved, give their new place with --resume")
    if resume and not Path(config.out).is_dir():
        raise CheckpointError(f"{Path(config.out) / ckpt.LAST}: no such checkpoint")
    if resume:
        check_objective(Path(config.out), config.objective)
    if config.export:
        before = recorded(Path(config.out)) if resume else None
        own = before is not None and os.path.abspath(before.export) == os.path.abspath(config.export)
        check_export(Path(config.export), own, overwrite)
    trainer = Trainer(config, reporter, task, resume)
    with run_lock(trainer.out) as warning:
        trainer.open_folder(resume, overwrite)
        if warning:
            reporter.message(warning)
        with contextlib.closing(reporter), catch_interrupts() as interrupt:
            reporter.start(trainer.record)
            reporter.message(trainer.describe())
            for note in trainer.task.notes:
                reporter.message(note)
            result = trainer.run(interrupt)
            if config.export and not result.interrupted:
                export(trainer.out, Path(config.export))
            return result


class Trainer:
    """A run: its task, optimizer, state and files."""

    def __init__(
        self,
        config: TrainConfig,
        reporter: Reporter,
        task: Callable[[TrainConfig, torch.device], Task] = make_task,
        resume: bool = False,
    ):
        self.reporter = reporter
        self.out = Path(config.out)
        self.device = choose_device(config.device)
        self.dtype, self.why = choose_dtype(config.dtype, self.device)
        torch.set_num_threads(choose_threads(config.threads, torch.get_num_threads()))
        rng.seed_all(config.seed)
        # The weights of a run that is resumed are its own, so that what it began with may be gone.
        gone = resume and config.init and not Path(config.init).exists()
        self.task = task(dataclasses.replace(config, init=config.out) if gone else config, self.device)
        self.task.check()
        self.objective = self.task.objective
        if config.metric:
            self.objective.decide_by(config.metric)
        config = with_lengths(config, len(self.task.examples))
        self.config, self.record = config, from_anywhere(config)
        self.loader = Loader(self.task.examples, config.batch_size, config.seed, self.objective.collate, self.device)
        self.tokens_per_step = config.batch_size * config.gradient_accumulation * self.task.tokens_per_example
        self.model: Any = self.task.model.to(self.device)
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.optimizer = build_optimizer(self.model, config)
        if self.device.type == "cpu" and self.dtype == torch.bfloat16 and not config.compile:
            weights: list[Tensor] = getattr(self.model, "product_weights", list)()
            prepare_weights(weights, accumulate=config.gradient_accumulation > 1)
        # Only float16 needs one: its smallest gradients would round to 0.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.state = State(data=self.task.hashes)
        self.metrics = MetricsLog(self.out / "metrics.jsonl")
        self.evaluation: Evaluation | None = None
        self.last_loss = math.nan  # of the last step of this sitting
        self.saved: tuple[int, int] | None = None

    def describe(self) -> str:
        """What is trained, on what and where, in a line."""
        return (
            f"{self._parameters():,} parameters, {self.task.amount}, "
            f"{self.tokens_per_step:,} tokens a step, {self.device} in {str(self.dtype)[6:]} ({self.why})"
        )

    def _parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def open_folder(self, resume: bool, overwrite: bool) -> None:
        """Make the run folder ready: load its checkpoint, or clear it, or refuse."""
        if resume:
            checkpoint, wrong = ckpt.load_resumable(self.out)
            self._resume(checkpoint)
            if wrong:
                self.reporter.message(f"{wrong}; {ckpt.PREVIOUS} takes its place")
                os.replace(self.out / ckpt.PREVIOUS, self.out / ckpt.LAST)
            self._check_best()
        else:
            found = [name for name in (ckpt.LAST, ckpt.PREVIOUS, ckpt.BEST) if (self.out / name).exists()]
            if found and not overwrite:
                raise ConfigError(
                    f"{self.out} holds {found[0]}: add --resume to continue it or --overwrite to start afresh"
                )
            for name in (*found, "loss.png"):
                (self.out / name).unlink(missing_ok=True)
        remove_leftovers(self.out)
        if odd := self.metrics.start(self.state.step, self.state.evaluated_at):
            self.reporter.message(odd)
        self.record.save(self.out / "config.toml")
        tokenizer = self.out / "tokenizer.json"
        if self.task.tokenizer is None:
            tokenizer.unlink(missing_ok=True)
        elif isinstance(self.task.tokenizer, Tokenizer):
            self.task.tokenizer.save(tokenizer)
        else:
            with replacing(tokenizer) as temporary:
                shutil.copyfile(self.task.tokenizer, temporary)

    def _resume(self, checkpoint: ckpt.Checkpoint) -> None:
        trained_with = checkpoint.tokenizer_fingerprint
        ckpt.check_tokenizer(checkpoint.path, trained_with, self.task.fingerprint, f"that of {self.task.source}")
        goal = checkpoint.train_config.get("objective", "causal")
        if checkpoint.train_config and goal != self.config.objective:
            raise CheckpointError(
                f"{checkpoint.path}: trained for {shown(goal, str)}, but objective is {self.config.objective!r}"
            )
        trained = checkpoint.state.get("model", "GPT")  # earlier versions trained nothing else, and did not say so
        if trained != type(self.model).__name__:
            raise CheckpointError(
                f"{checkpoint.path}: holds a {shown(trained, str)}, expected a {type(self.model).__name__}"
            )
        wanted = ckpt.as_stored(self.model.config)
        for name, value in checkpoint.model_config.items():
            # Rates may change, and the family says nothing that the other fields do not.
            if name != "family" and not name.endswith("dropout") and wanted.get(name) != value:
                raise CheckpointError(
                    f"{checkpoint.path}: its model has {shown(name)[1:-1]} = {shown(value)}, "
                    f"the configuration {wanted.get(name)}"
                )
        state = State.from_dict(checkpoint.state, str(checkpoint.path))
        for split, digest in self.state.data.items():
            if state.data.get(split, digest) != digest:
                raise CheckpointError(
                    f"{checkpoint.path}: trained on other data: the sha256 of its {split} split is "
                    f"{state.data[split][:12]}, that of {self.task.source} {digest[:12]}"
                )
        ckpt.restore_model(checkpoint, self.model)
        ckpt.restore_optimizer(checkpoint, self.model, self.optimizer)
        try:
            rng.restore(checkpoint.part("rng"))
            if state.scaler and self.scaler.is_enabled():
                self.scaler.load_state_dict(state.scaler)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{checkpoint.path}: {error}") from None
        self.state = dataclasses.replace(state, data=self.state.data)
        self.saved = (self.state.step, self.state.evaluated_at)
        self.reporter.message(f"resuming {checkpoint.path} after step {self.state.step}")
        for line in describe_changes(checkpoint.train_config, self.record, self.state):
            self.reporter.message(line)

    def _check_best(self) -> None:
        """Forget a best checkpoint that is damaged or gone, so that the next evaluation writes one."""
        if self.state.best is None:
            return
        try:
            ckpt.load_checkpoint(self.out / ckpt.BEST, model_only=True)
        except CheckpointError as error:
            self.state.best, self.state.best_step = None, 0
            self.reporter.message(f"{error}; the next evaluation writes a new one")

    def run(self, interrupt: Interrupt) -> TrainResult:
        """Train until a limit or an interrupt; the run folder is complete afterwards."""
        self.model.train()
        self.started = time.monotonic() - self.state.seconds
        self.resumed_at = self.state.seconds, self._fraction()
        self.interval_start = self.state.step, self.state.train_seconds
        while True:
            reason = self._limit()
            due = reason or self.state.step % self.config.eval_interval == 0
            if due and self.state.step > self.state.evaluated_at and not interrupt:
                self._evaluate(interrupt)
                self._save_last()
                continue  # the evaluation may have used up the patience or the time
            if reason or interrupt:
                break
            self._step()
        self._save_last()
        plot_losses(self.metrics.path, self.out / "loss.png", self.objective.units)
        if self.state.bad_steps and not interrupt:
            raise self._divergence()
        return self._result("interrupted" if interrupt else reason)

    def _limit(self) -> str:
        """Why the run is over, or nothing."""
        config, state = self.config, self.state
        if state.step >= config.max_steps:
            return "max_steps"
        if config.max_minutes and self._time_fraction() >= 1:
            return "max_minutes"
        if config.patience and state.stale_evaluations >= config.patience:
            return "patience"
        return ""

    def _seconds(self) -> float:
        self.state.seconds = time.monotonic() - self.started
        return self.state.seconds

    def _time_fraction(self) -> float:
        return self._seconds() / (60 * self.config.max_minutes) if self.config.max_minutes else 0.0

    def _fraction(self) -> float:
        return max(self.state.step / self.config.max_steps, self._time_fraction())

    def _learning_rate(self) -> float:
        self._seconds()
        return learning_rate(self.config, self.state)

    def _step(self) -> None:
        start = time.monotonic()
        rate = self._learning_rate()
        set_learning_rate(self.optimizer, rate)
        loss = self._backward().item()
        gradient_norm = self._update(loss)
        self.state.step += 1
        self.state.train_seconds += time.monotonic() - start
        self._check_divergence(loss)
        self._report_step(loss, rate, gradient_norm)

    def _backward(self) -> Tensor:
        """Add up the gradients of one step; the mean loss over all of its targets."""
        count = self.config.gradient_accumulation
        total = torch.zeros((), device=self.device)
        batches = [self.loader.batch(self.state.step * count + i) for i in range(count)]
        targets = sum(batch.targets for batch in batches)
        if not targets:
            raise DataError(f"{self.task.source}: step {self.state.step + 1} has no target in {count} batches")
        for batch in batches:
            if batch.targets:
                with self._autocast():
                    loss = self.objective.loss(self.forward, batch) / (targets / batch.targets)
                self.scaler.scale(loss).backward()
                total += loss.detach()
        return total

    def _update(self, loss: float) -> float:
        """Take the optimizer's step unless the loss or the gradient is not finite; the gradient's norm."""
        self.scaler.unscale_(self.optimizer)
        norm = self.optimizer.gradient_norm()
        # With a scaler a non-finite gradient only means too large a scale; it skips and lowers it by itself.
        good = math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled())
        if good:
            self.scaler.step(self.optimizer, max_norm=self.config.grad_clip or math.inf, norm=norm)
            self.state.add_loss(loss)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.bad_steps = 0 if good else self.state.bad_steps + 1
        return norm

    def _check_divergence(self, loss: float) -> None:
        bad, step = self.state.bad_steps, self.state.step
        self.last_loss = loss
        if bad:
            self.reporter.message(f"step {step}: skipped, the loss ({loss}) or its gradient is not finite")
        if bad >= self.config.max_bad_steps:
            raise self._divergence()

    def _divergence(self) -> DivergenceError:
        """Of the skipped steps up to this one."""
        bad, step = self.state.bad_steps, self.state.step
        steps = f"steps {step - bad + 1} to {step}, last loss {self.last_loss}, "
        return self._failure(f"loss or gradient not finite for {bad} steps in a row", steps)

    def _failure(self, what: str, where: str = "") -> DivergenceError:
        """An error that says what happened, what to try, and what is left."""
        kept = [f"{ckpt.LAST} of step {self.saved[0]}"] if self.saved else []
        kept += [f"{ckpt.BEST} of step {self.state.best_step}"] if self.state.best is not None else []
        return DivergenceError(
            f"{what} ({where}learning rate {self.optimizer.param_groups[0]['lr']:.3g}): "
            "try a lower --learning-rate or a longer --warmup-steps; "
            f"{self.out} keeps {' and '.join(kept) or 'no checkpoint'}"
        )

    def _report_step(self, loss: float, rate: float, gradient_norm: float) -> None:
        state, config = self.state, self.config
        steps, seconds = state.step - self.interval_start[0], state.train_seconds - self.interval_start[1]
        speed = steps * self.tokens_per_step / max(seconds, 1e-9)
        if state.step % config.log_interval == 0:
            self.interval_start = state.step, state.train_seconds
            self.metrics.append(
                "train",
                step=state.step,
                loss=state.take_mean_loss(),
                learning_rate=rate,
                gradient_norm=finite_or_none(gradient_norm),
                tokens=state.step * self.tokens_per_step,
                tokens_per_second=round(speed, 1),
                seconds=round(self._seconds(), 3),
            )
        fraction = min(1.0, self._fraction())
        then, fraction_then = self.resumed_at
        left = (self._seconds() - then) * (1 - fraction) / max(fraction - fraction_then, 1e-9)
        self.reporter.step(StepReport(state.step, loss, rate, speed, fraction, left))

    def _evaluate(self, interrupt: Interrupt) -> None:
        batches = in_order(self.task.held_out, self.config.batch_size, self.objective.collate, self.device)
        result = evaluate(self.model, self.objective, batches, autocast=self._autocast, stop=lambda: bool(interrupt))
        if result is None:  # interrupted: the resumed run evaluates first
            return
        self.evaluation = result
        numbers, decides = dataclasses.asdict(result), self.objective.decides
        if decides not in numbers:
            raise ConfigError(
                f"objective {self.objective.name}: decides is {decides!r}, expected {' or '.join(numbers)}"
            )
        best = self.state.record_evaluation(numbers[decides], self.objective.higher_is_better)
        if not math.isfinite(numbers[decides]) and math.isfinite(result.loss):
            self.reporter.message(f"step {self.state.step}: {decides} is {numbers[decides]}, so it cannot be the best")
        values = {name: finite_or_none(value) for name, value in numbers.items()}
        self.metrics.append("validation", step=self.state.step, **values, seconds=round(self._seconds(), 3))
        self.reporter.evaluation(self.state.step, result, best)
        if not math.isfinite(result.loss):  # nothing good can come of these weights, so they are not saved
            raise self._failure(f"the validation loss is {result.loss} at step {self.state.step}")
        if best:
            self._save(ckpt.BEST, resumable=False)

    def _save_last(self) -> None:
        moment = (self.state.step, self.state.evaluated_at)
        if moment != self.saved:
            self._save(ckpt.LAST, resumable=True, keep=self.out / ckpt.PREVIOUS)
            self.saved = moment

    def _save(self, name: str, resumable: bool, keep: Path | None = None) -> None:
        self._seconds()
        self.state.scaler = self.scaler.state_dict()
        ckpt.save_checkpoint(
            self.out / name,
            self.model,
            self.optimizer if resumable else None,
            step=self.state.step,
            train_config=self.record.to_dict(),
            tokenizer_fingerprint=self.task.fingerprint,
            state={"model": type(self.model).__name__} | dataclasses.asdict(self.state),
            rng=rng.capture() if resumable else None,
            keep=keep,
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _result(self, reason: str) -> TrainResult:
        state = self.state
        return TrainResult(
            out=self.out,
            reason=reason,
            step=state.step,
            evaluation=self.evaluation,
            best=state.best,
            best_step=state.best_step,
            seconds=self._seconds(),
            tokens_per_second=state.step * self.tokens_per_step / max(state.train_seconds, 1e-9),
            parameters=self._parameters(),
            device=str(self.device),
            dtype=str(self.dtype)[6:],
            metric=self.objective.decides,
            units=self.objective.units,
        )
