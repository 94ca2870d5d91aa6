"""The pictures of a run: reward.png, and the same axes as inline SVG for report.html.

Rows are those of metrics.jsonl, evals those of evals.jsonl. Generations are counted from 1 on the axes: a row's place
is the number of updates done after it, so both kinds share one axis.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from es_finetune.monitor.progress import value
from es_finetune.monitor.rows import worker_seconds
from es_finetune.runs.files import write_atomically

INK, BAND, ACCENT, SCORE, REST, TEXT, GRID = "#1b4f72", "#aed6f1", "#0f766e", "#e0982f", "#b5bec8", "#4a5560", "#dde2e7"
# In the page a colour is a variable of its style sheet, so that the plots follow its dark mode.
_NAMES = {INK: "ink", BAND: "band", ACCENT: "accent", SCORE: "score", REST: "rest", TEXT: "text", GRID: "grid"}

HELD_OUT = {"exact": "Right answers to held-out items", "reward": "Held-out reward"}  # title, by metric

Row = Mapping[str, Any]


def plot_run(path: Path, title: str, metric: str, rows: Sequence[Row], evals: Sequence[Row]) -> None:
    """Write reward.png, two panels: the population's rewards of `rows`, and `metric` on held-out items of `evals`.

    Either list may be empty; its panel then says so.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figure and canvas directly, not pyplot: no global state, no display, safe in a notebook or a thread.
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    rewards, held_out = figure.subplots(1, 2)
    for axes, name, draw in (
        (rewards, "Reward of the population, training prompts", lambda axes: draw_rewards(axes, rows)),
        (held_out, f"{HELD_OUT[metric]}, 95% intervals", lambda axes: draw_held_out(axes, metric, evals)),
    ):
        _dress(axes)
        if rows if axes is rewards else evals:
            draw(axes)
        else:
            axes.text(0.5, 0.5, "not measured", ha="center", color=TEXT)
        axes.set_title(name)
    figure.suptitle(title, parse_math=False)  # a name may hold a dollar sign
    out = io.BytesIO()
    figure.savefig(out, format="png")
    write_atomically(path, out.getvalue())


def svg(label: str, draw: Callable[[Any], None]) -> str:
    """What `draw` does to a pair of axes, as an <svg> element to stand inside HTML; `label` is read to those who do not
    see it."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # hashsalt: ids that differ between the plots of a page and not between two reports of a run. fonttype: text stays
    # text.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure = Figure(figsize=(5.2, 2.7), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        _dress(axes)
        draw(axes)
        figure.set_layout_engine("constrained", w_pad=8 / 72)  # the page's font may be wider than the one measured here
        figure.draw_without_rendering()  # a layout changes which ticks there are, so it takes two
        out = io.StringIO()
        figure.savefig(
            out, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    body = out.getvalue()
    box = re.findall(r'viewBox="[^"]*"', body)[0]
    body = body[body.index(">", body.index("<svg")) + 1 :]
    # Axes_1 and its like: nothing refers to them, every plot has them, and a page may have an id once
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", body)  # the page's font
    for colour, name in _NAMES.items():
        body = body.replace(colour, f"var(--{name})")
    return f'<svg role="img" aria-label="{label}" {box}>{body}'


def draw_rewards(axes: Any, rows: Sequence[Row]) -> None:
    """Min to max of the members as a band, in it the middle half of them, their mean as a line."""
    x = _updates(rows)
    low, mean, high = (_series(rows, name) for name in ("reward_min", "reward_mean", "reward_max"))
    if len(x) == 1:
        axes.errorbar(
            x,
            mean,
            yerr=[[mean[0] - low[0]], [high[0] - mean[0]]],
            color=INK,
            fmt="o",
            capsize=4,
            label="mean, worst to best member",
        )
    else:
        axes.fill_between(x, low, high, color=BAND, alpha=0.5, linewidth=0, label="worst to best member")
        quartiles = [_series(rows, f"reward_q{percent}") for percent in (25, 75)]
        if any(row.get("reward_q25") is not None for row in rows):  # an older run has none
            axes.fill_between(x, *quartiles, color=BAND, linewidth=0, label="middle half")
        axes.plot(x, mean, color=INK, linewidth=1.8, label="mean")
    _legend(axes)


def draw_held_out(axes: Any, metric: str, evals: Sequence[Row]) -> None:
    """Each eval on the held-out items with its 95 % interval; a dotted line where the base model stands."""
    x, y = [row["generation"] for row in evals], _series(evals, metric)
    axes.axhline(y[0], color=TEXT, linewidth=1, linestyle=":")
    ends = [
        [v if row.get(end) is None else row[end] for row, v in zip(evals, y, strict=True)] for end in ("low", "high")
    ]
    axes.errorbar(
        x,
        y,
        yerr=[
            [max(0.0, v - end) for v, end in zip(y, ends[0], strict=True)],
            [max(0.0, end - v) for v, end in zip(y, ends[1], strict=True)],
        ],
        color=ACCENT,
        ecolor=ACCENT,
        elinewidth=1,
        capsize=2,
        linewidth=1.8,
        marker="o",
        markersize=4,
    )
    top, bottom = max(ends[1]), min(ends[0])
    # Above the last point, where its value is written
    room = 0.18 * ((top if metric == "exact" else top - bottom) or 1.0)
    axes.set_ylim(0.0 if metric == "exact" else bottom - room, top + room)
    if metric == "exact":
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g}%")
    for index in {0, len(x) - 1}:
        # The base model's below its point, if there is room: the curve goes up from it
        above = index > 0 or ends[0][0] - room < axes.get_ylim()[0]
        axes.annotate(
            value(metric, y[index]),
            (x[index], ends[1 if above else 0][index]),
            xytext=(0, 5 if above else -5),
            textcoords="offset points",
            ha="center" if len(x) == 1 else "left" if index == 0 else "right",
            va="bottom" if above else "top",
            fontweight="bold",
            color=ACCENT,
        )


def draw_lengths(axes: Any, rows: Sequence[Row], evals: Sequence[Row]) -> None:
    """Mean tokens of an answer: of the members' as a line, of the held-out ones as points, with the middle 80 % of
    these as a bar."""
    known = [row for row in rows if row.get("answer_tokens") is not None]
    axes.plot(_updates(known), _series(known, "answer_tokens"), color=INK, linewidth=1.8, label="members, mean")
    asked = [row for row in evals if row.get("answer_tokens") is not None]
    x, mean = [row["generation"] for row in asked], _series(asked, "answer_tokens")
    low, high = (_series(asked, f"answer_tokens_q{percent}") for percent in (10, 90))
    axes.vlines(x, low, high, color=BAND, linewidth=5, label="held-out, middle 80%")
    axes.plot(x, mean, "o", color=ACCENT, markersize=4, label="held-out, mean")
    axes.set_ylim(bottom=0)
    _legend(axes)


def draw_lines(
    axes: Any,
    rows: Sequence[Row],
    lines: dict[str, Callable[[Row], float | None]],
    percent: bool = False,
    correlation: bool = False,
) -> None:
    """One line for each label: f(row), where it is not None. Several lines get a legend. The axis begins at 0; of a
    `correlation` it ends at 1 and begins at 0.9 or below."""
    for (label, read), colour in zip(lines.items(), (INK, SCORE, ACCENT), strict=False):
        points = [(row["generation"] + 1, y) for row in rows if (y := read(row)) is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                linewidth=1.6 if len(points) < 200 else 1.0,
                marker="o" if len(points) < 60 else None,
                markersize=3,
                label=label,
                clip_on=False,
            )
    if correlation:
        lowest = min((min(line.get_ydata()) for line in axes.lines), default=1.0)
        axes.set_ylim(min(0.9, lowest - 0.05), 1.005)
    else:
        axes.set_ylim(0, max(axes.get_ylim()[1], 1e-9) if any(any(line.get_ydata()) for line in axes.lines) else 1)
    if percent:
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
    if len(lines) > 1:
        _legend(axes)


def draw_time(axes: Any, rows: Sequence[Row]) -> None:
    """Shares of the workers' time in each generation, stacked; the legend has the shares of the whole run."""
    parts = {"answering": BAND, "scoring": SCORE, "noise": INK}
    keys = dict(zip(parts, ("seconds_generate", "seconds_score", "seconds_kernels"), strict=True))
    seconds = {name: [row.get(key) or 0.0 for row in rows] for name, key in keys.items()}
    whole = [max(worker_seconds(row), sum(part), 1e-9) for row, *part in zip(rows, *seconds.values(), strict=True)]
    seconds["other"] = [total - sum(part) for total, *part in zip(whole, *seconds.values(), strict=True)]
    # One step a generation, so that a run of a single one is seen as well.
    x = [edge for at in _updates(rows) for edge in (at - 0.5, at + 0.5)]
    below = [0.0] * len(x)
    for name, colour in {**parts, "other": REST}.items():
        share = [part / total for part, total in zip(seconds[name], whole, strict=True) for _ in range(2)]
        above = [a + b for a, b in zip(below, share, strict=True)]
        axes.fill_between(
            x, below, above, color=colour, linewidth=0, label=f"{name} {sum(seconds[name]) / sum(whole):.1%}"
        )
        below = above
    axes.set(ylim=(0, 1), xlim=(x[0], x[-1]))
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    _legend(axes)


def _updates(rows: Sequence[Row]) -> list[int]:
    return [row["generation"] + 1 for row in rows]


def _series(rows: Sequence[Row], name: str) -> list[float]:
    """The column, NaN (a gap in a line) where it was not measured."""
    return [float("nan") if row.get(name) is None else row[name] for row in rows]


def _legend(axes: Any) -> None:
    """Below the axes, where it hides no data."""
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.19),
        ncols=4,
        frameon=False,
        labelcolor=TEXT,
        fontsize=9,
        handlelength=1,
        columnspacing=1,
    )


def _dress(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(color=GRID, labelcolor=TEXT)
    axes.xaxis.label.set_color(TEXT)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("generation")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))
