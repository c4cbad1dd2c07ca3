"""PNG plots: bars of speed relative to PyTorch, throughput against size under the roof, and how cost grows."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .report import case_name
from .results import Results, Row


def write(results: Results, folder: str | Path) -> list[Path]:
    """Write the plots of each benchmark with times; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for op in dict.fromkeys(row.op for row in results.rows):
        rows = [row for row in results.rows if row.op == op and row.status == "ok"]
        if rows:
            written += [_ratios(op, rows, folder), _throughput(op, rows, results, folder)]
            growth = _growth(rows)
            if growth:
                written.append(_cost(op, growth, folder))
    return written


Series = dict[str, list[tuple[int, float]]]


def _growth(rows: list[Row]) -> Series:
    """Our times over the extent that grows, the others fixed, where there are three sizes: T in attention, else rows.

    Attention's cases keep B T constant, so its time is that of one sequence.
    """
    series: Series = {}
    for row in rows:
        if not row.provider.startswith("fastlm") or row.provider == "fastlm-reference" or not row.median:
            continue
        extents = [int(n) for n in row.shape.split("x")]
        at, per = (2, extents[0]) if row.op == "attention" else (0, 1)
        fixed = [str(n) for i, n in enumerate(extents) if i != at and not (row.op == "attention" and i == 0)]
        conditions = (row.variant, row.which, row.dtype, "x".join(fixed), row.allocator, f"{row.threads} threads")
        series.setdefault(" ".join(filter(None, conditions)), []).append((extents[at], row.median / per))
    return {name: sorted(points) for name, points in series.items() if len(dict(points)) >= 3}


def _cost(op: str, series: Series, folder: Path) -> Path:
    """Time against size on logarithmic axes; the legend gives the slope between the ends."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for name, points in series.items():
        (first, least), (last, most) = points[0], points[-1]
        slope = math.log(most / least) / math.log(last / first)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=f"{name}: slope {slope:.2f}")
    axes.set(xscale="log", yscale="log", xlabel="T" if op == "attention" else "rows", ylabel="seconds", title=op)
    axes.legend(fontsize=5)
    return _save(figure, folder / f"{op}_cost.png")


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return path


def _ratios(op: str, rows: list[Row], folder: Path) -> Path:
    """A bar for each provider and case: PyTorch's time over the provider's."""
    rows = [row for row in rows if row.ratio_to_torch]
    cases = list(dict.fromkeys(f"{case_name(row).removeprefix(op).strip()} {row.which}" for row in rows))
    labels = list(dict.fromkeys(row.label for row in rows))
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.22 * max(len(cases) * (len(labels) + 1), 4)))
    height = 0.8 / max(len(labels), 1)
    for i, label in enumerate(labels):
        mine = [row for row in rows if row.label == label]
        at = [cases.index(f"{case_name(row).removeprefix(op).strip()} {row.which}") + i * height for row in mine]
        axes.barh(at, [row.ratio_to_torch or 0 for row in mine], height=height * 0.9, label=label)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(cases))], cases, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("speed relative to PyTorch eager (more is faster)")
    axes.set_title(op)
    if labels:
        axes.legend(fontsize=7)
    return _save(figure, folder / f"{op}_ratio.png")


def _throughput(op: str, rows: list[Row], results: Results, folder: Path) -> Path:
    """Rate against size on logarithmic axes, a panel for each dtype, with the roof as a line."""
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    compute = any(row.bound == "compute" for row in rows)
    figure, panels = plt.subplots(1, len(dtypes), figsize=(5 * len(dtypes), 3.6), squeeze=False, sharey=True)
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        mine = [row for row in rows if row.dtype == dtype]
        series: dict[str, list[tuple[float, float]]] = {}
        for row in mine:
            name = " ".join(filter(None, (row.variant, row.which, row.label)))
            name += " (default malloc)" if row.allocator == "default" else ""
            rate = row.tflops if compute else row.gbps
            series.setdefault(name, []).append((math.prod(map(int, row.shape.split("x"))), rate or 0.0))
        for name, points in series.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, linewidth=1, label=name)
        for allocator, roof in results.roofs.items():
            limit = roof["gemm_tflops"].get(dtype) if compute else roof["copy_gbps"]
            if limit:
                axes.axhline(limit, color="black", linestyle="--", linewidth=0.8, label=f"roof ({allocator} memory)")
        axes.set(xscale="log", yscale="log", xlabel="product of the shape", title=f"{op} {dtype}")
        axes.set_ylabel("TFLOP/s" if compute else "GB/s")
        axes.legend(fontsize=5)
    return _save(figure, folder / f"{op}_throughput.png")
