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
            label="a member's weights" if what == "member" else f"an update of {seeds} members",
        )
        for place, t in zip(places, times, strict=True):
            ax.text(max(t, 1) * 1.05, place, f"{t:.2g}" if t < 10 else f"{t:.0f}", va="center", fontsize=8)
    ax.axvline(1, color=GREY, lw=0.8)
    ax.set_yticks(range(len(names)), names)
    ax.set_xscale("log")
    ax.set_xlim(right=2.5 * max(r["times_ours"] for r in rows if r["model"] == model))
    ax.set_xlabel(f"times {OURS}")
    ax.set_title(f"{model} shapes, bf16, {_machine(report)}")
    ax.legend(frameon=False, loc="lower right", fontsize=8)


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
    ax.set_xscale("log", base=2)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("elements")
    ax.set_ylabel("bandwidth, copy = 1")
    ax.set_title(_machine(report))
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def generation(ax, report):
    """Share of a generation of 30 members that handling weights takes, by length of the answers; dots: as far as
    answers were timed."""
    models = list(dict.fromkeys(r["model"] for r in report["break_even"]))
    for model, color in zip(models, (BLUE, RED, GREEN), strict=False):
        for way, style in ((REFERENCE, "-"), (OURS, "--")):
            r = next(r for r in report["break_even"] if r["model"] == model and r["way"] == way)
            weights = r["seconds_member"] + r["seconds_update"] / 30
            tokens = list(map(int, r["seconds_answers"]))
            shares = [weights / (weights + seconds) for seconds in r["seconds_answers"].values()]
            ax.plot(tokens, shares, style, color=color, label=f"{model}: {way}")
            # Beyond the longest answer that was waited for the curve is an extrapolation.
            known = [(n, share) for n, share in zip(tokens, shares, strict=True) if n <= r["longest_measured"]]
            ax.plot(*zip(*known, strict=True), "o", color=color, ms=3)
    ax.axhline(0.01, color=GREY, lw=0.8)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    ax.set_xlabel("tokens of an answer (200 questions, N = 30)")
    ax.set_ylabel("handling weights, of a generation")
    ax.set_title(_machine(report))
    ax.legend(frameon=False, fontsize=8)


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
    ax.set_title(
        f"step / ulp {report['add_then_subtract']['step_over_ulp']['0.5']:.2f}, N = {setting['population']}, "
        f"{setting['seeds']} seeds"
    )
    ax.legend(frameon=False, fontsize=8, loc="upper left")


def scale(ax, report):
    """Efficiency against workers, in simulation."""
    for policy, color in (("waves", RED), ("shared counter", SAND), ("re-issued", BLUE), ("dropped", GREEN)):
        rows = [r for r in report["simulated"] if r["policy"] == policy]
        ax.plot(
            [r["workers"] for r in rows],
            [r["efficiency"] for r in rows],
            color=color,
            lw=1.5,
            marker="o",
            ms=4,
            label=policy,
        )
    ax.set_xscale("log", base=2)
    ax.set_xticks([r["workers"] for r in rows], [str(r["workers"]) for r in rows])
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    ax.set_xlabel("workers")
    ax.set_ylabel("share of their time that counts")
    a = report["assumed"]
    ax.set_title(
        f"Simulated: {a['members_a_worker']} members a worker, {a['stragglers']:.0%} of them {a['straggle']:.0f} times "
        "as long, workers that die"
    )
    ax.legend(frameon=False, fontsize=8, loc="upper right")


def _machine(report):
    return report["machine"].get("gpu", report["machine"]["processor"])


def members(ax, report):
    """Tokens a second against members, of the model with most points."""
    of = {}
    for row in report["rows"]:
        if row["prompts"] == 8:
            of.setdefault(row["model"], []).append(row)
    model, rows = max(of.items(), key=lambda entry: len(entry[1]))
    for way, color in (("plain", GREY), ("one batch", BLUE), ("one by one", RED)):
        ax.plot(
            [row["members"] for row in rows],
            [row["ways"][way]["tokens_per_s"] for row in rows],
            "o-",
            color=color,
            label={"plain": "plain inference, as many rows", "one batch": "members in one batch"}.get(way, way),
        )
    ax.set_ylim(bottom=0)
    ax.set_xlabel(f"members, {rows[0]['prompts']} prompts each")
    ax.set_ylabel("tokens a second (higher is better)")
    ax.set_title(f"{model}, noise of rank {report['noise_rank']}, {_machine(report)}")
    ax.legend(frameon=False)


def conciseness(ax, report):
    """Reward against the seconds that generations took: of each generation's members, and held out before and after."""
    colors = dict(zip(dict.fromkeys(run["way"] for run in report["runs"]), (RED, BLUE), strict=True))
    for run in report["runs"]:
        minutes = [generation["until"] / 60 for generation in run["generations"]]
        rewards = [generation["reward"] for generation in run["generations"]]
        color, first = colors[run["way"]], run["seed"] == 0
        label = f"{run['way']}: {len(minutes)} generation{'s' * (len(minutes) > 1)}" if first else None
        ax.plot(minutes, rewards, "o-", color=color, label=label)
        held_out = "held-out questions, before and after" if first else None
        ax.plot([0, minutes[-1]], [run["base"], run["final"]], "x:", color=color, label=held_out)
    ax.set_xlabel("minutes of generations")
    ax.set_ylabel("mean reward (higher is better)")
    setting = report["setting"]
    ax.set_title(
        f"{report['model']}, conciseness, {setting['population']} members x {setting['prompts']} prompts, "
        f"{_machine(report)}, one thread a run"
    )
    ax.legend(frameon=False)


# Of each picture its panels, one below the other, and their results
PLOTS = {
    "rivals": {"kernels-cpu": baselines},
    "exactness": {"exactness": exactness},
    "generation": {"generation-cpu": generation},
    "scale": {"scale": scale},
    "members": {"members-cpu": members, "conciseness-cpu": conciseness},
}


def digest(name):
    """Of the results that a picture shows and of this file."""
    results = [(RESULTS / f"{source}.json").read_bytes() for source in PLOTS[name]]
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
    return pyplot.subplots(rows, 1, figsize=(7.5, 4.2 * rows), layout="constrained", squeeze=False)


def redraw():
    for name, panels in PLOTS.items():
        figure, axes = _figure(len(panels))
        for ax, (source, draw) in zip(axes[:, 0], panels.items(), strict=True):
            draw(ax, json.loads((RESULTS / f"{source}.json").read_text()))
        figure.savefig(DOCS / f"{name}.png", dpi=120, metadata={"Source": digest(name)})


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
    for ax, (draw, report) in zip(axes[:, 0], wanted, strict=False):
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
