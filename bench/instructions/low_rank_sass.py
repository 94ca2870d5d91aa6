"""The SASS that a value costs in the kernel of csrc/cuda.cu for noise of low rank: rows for static_analysis.py.

A block of 8 warps has a tile of 128 x 128 values, 64 a thread. At rank 1:

- a round of an update is one trip through the loop over rounds: a warp draws the factors of one seed, each thread adds
  8 terms to its 64 values;
- a perturbation is one trip through the loop over tiles: load, one term, store; one warp of the 8 draws the factors,
  and one finds the tile.
"""

import re

from bench.instructions import sass

WARPS, VALUES, TERMS = 8, 64, 8


def rows(code, kernel):
    """{label: (instructions that a block of threads executes once for each warp, values)}. kernel: "" or
    " stochastic"."""
    loops = sass.outer_loops(code)
    term = next((a, b) for a, b in loops if b - a < 2 * VALUES and _count(code[a : b + 1], "FFMA") == VALUES)
    around = [(a, b) for a, b in loops if a < term[0] and term[1] < b]
    rounds, tiles = sorted(around, key=lambda loop: loop[1] - loop[0])[:2]
    inside = [k for k in range(*rounds) if not term[0] <= k <= term[1]]
    drawn = next(k for k in inside if sass.normals(code[k : k + 1]))
    barriers = [k for k in inside if code[k].text.startswith("BAR") and sass.path(code, drawn, k)]
    barrier = min(barriers, key=lambda k: len(sass.path(code, drawn, k)))
    found = {}

    for k in inside:
        if code[k].text.startswith("FFMA"):
            trip = sass.path(code, rounds[0], drawn, barrier, k, rounds[1])
            if trip and _count(trip, "FFMA") > TERMS * VALUES:
                found[f"update{kernel} rank 1"] = trip, TERMS * VALUES
                break

    other = sass.path(code, rounds[0], barrier)
    once = _beside(sass.path(code, rounds[0], drawn, barrier), other)
    first_barrier = next(k for k in range(*tiles) if code[k].text.startswith("BAR"))
    written = [k for k in range(tiles[0], first_barrier) if code[k].text.startswith("STS")]
    once += _beside(sass.path(code, tiles[0], *written, first_barrier), sass.path(code, tiles[0], first_barrier))
    loads, stores = (
        [k for k in range(*tiles) if not rounds[0] <= k <= rounds[1] and re.match(rf"{name}\S*\.128", code[k].text)]
        for name in ("LDG", "STG")
    )
    before = _shortest(
        (_base(trip), trip)
        for k in loads
        if (trip := sass.path(code, tiles[0], k, rounds[0])) and not sass.normals(trip)
    )
    after = _shortest(
        (_out(trip, kernel), trip) for k in stores if (trip := sass.path(code, term[1], rounds[1], k, tiles[1]))
    )
    middle = sass.path(code, rounds[0], barrier, term[1])
    for base, head in before.items():
        for out, tail in after.items():
            if base in (out, "f32"):
                trip = head + middle[1:] + tail[1:]
                found[f"perturb{kernel} rank 1 {out} <- {base}"] = trip * WARPS + once, WARPS * VALUES
    return found


def _count(trip, name):
    return sum(i.text.startswith(name) for i in trip)


def _beside(longer, shorter):
    """What one way takes beyond another."""
    known = {i.address for i in shorter}
    return [i for i in longer if i.address not in known]


def _shortest(labelled):
    best = {}
    for label, trip in labelled:
        if label and (label not in best or len(trip) < len(best[label])):
            best[label] = trip
    return best


def _base(trip):
    loads = sum(i.text.startswith("LDG") and ".128" in i.text for i in trip)
    if loads == 16:
        return "f32"
    return ("f16" if _count(trip, "HADD2.F32") else "bf16") if loads == 8 else None


def _out(trip, kernel):
    stores = sum(i.text.startswith("STG") and ".128" in i.text for i in trip)
    if stores == 16:
        return "f32"
    if kernel:  # rounded by integers: f16 has a case for its subnormals
        bf16 = not any(i.text.startswith("F2I") for i in trip)
    else:
        bf16 = any("BF16" in i.text for i in trip)
    return ("bf16" if bf16 else "f16") if stores == 8 else None
