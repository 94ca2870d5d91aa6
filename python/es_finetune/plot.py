"""reward.png: how the population's rewards and the held-out answers moved."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

INK, BAND, ACCENT = "#1b4f72", "#aed6f1", "#c0392b"


def plot_run(path: Path, task: str, rows: list[dict[str, Any]], held_out: list[tuple[int, float]]) -> None:
    """Write the plot of `rows` (as in metrics.jsonl) and of `held_out` (updates done, exact share) to `path`."""
    # Figure and canvas directly, not pyplot: no global state, no display, safe in a notebook or a thread.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    rewards, exact = figure.subplots(1, 2)

    x = [row["generation"] + 1 for row in rows]
    low, mean, high = ([row[key] for row in rows] for key in ("reward_min", "reward_mean", "reward_max"))
    rewards.fill_between(x, low, high, color=BAND, alpha=0.6, linewidth=0, label="min to max of the members")
    rewards.plot(x, mean, color=INK, linewidth=2, marker="o" if len(x) == 1 else None, label="mean")
    rewards.set(title="Reward of the population, training prompts", xlabel="generation", ylabel="reward")
    rewards.legend(loc="lower right", frameon=False)

    updates, share = zip(*held_out)
    exact.axhline(share[0], color="grey", linewidth=1, linestyle=":")
    exact.plot(updates, share, color=ACCENT, linewidth=2, marker="o", markersize=5)
    for index, side in ((0, (8, -16)), (-1, (0, 10))):
        exact.annotate(
            f"{share[index]:.1%}",
            (updates[index], share[index]),
            xytext=side,
            textcoords="offset points",
            ha="left" if index == 0 else "right",
            fontweight="bold",
            color=ACCENT,
        )
    exact.set(title="Exact answers, held-out prompts", xlabel="updates", ylabel="share of prompts", ylim=(0, 1))
    exact.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")

    for axes in (rewards, exact):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(f"Evolution strategies on {task}")
    part = path.with_name(path.name + ".tmp")
    figure.savefig(part, format="png")
    os.replace(part, path)
