"""Draws the README's plots from bench/results/*.json.

    python -m bench.publish.plots                               redraw docs/*.png
    python -m bench.publish.plots --check                       exit with 1 if one is not of these results
    python -m bench.publish.plots --results FOLDER --one FILE   draw what a folder has, such as gpu.sh leaves, as one

A picture carries the digest of its results and of this file: pixels differ between versions of matplotlib, digests do
not.
"""

import argparse
import hashlib
import json
import math
import pathlib
import sys

from bench import RESULTS, ROOT
from bench.publish.targets import OURS, REFERENCE

DOCS = ROOT / "docs"
BLUE, RED, GREY, SAND, GREEN, VIOLET, BROWN = (
    "#1f6f8b",
    "#d1495b",
    "#555555",
    "#c8a951",
    "#5b8c5a",
    "#7a5c99",
    "#8a5a44",
)

SHOWN = {"embedded": "demo's model (108k weights)", "50M": "model of 50M weights"}


def baselines(ax, report):
    """Seconds of a member's weights and of an update, in multiples of ours."""
    rows = report["rivals"]
    model = max(
        {r["model"] for r in rows if r["what"] == "update"},
        key=lambda m: next(r["elements"] for r in rows if r["model"] == m),
    )
    names = list(dict.fromkeys(r["who"] for r in rows))[::-1]
    for shift, what, color in ((0.2, "member", BLUE), (-0.2, "update", SAND)):
        cells = {r["who"]: r for r in rows if r["model"] == model and r["what"] == what}
        seeds = next(iter(cells.values()))["seeds"]
        places = [i + shift for i, name in enumerate(names) if name in cells]
        times = [cells[name]["times_ours"] for name in names if name in cells]
        ax.barh(
            places,
            times,
            0.38,
            color=color,
            label="perturb and restore one member" if what == "member" else f"update by {seeds} members",
        )
        for place, t in zip(places, times, strict=True):
            ax.text(max(t, 1) * 1.05, place, f"{t:.2g}" if t < 10 else f"{t:.0f}", va="center", fontsize=8)
    ax.axvline(1, color=GREY, lw=0.8)
    ax.set_yticks(range(len(names)), names)
    ax.set_xscale("log")
    longest = max(r["times_ours"] for r in rows if r["model"] == model)
    ax.set_xlim(right=2.5 * longest)
    ax.set_xticks([t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if t < 2.5 * longest])
    _plain_numbers(ax.xaxis)
    ax.set_xlabel(f"times as long as {OURS}")
    _title(ax, "Time to handle the weights (lower is better)", f"{model} weights, bf16, {_machine(report)}")
    _legend(ax, loc="upper right")  # ours, which are short, are at the top


def sizes(ax, report):
    """Bandwidth beside a copy of the same size, in the same rounds."""
    colors = {
        "perturb bf16 in place": BLUE,
        "perturb bf16 <- f32": RED,
        "swap bf16 in place": SAND,
        "restore bf16 <- f32": GREEN,
        "fingerprint bf16": VIOLET,
    }
    rows = [
        r
        for r in report["calls"]
        if r["operation"] in colors and r["threads"] in (None, max(r["threads"] or 0 for r in report["calls"]))
    ]
    best = next(r["isa"] for r in rows)
    for backend, style in zip(dict.fromkeys(r["backend"] for r in rows), ("-", "--"), strict=False):
        for operation, color in colors.items():
            line = sorted(
                (r["elements"], r["share_of_copy"])
                for r in rows
                if (r["backend"], r["operation"], r["isa"]) == (backend, operation, best)
            )
            ax.plot(*zip(*line, strict=True), style, color=color, marker="o", ms=3, label=f"{backend}: {operation}")
    ax.axhline(1, color=GREY, lw=0.8)
    _powers_of_two(ax, [r["elements"] for r in rows])
    ax.set_ylim(bottom=0)
    ax.set_xlabel("weights of one call")
    ax.set_ylabel("bandwidth, a copy's = 1")
    _title(ax, "Bandwidth of one call (higher is better)", _machine(report))
    _legend(ax, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def generation(ax, report):
    """Share of a generation of 30 members that handling weights takes, by length of the answers."""
    models = list(dict.fromkeys(r["model"] for r in report["break_even"]))
    every, guessed = [], False
    for model, color in zip(models, (BLUE, RED, GREEN), strict=False):
        for way, style in ((REFERENCE, "-"), (OURS, "--")):
            r = next(r for r in report["break_even"] if r["model"] == model and r["way"] == way)
            weights = r["seconds_member"] + r["seconds_update"] / 30
            tokens = list(map(int, r["seconds_answers"]))
            shares = [weights / (weights + seconds) for seconds in r["seconds_answers"].values()]
            known = sum(n <= r["longest_measured"] for n in tokens)
            label = f"{SHOWN.get(model, model)}: {way}"
            ax.plot(tokens[:known], shares[:known], style, color=color, marker="o", ms=4, label=label)
            # Beyond the longest answer that was waited for
            ax.plot(tokens[known - 1 :], shares[known - 1 :], ":", color=color, lw=1.2)
            ax.plot(tokens[known:], shares[known:], "o", color=color, mfc="white", ms=5)
            every, guessed = [*every, *tokens], guessed or known < len(tokens)
    if guessed:
        ax.plot([], [], ":o", color=GREY, mfc="white", ms=5, lw=1.2, label="extrapolated from shorter answers")
    ax.axhline(0.01, color=GREY, lw=0.8)
    ax.text(max(every), 0.01, "a hundredth", color=GREY, fontsize=8, ha="right", va="bottom")
    _powers_of_two(ax, every)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    ax.set_xlabel("tokens of an answer")
    ax.set_ylabel("share of a generation")
    _title(
        ax,
        "Share of a generation spent on handling the weights (lower is better)",
        f"200 questions, 30 members, {_machine(report)}",
    )
    _legend(ax, loc="lower left")


def exactness(ax, report):
    """Held-out answers over generations; bands: one standard error over seeds."""
    setting = report["setting"]
    for row, color in zip(report["rows"], (GREY, BLUE, GREEN, SAND, VIOLET, BROWN, RED), strict=True):
        at = [i * setting["look_every"] for i in range(len(row["mean"]))]
        ax.plot(at, row["mean"], color=color, lw=1.5, label=row["way"])
        ax.fill_between(
            at,
            *([m + sign * e for m, e in zip(row["mean"], row["error"], strict=True)] for sign in (-1, 1)),
            color=color,
            alpha=0.15,
            lw=0,
        )
    ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    ax.set_xlabel("generation")
    ax.set_ylabel("held-out questions answered right")
    _title(
        ax,
        "Right answers, by how the weights are kept (higher is better)",
        "In a generation half of the weights move by less than "
        f"{report['add_then_subtract']['step_over_ulp']['0.5']:.2f} of the gap between neighbouring bf16 numbers.\n"
        f"{setting['population']} members; mean of {setting['seeds']} seeds, band: one standard error",
    )
    _legend(ax, loc="upper left")


def scale(ax, report):
    """Efficiency against workers, in simulation."""
    a = report["assumed"]
    for policy, meaning, color in (
        ("waves", "all wait for the slowest", RED),
        ("shared counter", "who is free takes the next member", SAND),
        ("re-issued", "a late member is given out again", BLUE),
        ("dropped", "a late member is left out", GREEN),
    ):
        rows = [r for r in report["simulated"] if r["policy"] == policy]
        ax.plot(
            [r["workers"] for r in rows],
            [r["efficiency"] for r in rows],
            ":o",
            color=color,
            mfc="white",
            ms=5,
            label=f"{policy}: {meaning}",
        )
    _powers_of_two(ax, [r["workers"] for r in report["simulated"]], only_these=True)
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    ax.set_xlabel("workers")
    ax.set_ylabel("share of their time that counts")
    _title(
        ax,
        "Useful share of the workers' time, by how members are given out (higher is better)",
        f"Simulated, not measured: {a['members_a_worker']} members a worker, {a['stragglers']:.0%} of them take "
        f"{a['straggle']:.0f} times as long, workers die",
    )
    _legend(ax, loc="lower left", title="simulated", title_fontsize=8, alignment="left")


def members(ax, report):
    """Tokens a second against members, of the model with most points."""
    of = {}
    for row in report["rows"]:
        if row["prompts"] == 8:
            of.setdefault(row["model"], []).append(row)
    model, rows = max(of.items(), key=lambda entry: len(entry[1]))
    names = {"plain": "plain inference of as many answers", "one batch": "members in one batch"}
    for way, color in (("plain", GREY), ("one batch", BLUE), ("one by one", RED)):
        ax.plot(
            [row["members"] for row in rows],
            [row["ways"][way]["tokens_per_s"] for row in rows],
            "o-",
            color=color,
            label=names.get(way, f"members {way}"),
        )
    _powers_of_two(ax, [row["members"] for row in rows], only_these=True)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("members")
    ax.set_ylabel("tokens a second")
    _title(
        ax,
        f"Answering for {rows[-1]['members']} members at once (higher is better)",
        f"{model}, {rows[0]['prompts']} prompts a member, noise of rank {report['noise_rank']}, {_machine(report)}",
    )
    _legend(ax)


def conciseness(ax, report):
    """Reward against the seconds that generations took: of each generation's members, and held out before and after."""
    colors = dict(zip(dict.fromkeys(run["way"] for run in report["runs"]), (RED, BLUE), strict=True))
    for run in report["runs"]:
        minutes = [generation["until"] / 60 for generation in run["generations"]]
        rewards = [generation["reward"] for generation in run["generations"]]
        color, first = colors[run["way"]], run["seed"] == 0
        ax.plot(minutes, rewards, "o-", color=color, ms=4, label=run["way"] if first else None)
        held_out = "held-out questions, asked only before and after" if run is report["runs"][0] else None
        ax.plot([0, minutes[-1]], [report["base"], run["final"]], "x:", color=color, label=held_out)
    ax.set_xlabel("minutes of generations")
    ax.set_ylabel("mean reward, minus characters off the target length")
    _title(
        ax,
        "Reward by the clock, for short answers (higher is better)",
        f"{report['model']}, {report['setting']['population']} members x 2 prompts, "
        f"{_machine(report)}, one thread a run, a line a seed",
    )
    _legend(ax)


def countdown_smollm2(ax, report):
    """Format by generation: of the members on their questions, and held out."""
    for run, color in zip(report["runs"], (BLUE, GREEN, SAND), strict=False):
        formats = [row[2] for row in run["generations"]]
        ax.plot(range(1, len(formats) + 1), formats, color=color, label=f"members, seed {run['seed']}")
        at = [row[1] for row in run["curve"]]
        ax.plot(at, [row[3] for row in run["curve"]], "x:", color=color, label=f"held out, seed {run['seed']}")
    exact = max(row[3] for run in report["runs"] for row in run["generations"])
    ax.axhline(0.6, color=GREY, lw=0.8)
    ax.text(0, 0.66, "0.6: a think block and an answer block, but not the whole form", color=GREY, fontsize=8)
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("generation")
    ax.set_ylabel("format, 1 = the whole form")
    _title(
        ax,
        "What ES learns of Countdown: the form of an answer (higher is better)",
        f"SmolLM2-135M-Instruct, 30 members x 2 prompts, {_machine(report)}. "
        f"Exact answers of a generation: {exact:.0%} at most",
    )
    _legend(ax, loc="lower right")


def short_answers(ax, report, others):
    """Held-out exact answers against the minutes that training took, a line a run."""
    runs = [("ES, all members in one batch", BLUE, run) for run in report["runs"]]
    methods = dict.fromkeys(run["method"] for run in others["runs"])
    colors = dict(zip(methods, (SAND, RED, VIOLET, GREY), strict=False))
    runs += [(f"TRL: {run['method']}", colors[run["method"]], run) for run in others["runs"]]
    for name, color, run in runs:
        minutes, exact = [row[0] / 60 for row in run["curve"]], [100 * row[2] for row in run["curve"]]
        ax.plot(minutes, exact, ".-", color=color, label=name if run["seed"] == 0 else None)
    ax.set_xlabel("minutes of training, one CPU thread")
    ax.set_ylabel("held-out answers that are exact, %")
    _title(
        ax,
        "Exact short answers over time (higher is better)",
        f"SmolLM2-135M-Instruct, {_machine(report)}, a line a seed. ES and SFT read reference answers, GRPO does not",
    )
    _legend(ax, loc="lower right", bbox_to_anchor=(1, 0.12))


def _machine(report):
    return report["machine"].get("gpu", report["machine"]["processor"])


def _title(ax, claim, setting):
    """What is compared and which end is the better one; smaller and below it, of what."""
    ax.set_title(claim, pad=20 + 12 * setting.count("\n"), fontweight="bold")
    ax.annotate(setting, (0, 1), (0, 7), "axes fraction", "offset points", color=GREY, fontsize=8.5)


def _legend(ax, **place):
    ax.legend(frameon=False, fontsize=8, **place)


def _powers_of_two(ax, values, only_these=False):
    """A logarithmic axis of plain numbers: powers of two as far as the values go, or with `only_these` the values."""
    ax.set_xscale("log", base=2)
    ticks = sorted(set(values))
    if not only_these:
        low, high = math.floor(math.log2(ticks[0])), math.ceil(math.log2(ticks[-1]))
        ticks = [2**n for n in range(low, high + 1, max(1, (high - low) // 5))]
    ax.set_xticks(ticks)
    _plain_numbers(ax.xaxis)


def _plain_numbers(axis):
    axis.set_major_formatter(lambda number, _: f"{number / 1e6:,.0f}M" if number >= 1e6 else f"{number:.8g}")
    axis.set_minor_formatter(lambda number, _: "")
    axis.set_tick_params(which="minor", length=0)


# Of each picture its panels, one below the other, and the results that each shows
PLOTS = {
    "rivals": {("kernels-cpu",): baselines},
    "exactness": {("exactness",): exactness},
    "generation": {("generation-cpu",): generation},
    "scale": {("scale",): scale},
    "members": {("members-cpu",): members, ("conciseness-cpu",): conciseness},
    "countdown": {("countdown_smollm2-cpu",): countdown_smollm2},
    "short-answers": {("short_answers-cpu", "short_answers_trl"): short_answers},
}


def _sources(name):
    return [source for sources in PLOTS[name] for source in sources]


def digest(name):
    """Of the results that a picture shows and of this file."""
    results = [(RESULTS / f"{source}.json").read_bytes() for source in _sources(name)]
    return hashlib.sha256(b"".join(results) + pathlib.Path(__file__).read_bytes()).hexdigest()


def is_current(name):
    """Whether docs/NAME.png was drawn from the present results by the present code."""
    path = DOCS / f"{name}.png"
    return path.exists() and f"Source\0{digest(name)}".encode() in path.read_bytes()


def _figure(rows=1):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update(
        {
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
        }
    )
    figure, axes = pyplot.subplots(rows, 1, figsize=(7.5, 4.2 * rows), layout="constrained", squeeze=False)
    figure.get_layout_engine().set(hspace=0.06)
    return figure, axes[:, 0]


def drawn(name):
    """The figure of docs/NAME.png."""
    figure, axes = _figure(len(PLOTS[name]))
    for ax, (sources, draw) in zip(axes, PLOTS[name].items(), strict=True):
        draw(ax, *(json.loads((RESULTS / f"{source}.json").read_text()) for source in sources))
    return figure


def redraw():
    for name in PLOTS:
        drawn(name).savefig(DOCS / f"{name}.png", dpi=120, metadata={"Source": digest(name)})


def draw_folder(folder, file):
    """Every kind of plot that the folder has results for, one below the other."""
    kinds = {"kernels-*.json": (baselines, sizes), "generation-*.json": (generation,), "exactness.json": (exactness,)}
    wanted = [
        (draw, json.loads(path.read_text()))
        for pattern, draws in kinds.items()
        for path in sorted(folder.glob(pattern))
        for draw in draws
    ]
    figure, axes = _figure(max(1, len(wanted)))
    for ax, (draw, report) in zip(axes, wanted, strict=False):
        try:
            draw(ax, report)
        except (KeyError, ValueError, StopIteration) as error:  # a run that was cut off
            ax.set_title(f"{draw.__name__}: not enough results ({error!r})")
    figure.savefig(file, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--one", type=pathlib.Path, metavar="FILE")
    args = parser.parse_args()
    if args.check:
        stale = [name for name in PLOTS if not is_current(name)]
        sys.exit(
            f"docs/{stale[0]}.png is not of the present results: run python -m bench.publish.plots" if stale else 0
        )
    if args.one:
        draw_folder(args.results or RESULTS, args.one)
    else:
        redraw()


if __name__ == "__main__":
    main()
