"""The SASS that a value costs in the kernels of csrc/cuda.cu for noise of low rank: rows for static_analysis.py.

A block of 8 warps has a tile of 128 x 128 values, 64 a thread. At rank 1:

- a round of an update is one trip through the loop over seeds: a warp draws the factors of two seeds, each thread adds
  16 terms to its 64 values;
- a perturbation is one trip through the loop over tiles: load, one term, store; one warp of the 8 draws the factors,
  and one finds the tile.
"""

import re

from bench.instructions import sass

WARPS, VALUES, TERMS = 8, 64, 16


def rows(code, kernel, update):
    """{label: (instructions that a block of threads executes once for each warp, values)}. kernel: "" or
    " stochastic"; update: whether the code is that of many seeds."""
    loops = sass.outer_loops(code)
    term = next((a, b) for a, b in loops if b - a < 2 * VALUES and _count(code[a : b + 1], "FFMA") == VALUES)
    ranks, seeds_or_tiles = sorted((loop for loop in loops if _inside(term, loop)), key=_length)[:2]
    seed = min((loop for loop in loops if _inside(loop, ranks) and sass.normals(code[slice(*loop)])), key=_length)
    drawn = next(k for k in range(*seed) if sass.normals(code[k : k + 1]))
    barriers = [k for k in range(*ranks) if code[k].text.startswith("BAR") and sass.path(code, drawn, k)]
    barrier = min(barriers, key=lambda k: len(sass.path(code, drawn, k)))
    if update:
        first, last = seeds_or_tiles
        draw = [drawn, seed[1]] * (TERMS // WARPS)
        trips = (
            sass.path(code, first, *draw, barrier, k, last)
            for k in range(barrier, ranks[1])
            if code[k].text.startswith("FFMA") and not term[0] <= k <= term[1]
        )
        trip = next(trip for trip in trips if trip and _count(trip, "FFMA") > TERMS * VALUES)
        return {f"update{kernel} rank 1": (trip, TERMS * VALUES)}

    tiles = seeds_or_tiles
    once = _beside(sass.path(code, ranks[0], drawn, barrier), sass.path(code, ranks[0], barrier))
    first_barrier = next(k for k in range(*tiles) if code[k].text.startswith("BAR"))
    written = [k for k in range(tiles[0], first_barrier) if code[k].text.startswith("STS")]
    once += _beside(sass.path(code, tiles[0], *written, first_barrier), sass.path(code, tiles[0], first_barrier))
    loads, stores = (
        [k for k in range(*tiles) if not ranks[0] <= k <= ranks[1] and re.match(rf"{name}\S*\.128", code[k].text)]
        for name in ("LDG", "STG")
    )
    before = _shortest(
        (_base(trip), trip)
        for k in loads
        if (trip := sass.path(code, tiles[0], k, ranks[0])) and not sass.normals(trip)
    )
    after = _shortest(
        (_out(trip, kernel), trip) for k in stores if (trip := sass.path(code, term[1], ranks[1], k, tiles[1]))
    )
    middle = sass.path(code, ranks[0], barrier, term[1])
    found = {}
    for base, head in before.items():
        for out, tail in after.items():
            if base in (out, "f32"):
                trip = head + middle[1:] + tail[1:]
                found[f"perturb{kernel} rank 1 {out} <- {base}"] = trip * WARPS + once, WARPS * VALUES
    return found


def _length(loop):
    return loop[1] - loop[0]


def _inside(inner, outer):
    return outer[0] <= inner[0] and inner[1] <= outer[1] and inner != outer


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
