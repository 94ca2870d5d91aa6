"""Statistics of the noise: its words through dieharder, and 1e9 normals of the CPU kernel against the exact law of the
transform.

    python -m bench.noise.noise_stats [--values 1000000000] [--json bench/results/noise_stats.json]

It takes minutes on two cores. The normals are not compared with N(0, 1): at 1e9 values the transform's CDF error of
4.91e-5 (fit_noise.py) is within reach, and so known. They are compared with the law that an enumeration of all 2^32
words gives, whose own distance to N(0, 1) is that figure. In one thing the law differs from exact Box-Muller: x^2 and
y^2 of a pair correlate by -0.0024 instead of 0, because the polynomials for cos and sin were fitted to x and to y, not
to cos^2 + sin^2 = 1. Everything is a function of RUN_SEED, so a second run prints the same p-values. Exit code 1 if a
p-value is below 1e-6 after Bonferroni.

dieharder: `apt install dieharder`. (PractRand is neither in Debian nor on PyPI.) Without it the words are reported as
not run.
"""

import argparse
import fcntl
import itertools
import json
import math
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time

import numpy as np
import torch

import es_kernels
from bench import RESULTS
from bench.noise import fit_noise
from es_kernels import noise

RUN_SEED = 0
GATE = 1e-6

# ---- p-values ----


def p_of_z(z):
    return math.erfc(abs(z) / math.sqrt(2))


def p_of_ks(distance, n):
    """Kolmogorov's distribution with Stephens' correction for n."""
    t = distance * (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n))
    if t < 0.3:
        return 1.0  # to 1e-5
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * t) ** 2) for k in range(1, 101)))


def z_of_chi2(chi2, freedom):
    """Wilson and Hilferty: about N(0, 1) for the hundreds of degrees of freedom here."""
    v = 2 / (9 * freedom)
    return ((chi2 / freedom) ** (1 / 3) - (1 - v)) / math.sqrt(v)


# ---- words ----

BATCH = 2**14  # blocks made at once: fits a cache
STREAMS, MEMBERS = 256, 4096  # so many streams or members take turns at a block

# dieharder's own reliability is "good" for all of these. Left out: 5, 6, 7 ("suspect"), 14 ("do not use"), and for
# their time 10, 17, 201.
DIEHARDER = [
    (d, None) for d in (0, 1, 2, 3, 4, 8, 9, 11, 12, 13, 15, 16, 100, 101, 102, 202, 204, 205, 206, 207, 208, 209)
]
# Tuples of bits; sums of every 4th and 8th word
DIEHARDER += [(200, n) for n in (2, 4, 8)] + [(203, n) for n in (3, 7)]


def member_seeds(members):
    """noise.member_seed(RUN_SEED, 0, k) of k < members, as keys u32 [members, 2]."""
    counter = np.zeros((members, 4), np.uint32)
    counter[:, 1], counter[:, 2] = noise.DOMAIN_SEED << 29, np.arange(members)
    return noise.philox4x32(counter, np.array([RUN_SEED & 0xFFFFFFFF, RUN_SEED >> 32], np.uint32))[:, :2]


def words(order, first):
    """Endless arrays of u32, from block `first` on, in one of three orders: what a tensor reads; the same block of one
    stream after another; the same block of one member after another."""
    keys, streams = (
        member_seeds(MEMBERS),
        [noise.stream_id(f"model.layers.{i}.mlp.down_proj.weight") for i in range(STREAMS)],
    )
    if order == "one stream":
        keys, streams = keys[:1], streams[:1]
    elif order == "streams in turn":
        keys = keys[:1]
    elif order == "members in turn":
        streams = streams[:1]
    each = len(keys) * len(streams)
    counter = np.empty((BATCH // each, each, 4), np.uint32)
    counter[..., 2], counter[..., 3] = [s & 0xFFFFFFFF for s in streams], [s >> 32 for s in streams]
    for start in itertools.count(first, len(counter)):
        block = np.arange(start, start + len(counter), dtype=np.uint64)[:, None]
        counter[..., 0], counter[..., 1] = block & np.uint64(0xFFFFFFFF), block >> np.uint64(32)  # domain 0
        yield noise.philox4x32(counter, keys)


ORDERS = ("one stream", "streams in turn", "members in turn")


def dieharder(order, place, test, ntuple):
    """One test of dieharder on the words from block `place` << 34 on: its p-values as rows."""
    command = ["dieharder", "-g", "200", "-d", str(test), "-c", ","]
    command += [] if ntuple is None else ["-n", str(ntuple)]
    for column in ("test_name", "ntuple", "tsamples", "psamples", "pvalues"):
        command += ["-D", column]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    fcntl.fcntl(process.stdin, fcntl.F_SETPIPE_SZ, 1 << 20)
    eaten = 0
    try:
        for chunk in words(order, place << 34):
            data = memoryview(np.ascontiguousarray(chunk)).cast("B")
            while data:
                sent = process.stdin.write(data)
                data, eaten = data[sent:], eaten + sent
    except BrokenPipeError:
        pass  # it has read enough
    process.stdin.close()
    out, err = process.stdout.read().decode(), process.stderr.read().decode()
    rows = []
    for line in out.splitlines():
        fields = [f.strip() for f in line.split(",")]
        if len(fields) >= 5 and fields[2].isdigit():
            rows.append(
                {
                    "order": order,
                    "test": fields[0],
                    "ntuple": int(fields[1]),
                    "tsamples": int(fields[2]),
                    "psamples": int(fields[3]),
                }
            )
            rows[-1] |= {"p": float(fields[4]), "words": eaten // 4}
    if process.wait() or not rows:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}, no p-value in {out!r} {err!r}")
    return rows


def run_dieharder():
    """(rows, version of dieharder), or (None, why not)."""
    if not shutil.which("dieharder"):
        return None, "not run: no dieharder on PATH (apt install dieharder)"
    version = subprocess.run(["dieharder", "-l"], capture_output=True, text=True).stdout.split("version")[1].split()[0]
    rows = []
    for order in ORDERS:
        start = time.perf_counter()
        for place, (test, ntuple) in enumerate(DIEHARDER, 1):
            rows += dieharder(order, place, test, ntuple)
        p = [r["p"] for r in rows if r["order"] == order]
        print(
            f"dieharder, {order}: {len(p)} p-values, {min(p):.2g} .. {max(p):.6f}, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return rows, version


# ---- normals ----

LAGS, LONG_LAGS = range(1, 65), [2**k for k in range(7, 17)]  # elements; a long lag is 2^4 .. 2^13 blocks
NAMES = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(4)]
SEQUENCES = [(member, name) for member in range(4) for name in NAMES]
CHUNK = 2**17  # values of each of the 16 sequences at a time
LARGEST = 5.5


class Law:
    """The distribution of x and of y (the even and the odd lanes), by enumeration of all words.

    moments[k]: E of the k-th power, mean of x and y; 0 for odd k, exactly, since bit 0 of the word is the sign of both.
    error[k]: standard deviation of (x^k + y^k) / 2. edges; probabilities [2, bins] of the histogram's bins.
    """

    def __init__(self, bins_per_unit):
        r, cx, cy = fit_noise.enumerate_factors()

        def joint(i, j):
            """E x^i y^j, i + j even."""
            return (r ** (i + j)).mean() * (cx**i * cy**j).mean()

        self.moments = {k: 0.0 if k % 2 else (joint(k, 0) + joint(0, k)) / 2 for k in range(1, 7)}
        self.error = {
            k: math.sqrt((joint(2 * k, 0) + joint(0, 2 * k) + 2 * joint(k, k)) / 4 - self.moments[k] ** 2)
            for k in range(1, 7)
        }
        self.square_variance = joint(4, 0) / 2 + joint(0, 4) / 2 - self.moments[2] ** 2
        self.pair_covariance = {1: joint(1, 1), 2: joint(2, 2) - joint(2, 0) * joint(0, 2)}  # of x, y and of x^2, y^2
        self.pair_correlation_of_squares = self.pair_covariance[2] / self.square_variance  # 0 in exact Box-Muller
        self.bins_per_unit = bins_per_unit
        positive = np.arange(1, round(LARGEST * bins_per_unit) + 1) / bins_per_unit
        self.edges = np.concatenate([-positive[::-1], [0.0], positive])
        r = np.sort(np.abs(r))
        cdf = []
        for c in (cx, cy):
            c = np.abs(c[: len(c) // 2])  # t and -t
            inside = np.zeros(len(positive))
            for part in np.array_split(c, 64):
                inside += np.searchsorted(r, positive / part[:, None], side="right").sum(0)
            inside /= len(r) * len(c)
            cdf.append(np.concatenate([(1 - inside[::-1]) / 2, [0.5], (1 + inside) / 2]))
        self.cdf = np.stack(cdf)
        self.probabilities = np.diff(self.cdf)
        ideal = np.array([math.erfc(-e / math.sqrt(2)) / 2 for e in self.edges])
        self.distance_to_normal = float(np.abs(self.cdf - ideal).max())
        self.ideal = ideal


def chunks(values):
    """At least `values` normals as float32 [16, CHUNK], one buffer: SEQUENCES, consecutive elements from 0 on, by the
    CPU kernel."""
    out = torch.empty(len(SEQUENCES), CHUNK)
    seeds = [noise.member_seed(RUN_SEED, 0, member) for member in range(4)]
    for k in range(math.ceil(values / out.numel())):
        out.zero_()
        for member, rows in enumerate(out.split(len(NAMES))):
            table = es_kernels.ParamTable(
                [
                    (n, row, [es_kernels.Segment(n, 1, CHUNK, first=k * CHUNK)])
                    for n, row in zip(NAMES, rows, strict=True)
                ]
            )
            es_kernels.add_noise_(table, seeds[member], 1.0)
        yield out


class Statistics:
    """Sums over chunks [sequences, n], n a multiple of 64; `rows()` compares them with the law."""

    def __init__(self, law, labels):
        """labels: (member, name) of each sequence."""
        self.law, self.labels, self.values, self.chunks = law, labels, 0, 0
        self.powers = dict.fromkeys(range(1, 7), 0.0)
        self.histogram = np.zeros((2, len(law.edges) - 1), np.int64)
        # Of x (1) and of x^2 - E x^2 (2): products within and across rows of 64, at long lags, and of two sequences at
        # the same place.
        self.within, self.across, self.long, self.cross = ({1: 0.0, 2: 0.0} for _ in range(4))
        self.long_lags = LONG_LAGS

    def add(self, x):
        s, n = x.shape
        self.shape, self.values, self.chunks = (s, n), self.values + x.numel(), self.chunks + 1
        wide = x.double()
        power = wide
        for k in self.powers:
            self.powers[k] += power.sum().item()
            power = power * wide
        # Exact: a power of two
        bins = (x * self.law.bins_per_unit).floor_().to(torch.int32).numpy() + np.int32(len(self.law.edges) // 2)
        for lane in (0, 1):
            self.histogram[lane] += np.bincount(bins[:, lane::2].ravel(), minlength=self.histogram.shape[1])
        for k, z in ((1, x), (2, (wide * wide).sub_(self.law.moments[2]).float())):
            rows = z.view(s, n // 64, 64)
            self.within[k] += (rows.mT @ rows).sum(0, dtype=torch.float64).numpy()
            self.across[k] += (rows[:, :-1].mT @ rows[:, 1:]).sum(0, dtype=torch.float64).numpy()
            self.long[k] += np.array([sum(torch.dot(q[:-lag], q[lag:]).item() for q in z) for lag in self.long_lags])
            self.cross[k] += (z @ z.T).double().numpy()

    def rows(self):
        """Every statistic with value, expectation, standard error, z and p. `independent` ones have uncorrelated
        errors."""
        law, out = self.law, []

        def row(group, name, n, value, expected, error, independent=False):
            z = (value - expected) / error
            out.append(
                {
                    "group": group,
                    "name": name,
                    "n": int(n),
                    "value": value,
                    "expected": expected,
                    "error": error,
                    "z": z,
                    "p": p_of_z(z),
                    "independent": independent,
                }
            )

        for k, total in self.powers.items():
            row(
                "moments",
                f"E x^{k}",
                self.values,
                total / self.values,
                law.moments[k],
                law.error[k] / math.sqrt(self.values / 2),
            )

        for lane, which in enumerate(("x", "y")):
            counts, p, n = self.histogram[lane], law.probabilities[lane], self.values // 2
            distance = np.abs(np.concatenate([[0], np.cumsum(counts)]) / n - law.cdf[lane]).max()
            to_normal = np.abs(np.concatenate([[0], np.cumsum(counts)]) / n - law.ideal).max()
            out.append(
                _ks_row("distribution", f"KS distance of {which}", n, float(distance))
                | {"distance_to_normal": float(to_normal)}
            )
            full = p * n >= 50  # the rest, beyond, in two bins
            middle = np.flatnonzero(full)[[0, -1]] + [0, 1]
            counts, p = _pooled(counts, *middle), _pooled(p, *middle)
            keep = p * n >= 1
            chi2 = float(((counts - p * n)[keep] ** 2 / (p * n)[keep]).sum())
            freedom = int(keep.sum()) - 1
            row("distribution", f"chi2 of {which}", n, z_of_chi2(chi2, freedom), 0.0, 1.0)
            out[-1] |= {"chi2": chi2, "bins": freedom + 1}

        (s, n), parts = self.shape, self.values / self.shape[1]  # `parts` runs of n values
        for k, what, variance in ((1, "x", law.moments[2]), (2, "x^2", law.square_variance)):
            within, across, pair = self.within[k], self.across[k], law.pair_covariance[k] / variance

            def correlation(group, name, total, count, expected=0.0, independent=True, what=what, variance=variance):
                row(
                    f"{group}, {what}",
                    name,
                    count,
                    float(total) / (count * variance),
                    expected,
                    1 / math.sqrt(count),
                    independent,
                )

            for lag in LAGS:
                total = np.trace(within, lag) + np.trace(across, lag - 64)
                correlation("lags", f"lag {lag}", total, parts * (n - lag), pair / 2 if lag == 1 else 0.0)
            for lag, total in zip(self.long_lags, self.long[k], strict=True):
                correlation("lags", f"lag {lag}", total, parts * (n - lag))
            blocks = within.reshape(8, 8, 8, 8)  # block, lane, block, lane
            for i, j in itertools.combinations(range(8), 2):
                total = sum(blocks[b, i, b, j] for b in range(8))
                correlation(
                    "lanes",
                    f"lanes {i}, {j} of a block",
                    total,
                    parts * n / 8,
                    pair if j == i + 1 and i % 2 == 0 else 0.0,
                    False,
                )
            for i, j in itertools.product(range(8), range(8)):
                total = sum(blocks[b, i, b + 1, j] for b in range(7)) + across[56 + i, j]
                correlation("lanes", f"lane {i}, lane {j} of the next block", total, parts * (n / 8 - 1), 0.0, False)
            for a, b in itertools.combinations(range(s), 2):
                (m1, s1), (m2, s2) = self.labels[a], self.labels[b]
                group = "streams" if m1 == m2 else "members" if s1 == s2 else "streams and members"
                correlation(group, f"member {m1} {s1}, member {m2} {s2}", self.cross[k][a, b], self.values / s)

        p = np.sort([r["p"] for r in out if r["independent"]])
        steps = np.arange(len(p) + 1) / len(p)
        distance = float(max((steps[1:] - p).max(), (p - steps[:-1]).max()))
        out.append(_ks_row("all", "KS of the independent p-values to uniform", len(p), distance))
        return out


def _ks_row(group, name, n, distance):
    row = {"group": group, "name": name, "n": n, "value": distance, "expected": None, "error": None, "z": None}
    return row | {"p": p_of_ks(distance, n), "independent": False}


def _pooled(bins, first, end):
    """What lies before `first` and from `end` on becomes one bin each."""
    return np.concatenate([[bins[:first].sum()], bins[first:end], [bins[end:].sum()]])


def check_definition():
    """The kernel's values are those of noise.py, where the statistics start."""
    ours = next(chunks(1))[5, :4096].numpy()
    member, name = SEQUENCES[5]
    expected = noise.normal(noise.member_seed(RUN_SEED, 0, member), noise.stream_id(name), np.arange(4096))
    if not np.array_equal(ours.view(np.int32), expected.view(np.int32)):
        raise SystemExit("the CPU kernel's bits are not those of noise.py: nothing measured")


def worst(p):
    """The smallest p-value after Bonferroni."""
    return min(p) * len(p)


def summary(rows):
    """group -> count, largest |z| and smallest p."""
    out = {}
    for r in rows:
        group = out.setdefault(r["group"], {"statistics": 0, "largest |z|": 0.0, "smallest p": 1.0})
        group["statistics"] += 1
        group["largest |z|"] = max(group["largest |z|"], abs(r["z"] or 0))
        group["smallest p"] = min(group["smallest p"], r["p"])
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--values", type=float, default=1e9, help="normals")
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS / "noise_stats.json")
    args = parser.parse_args()

    check_definition()
    start = time.perf_counter()
    law = Law(512)
    statistics = Statistics(law, SEQUENCES)
    for x in chunks(args.values):
        statistics.add(x)
    rows = statistics.rows()
    seconds = time.perf_counter() - start
    print(
        f"{statistics.values} normals, {seconds:.0f} s. Distance of their exact law to N(0, 1): "
        f"{law.distance_to_normal:.3g}; x^2, y^2 of a pair correlate {law.pair_correlation_of_squares:.2g}"
    )
    for group, figures in summary(rows).items():
        print(
            f"{group:26} {figures['statistics']:4} statistics   largest |z| {figures['largest |z|']:5.2f}   smallest p "
            f"{figures['smallest p']:.2g}"
        )
    for r in rows:
        if r["group"] in ("moments", "distribution", "all") or r["name"] == "lanes 0, 1 of a block":
            z = "" if r["z"] is None else f"z {r['z']:5.2f}"
            name = r["name"] + r["group"].partition(",")[2].replace(" x", ", x")
            print(f"  {name:42} {r['value']:14.8f} {z:8} p {r['p']:.3f}")

    word_start = time.perf_counter()
    word_rows, dieharder_version = run_dieharder()
    word_seconds = time.perf_counter() - word_start
    if word_rows is None:
        print(f"words: {dieharder_version}")
    gates = {"normals": worst([r["p"] for r in rows])}
    if word_rows:
        # Printed with 8 digits: 0 and 1 stand for anything beyond.
        gates["words"] = worst([2 * min(r["p"], 1 - r["p"]) for r in word_rows])
    for what, p in gates.items():
        print(f"{what}: smallest p-value after Bonferroni {min(p, 1):.2g}: {'FAILED' if p < GATE else 'passed'}")

    versions = {
        "es_kernels": es_kernels.__version__,
        "noise": noise.VERSION,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    versions |= {"python": platform.python_version(), "dieharder": dieharder_version if word_rows else None}
    report = {
        "values": statistics.values,
        "run_seed": RUN_SEED,
        "versions": versions,
        "cores": os.cpu_count(),
        "seconds": {"normals": seconds, "words": word_seconds},
    }
    report |= {
        "law": {
            "distance_to_normal": law.distance_to_normal,
            "moments": law.moments,
            "pair_correlation_of_squares": law.pair_correlation_of_squares,
        }
    }
    report |= {
        "bonferroni": gates,
        "summary": summary(rows),
        "words": dieharder_version if word_rows is None else word_rows,
        "normals": rows,
    }
    lines = ",\n".join(
        f' "{key}": '
        + (
            "[\n  " + ",\n  ".join(json.dumps(r) for r in value) + "\n ]"
            if isinstance(value, list)
            else json.dumps(value)
        )
        for key, value in report.items()
    )
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text("{\n" + lines + "\n}\n")
    return 1 if min(gates.values()) < GATE else 0


if __name__ == "__main__":
    sys.exit(main())
