"""The run's record: metrics.jsonl, and the loss curves drawn from it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .._core.files import naming, replace_text, replacing


class MetricsLog:
    """Appends to a file of one JSON object a line; lines are of two kinds, "train" and "validation"."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def start(self, step: int = 0, evaluated_at: int = 0) -> str:
        """Drop what lies after a checkpoint (its step, the last evaluation in it); at 0, everything.

        Returns:
            What was no line of metrics, and so dropped too; nothing if all were, but for one that a crash cut short.
        """
        limits = {"train": step, "validation": evaluated_at}
        lines, odd = _read(self.path)
        kept = [line for line in lines if 0 < line["step"] <= limits[line["kind"]]]
        replace_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        if not odd or not step:
            return ""
        more = f" and {len(odd) - 1} more are" if len(odd) > 1 else " is"
        return f"{self.path}: line {odd[0]}{more} not a line of metrics, and dropped"

    def append(self, kind: str, **values: Any) -> None:
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **values}, allow_nan=False) + "\n")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; one cut short by a crash, or of something else, is left out.

    A missing file is empty.
    """
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The lines of metrics, and the numbers of those that are none, but for the torn last one."""
    lines, odd = [], []
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if _is_metrics(line):
            lines.append(line)
        elif number < len(texts):
            odd.append(number)
    return lines, odd


def _is_metrics(line: Any) -> bool:
    """Whether a line has what is needed to trim and to draw the file."""
    if not isinstance(line, dict) or line.get("kind") not in ("train", "validation"):
        return False
    rates = ["loss", "learning_rate"] if line["kind"] == "train" else ["loss"]
    return type(line.get("step")) is int and all(_is_number(line.get(name)) for name in rates)


def _is_number(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < 2**63)


def finite_or_none(value: float) -> float | None:
    """JSON knows neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def plot_losses(metrics: str | Path, image: str | Path, units: str = "") -> None:
    """Draw the loss curves of a metrics file, in `units`, with the learning rate below, as a PNG file."""
    # The figure is made without pyplot: no window system is looked for and no global state is left.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(metrics)
    train = [line for line in lines if line["kind"] == "train" and line["loss"] is not None]
    validation = [line for line in lines if line["kind"] == "validation" and line["loss"] is not None]
    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    _curve(top, train, "loss", "training", linewidth=1)
    _curve(top, validation, "loss", "validation", marker="o", markersize=3)
    top.set_ylabel(f"loss ({units})" if units else "loss")
    top.grid(alpha=0.3)
    if train or validation:
        top.legend()
    _curve(bottom, train, "learning_rate", "learning rate", linewidth=1)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step (optimizer updates)")
    bottom.grid(alpha=0.3)
    with replacing(image) as temporary:
        figure.savefig(temporary, format="png")


def _curve(axes: Any, lines: list[dict[str, Any]], key: str, label: str, **style: Any) -> None:
    if lines:
        axes.plot([line["step"] for line in lines], [line[key] for line in lines], label=label, **style)
