"""What a resumed run is told: which settings changed, and what that does to its learning rate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, shown
from .config import TrainConfig
from .schedules import SCHEDULES
from .state import State


def learning_rate(config: TrainConfig, state: State) -> float:
    """Of the step after `state`.

    Where the clock will end the run before max_steps does, the decay keeps pace with the clock, so that a slow machine
    still ends at the minimum.
    """
    decay_steps = config.decay_steps or config.max_steps
    position: float = state.step
    if config.max_minutes and state.step >= config.warmup_steps:
        position = max(position, state.seconds / (60 * config.max_minutes) * decay_steps)
    return config.learning_rate * SCHEDULES[config.schedule](
        position, config.warmup_steps, decay_steps, config.min_lr_ratio
    )


def recorded(run: Path) -> TrainConfig | None:
    """The settings that a run folder says it was made with; None where it says nothing that is understood."""
    try:
        return TrainConfig.load(run / "config.toml")
    except ConfigError:  # not there, or of a version with other rules
        return None


def check_objective(run: Path, objective: str) -> None:
    """Raise CheckpointError where a run folder was trained for another objective, whatever that one's data are."""
    before = recorded(run)
    if before is not None and before.objective != objective:
        raise CheckpointError(f"{run}: trained for {before.objective}, but objective is {objective!r}")


def describe_changes(before: dict[str, Any], now: TrainConfig, state: State) -> list[str]:
    """Lines on the settings that differ from those of the checkpoint, `before`; none if nothing does."""
    values = _flat(now.to_dict())
    old = {name: value for name, value in _flat(before).items() if name in values} | {"out": now.out}
    old["data"] = os.path.abspath(str(old.get("data", now.data)))  # earlier versions stored it as it was given
    changed = [name for name, value in old.items() if value != values[name]]
    lines = []
    if changed:
        pairs = ", ".join(f"{name} {shown(old[name])} -> {shown(values[name])}" for name in changed)
        lines.append(f"changed since the checkpoint: {pairs}")
    try:
        flat = {name: value for name, value in before.items() if name in now.to_dict()}
        earlier = TrainConfig.from_dict(flat)
    except ConfigError:  # of a version with other rules
        return lines
    rate, rate_before = learning_rate(now, state), learning_rate(earlier, state)
    if rate != rate_before:
        end = earlier.decay_steps or earlier.max_steps
        hint = f"; --decay-steps {end} leaves the decay as it was" if end != (now.decay_steps or now.max_steps) else ""
        lines.append(f"the learning rate after step {state.step} goes from {rate_before:.3g} to {rate:.3g}{hint}")
    return lines


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Tables as settings with a dot in their names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
    return flat
