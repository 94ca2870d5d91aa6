"""The targets of the GPU kernels on an H200, and whether they are reached. Each figure is read from the files that
gpu.sh, tune.py and generation.py leave.

    python -m bench.publish.targets [FOLDER]     print a table; without measurements it says so
"""

import argparse
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

from bench import RESULTS

MODEL = "Qwen2.5-7B"
OURS, REFERENCE = "es_kernels, master fp32", "es-at-scale"  # methods, as result files name them


class Target(NamedTuple):
    what: str
    bound: float
    at_most: bool  # else: at least
    measured: Callable  # of {kind: report} of one machine; a KeyError or StopIteration means that it was not measured
    form: str = "{:.1%}"
    why_not: Callable = lambda reports: None  # of the same: why it could not be, in words, if that is known


def _shipped(reports, operation, key, variant="as shipped", backend="cuda"):
    """Of tune.py, on tensors that fill the GPU."""
    return next(
        row[key]
        for row in reports["variants"]["rows"]
        if (row["backend"], row["operation"], row["variant"]) == (backend, operation, variant)
    )


def _of_floor(operation, floor):
    """Share of the speed of the same kernel without noise, in the same rounds."""
    return lambda reports: _shipped(reports, operation, "times_shipped", floor)


def _triton(operation):
    """Its speed in that of CUDA, each beside the copy of its own rounds."""
    return lambda reports: (
        _shipped(reports, operation, "share_of_copy", backend="triton") / _shipped(reports, operation, "share_of_copy")
    )


def _reference(what, master):
    """The reference's seconds over ours."""

    def ratio(reports):
        seconds = {
            row["who"]: row["seconds"]
            for row in reports["kernels"]["rivals"]
            if row["model"] == MODEL and row["what"] == what
        }
        return seconds[REFERENCE] / seconds[f"es_kernels, master {master}"]

    return ratio


def _extra_memory(reports):
    rows = [
        row for row in reports["kernels"]["rivals"] if row["model"] == MODEL and row["who"].startswith("es_kernels")
    ]
    return max(row["peak_extra_bytes"] for row in rows) if rows else _missing()


def _slowest_table(reports):
    rows = [
        row["times_flat"] for row in reports["kernels"]["tables"] if row["model"] == MODEL and row["backend"] == "cuda"
    ]
    return max(rows) if rows else _missing()


def _share_outside(model):
    def share(reports):
        wanted = (model, "countdown, 1024 tokens", OURS)
        return next(
            1 - row["answers"] / row["total"]
            for row in reports["generation"]["generations"]
            if (row["model"], row["workload"], row["way"]) == wanted
        )

    return share


def _left_out(kind, what=None, who=()):
    """Of kernels.py: why it has no rows of a kind for MODEL, or none of what is done by whom."""

    def why(reports):
        for entry in reports.get("kernels", {}).get("left_out", ()):
            if (
                (entry["kind"], entry.get("model")) == (kind, MODEL)
                and entry.get("what") in (None, what)
                and entry.get("who") in (None, *who)
            ):
                return entry["why"]

    return why


def _no_generation(model):
    """Of generation.py, which names what it left out first."""

    def why(reports):
        for entry in reports.get("generation", {}).get("left_out", ()):
            if entry.startswith(f"{model}: too little memory"):
                return entry.removeprefix(f"{model}: ")

    return why


def _missing():
    raise KeyError("not measured")


TARGETS = [
    Target(
        "bf16 in place: share of a copy's bandwidth",
        0.9,
        False,
        lambda r: _shipped(r, "perturb bf16 in place", "share_of_copy"),
    ),
    Target(
        "bf16 <- f32, the default: share of the noise-free twin",
        0.95,
        False,
        _of_floor("perturb bf16 <- f32", "no noise"),
    ),
    Target("f32 in place: share of the noise-free twin", 0.95, False, _of_floor("perturb f32 in place", "no noise")),
    Target(
        "update, 30 seeds: normals a second",
        1.3e12,
        False,
        lambda r: _shipped(r, "update f32 in place, 30 seeds", "normals_per_s"),
        "{:.3g}",
    ),
    Target(
        "swap bf16 in place: share of a copy's bandwidth",
        0.7,
        False,
        lambda r: _shipped(r, "swap bf16 in place", "share_of_copy"),
    ),
    Target(
        f"one launch for {MODEL}: times a flat tensor, the slowest operation",
        1.03,
        True,
        _slowest_table,
        "{:.3f}",
        _left_out("tables"),
    ),
    Target("fingerprint bf16: share of reading alone", 0.9, False, _of_floor("fingerprint bf16", "no keys")),
    *(
        Target(f"Triton, {operation}: share of CUDA's speed", 0.85, False, _triton(operation))
        for operation in (
            "perturb bf16 <- f32",
            "perturb bf16 in place",
            "perturb f32 in place",
            "update f32 in place, 30 seeds",
        )
    ),
    *(
        Target(
            f"es-at-scale over ours, {words}",
            bound,
            False,
            _reference(what, master),
            "{:.2f}",
            _left_out("rivals", what, (REFERENCE, f"es_kernels, master {master}")),
        )
        for words, bound, what, master in (
            (f"a member of {MODEL}, master copy", 5.5, "member", "copy"),
            (f"a member of {MODEL}, master fp32", 3.8, "member", "fp32"),
            (f"the update of {MODEL} by 30 seeds", 4.5, "update", "fp32"),
        )
    ),
    Target(f"temporary memory of ours with {MODEL}, bytes", 1e6, True, _extra_memory, "{:.3g}", _left_out("rivals")),
    *(
        Target(
            f"outside generation, {model}, 1024 tokens: share of the time",
            0.01,
            True,
            _share_outside(model),
            "{:.2%}",
            _no_generation(model),
        )
        for model in ("Qwen2.5-0.5B", "Qwen2.5-1.5B", MODEL)
    ),
]


def reports(folder):
    """{machine: {kind: content}} of every GPU's files in a folder."""
    by_machine = {}
    for kind in ("kernels", "variants", "generation"):
        for path in sorted(folder.glob(f"{kind}-*.json")):
            content = json.loads(path.read_text())
            if "gpu" in content["machine"]:
                by_machine.setdefault(content["machine"]["gpu"], {})[kind] = content
    return by_machine


def rows(of_machine):
    """(what, target, measured, whether it was reached) of each target. Where nothing was measured the last is
    None, and the third why (a model that the GPU's memory cannot hold, say), if that is known."""
    verdicts = []
    for target in TARGETS:
        wanted = ("at most " if target.at_most else "") + target.form.format(target.bound)
        try:
            value = target.measured(of_machine)
        except (KeyError, StopIteration):
            verdicts.append((target.what, wanted, target.why_not(of_machine), None))
            continue
        verdicts.append(
            (
                target.what,
                wanted,
                target.form.format(value),
                value <= target.bound if target.at_most else value >= target.bound,
            )
        )
    return verdicts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, nargs="?", default=RESULTS)
    for machine, kinds in (reports(parser.parse_args().folder) or {"no GPU was measured": {}}).items():
        print(machine)
        for what, wanted, measured, reached in rows(kinds):
            print(
                f"  {what:80} {wanted:>16}  {measured or 'not measured':>12}  "
                f"{'' if reached is None else 'reached' if reached else 'MISSED'}"
            )


if __name__ == "__main__":
    main()
