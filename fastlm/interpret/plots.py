"""Pictures of attention weights; matplotlib is imported when one is drawn."""

from __future__ import annotations

from typing import Any

from torch import Tensor

PANEL = 1.8  # inches


def draw_maps(maps: dict[str, Tensor], head: int | None, tokens: list[str] | None, path: Any) -> Any:
    """A Figure with a row of panels for each (H, T, S) of `maps`; see `AttentionMaps.plot`."""
    from matplotlib.figure import Figure  # no pyplot: nothing is shown, and no window is kept

    chosen = {name: _heads(weights, head) for name, weights in maps.items()}
    columns = max(len(weights) for weights in chosen.values())
    figure = Figure(figsize=(PANEL * columns + 1, PANEL * len(chosen) + 0.5), layout="constrained")
    panels = figure.subplots(len(chosen), columns, squeeze=False)
    for row, (name, weights) in zip(panels, chosen.items(), strict=True):
        for panel in row[len(weights) :]:
            panel.set_axis_off()
        for index, panel in enumerate(row[: len(weights)]):
            panel.imshow(weights[index].numpy(), vmin=0.0, vmax=1.0, aspect="auto", cmap="magma")
            _label(panel, tokens, weights.shape[1:])
            if head is None and row is panels[0]:
                panel.set_title(f"head {index}", fontsize=7)
        row[0].set_ylabel(name, fontsize=6)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _heads(weights: Tensor, head: int | None) -> Tensor:
    if head is None:
        return weights
    return weights.mean(0, keepdim=True) if head < 0 else weights[head : head + 1]


def _label(panel: Any, tokens: list[str] | None, shape: Any) -> None:
    for axis, size in ((panel.yaxis, shape[0]), (panel.xaxis, shape[1])):
        if tokens is None or len(tokens) != size:
            axis.set_ticks([])
        else:
            axis.set_ticks(range(size), tokens, fontsize=5)
    panel.tick_params(axis="x", rotation=90)
