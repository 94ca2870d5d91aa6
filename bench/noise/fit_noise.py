"""Derives the polynomial constants of the noise, and measures the distribution that they give.

    python -m bench.noise.fit_noise                  measure the shipped constants, by enumeration (seconds)
    python -m bench.noise.fit_noise --fit --polish   derive others (half an hour; needs scipy), print and measure them

What is fitted is not log, sqrt, sin and cos but the quantity that matters: the error of the distribution function of
the normals, over a grid that is log-spaced toward 0, where the angle lattice shows. It is nearly linear in the
coefficients, so a linear program minimises its maximum, with variance and kurtosis of both outputs as equalities and
-log2(u) kept positive as u -> 1; the linearisation is repeated until it stands still. The starts differ in the phase
between the octaves of -log2(u) and those of the rsqrt seed, which a linearisation does not cross. Fitting low-degree
polynomials this way works because their errors oscillate and average out over the other variable: cubic log2 alone is
off by 1.3e-3, the distribution function by 4e-5.
"""

import argparse
import json
import math
import pathlib

import numpy as np

from bench import RESULTS
from es_kernels import noise

RADII, ANGLES = 2**18, 2**13
# Log-spaced toward 0, and dense where u = 2^-k ends a piece of the log: r = sqrt(2 k ln 2), where |x| <= r has a
# square-root singularity.
_ENDS = [math.sqrt(2 * k * math.log(2)) * (1 + np.linspace(-0.016, 0.016, 41)) for k in (1, 2, 3, 4)]
GRID = np.unique(np.concatenate([np.geomspace(1e-4, 0.3, 90), np.linspace(0.3, 4.9, 200), *_ENDS]))
FINE_GRID = np.unique(
    np.concatenate([np.geomspace(1e-4, 0.2, 120), np.linspace(0.2, 1.2, 500), np.linspace(1.2, 5, 300), *_ENDS])
)


def enumerate_factors():
    """The 2^18 radii r and 2^13 angles (x / r, y / r) of the shipped noise, as float64: every x and y is one product of
    two of these."""
    # T = +1: y/r is tiny and x/r is COS[0] to the last bit
    r_word = (np.arange(RADII, dtype=np.uint32) << 14) | np.uint32(4096 << 1)
    x, _ = noise.box_muller(r_word)
    a_word = (np.arange(ANGLES, dtype=np.uint32) << 1) | np.uint32(0x8000 << 14)
    ax, ay = noise.box_muller(a_word)
    r = x.astype(np.float64) / x[0x8000]
    return r, ax.astype(np.float64), ay.astype(np.float64)


def quality(grid=None):
    """Moments and distribution of x and y over all 2^32 words: a dict of maxima over x and y. Takes about 2 s."""
    grid = np.concatenate([np.geomspace(1e-7, 0.3, 400), np.linspace(0.3, 5.2, 2000)]) if grid is None else grid
    r, *factors = enumerate_factors()
    r_sorted = np.sort(np.abs(r))
    truth = np.array([math.erf(g / math.sqrt(2)) for g in grid])
    out = {"variance - 1": 0.0, "kurtosis - 3": 0.0, "sixth moment / 15 - 1": 0.0, "CDF error": 0.0, "largest": 0.0}
    for c in factors:
        c = np.abs(c)
        m2, m4, m6 = ((r**p).mean() * (c**p).mean() for p in (2, 4, 6))
        inside = np.stack([np.searchsorted(r_sorted, g / c, side="right").mean() for g in grid]) / RADII
        figures = (m2 - 1, m4 / m2**2 - 3, m6 / 15 - 1, np.abs(inside - truth).max() / 2, r_sorted[-1] * c.max())
        for key, value in zip(out, figures, strict=True):
            out[key] = max(out[key], value, key=abs)
    return {key: float(value) for key, value in out.items()}


# ---- the fit ----

_A = (np.arange(RADII, dtype=np.uint32) << 14) | np.uint32(0x2000)
_BITS = _A.astype(np.float32).view(np.int32).astype(np.int64)
_LOG = (_BITS - 0x4F800000) / 2.0**23
_M = ((_BITS & 0x7FFFFF) | 0x3F800000).astype(np.int32).view(np.float32).astype(np.float64)
_POWERS = np.stack([_M**k for k in range(4)])
_T = (2 * np.arange(ANGLES // 2) + 1) / ANGLES  # by symmetry the positive half
_RANKS = (np.arange(RADII) + 0.5) / RADII
# Parameters: LOG[0..3], the seed (an integer), RSQRT, COS[0..3] and SIN[0..2] in powers of t / 8192.
_STEP = np.array([1e-5] * 4 + [8192, 1e-4] + [1e-4] * 7)
_TRUST = np.array([3e-3] * 4 + [2e5, 2e-2] + [1e-2] * 7) * 2
_TOP = np.r_[RADII - 2000 : RADII : 25, RADII - 1]
_V_MIN = 1.2e-6


def _model(p, slope):
    """float64 twin of noise.box_muller: radii and the two angle factors for parameters p, log slope `slope`."""
    v = p[:4] @ _POWERS - slope * _LOG
    seed = (int(round(p[4])) - (v.astype(np.float32).view(np.int32).astype(np.int64) >> 1)).astype(np.int32)
    y = seed.view(np.float32).astype(np.float64)
    r = v * y * (p[5] - v * y * y)
    z = _T * _T
    return r, np.polyval(p[9:5:-1], z), np.polyval(p[12:9:-1], z) * _T


def _errors(p, slope, grid, truth):
    r, *factors = _model(p, slope)
    r_sorted = np.sort(r)
    cdf = [np.interp(g / np.abs(c), r_sorted, _RANKS, left=0, right=1).mean() for c in factors for g in grid]
    moments = [(r**k).mean() * (c**k).mean() - n for k, n in ((2, 1), (4, 3)) for c in factors]
    return (np.array(cdf) - np.tile(truth, 2)) / 2, np.array(moments)


def _start(slope):
    m = np.linspace(1, 2, 4001)
    powers = np.stack([m**k for k in range(4)], 1)
    weight = np.ones_like(m)
    weight[0], weight[-1] = 30, 1e4  # the log must be right where u -> 1
    log = -np.linalg.lstsq(powers * weight[:, None], (np.log2(m) - (m - 1)) * weight, rcond=None)[0]
    log[0] += 2e-6 + max(0, -(log @ 2.0 ** np.arange(4)))
    p = np.concatenate([log * slope, [0x5EDFD9DF, 1.1946], np.zeros(7)])
    # Scale of the uncorrected r against the true radius, then plain least squares for cos and sin.
    r, *_ = _model(p, slope)
    scale = (np.sqrt(-2 * np.log(_A / 2.0**32)) / r)[:-1000].mean()
    z = _T * _T
    p[6:10] = np.linalg.lstsq(np.stack([z**k for k in range(4)], 1), np.cos(np.pi / 2 * _T), rcond=None)[0] * scale
    p[10:] = np.linalg.lstsq(np.stack([_T * z**k for k in range(3)], 1), np.sin(np.pi / 2 * _T), rcond=None)[0] * scale
    return p


def _merit(errors, moments):
    return np.abs(errors).max() + 0.05 * np.abs(moments).sum()


def fit(p, slope, iterations, grid, trust):
    """Repeated linear programs from the parameters p; returns (largest CDF error, parameters)."""
    from scipy.optimize import linprog

    truth = np.array([math.erf(g / math.sqrt(2)) for g in grid])
    trust = _TRUST * trust
    e, moments = _errors(p, slope, grid, truth)
    n = len(p)
    for _ in range(iterations):
        jacobian, jacobian_m = np.empty((len(e), n)), np.empty((4, n))
        for k in range(n):
            d = np.zeros(n)
            d[k] = _STEP[k]
            (e_hi, m_hi), (e_lo, m_lo) = _errors(p + d, slope, grid, truth), _errors(p - d, slope, grid, truth)
            jacobian[:, k] = (e_hi - e_lo) / (2 * _STEP[k]) * trust[k]
            jacobian_m[:, k] = (m_hi - m_lo) / (2 * _STEP[k]) * trust[k]
        one = np.ones((len(e), 1))
        positive = np.c_[-(_POWERS[:, _TOP].T * trust[:4]), np.zeros((len(_TOP), n - 4 + 1))]
        a_ub = np.vstack([np.c_[jacobian, -one], np.c_[-jacobian, -one], positive])
        b_ub = np.r_[-e, e, p[:4] @ _POWERS[:, _TOP] - slope * _LOG[_TOP] - _V_MIN]
        for fraction in (1, 0.5, 0.25, 0.1, 0.03):
            bounds = [(-fraction, fraction)] * n + [(0, None)]
            lp = linprog(np.r_[np.zeros(n), 1], a_ub, b_ub, np.c_[jacobian_m, np.zeros(4)], -moments, bounds)
            if lp.status != 0:
                continue
            candidate = p + trust * lp.x[:n]
            e_new, moments_new = _errors(candidate, slope, grid, truth)
            if _merit(e_new, moments_new) < _merit(e, moments):
                p, e, moments = candidate, e_new, moments_new
                break
        else:
            trust *= 0.3
            if trust[0] < 1e-5:
                break
    return _merit(e, moments), p


def shipped():
    """The constants of noise.py as (parameters, slope)."""

    def unscaled(coefficients, odd):
        return [float(c) * 8192.0 ** (2 * k + odd) for k, c in enumerate(coefficients)]

    p = [*map(float, noise.LOG), noise.RSQRT_SEED, float(noise.RSQRT), *unscaled(noise.COS, 0), *unscaled(noise.SIN, 1)]
    return np.array(p), -float(noise.LOG_SLOPE) * 2.0**23


def constants(p, slope):
    """Parameters as the float32 constants of noise.py."""

    def scaled(coefficients, odd):
        return tuple(np.float32(c * 8192.0 ** -(2 * k + odd)) for k, c in enumerate(coefficients))

    return {
        "LOG": tuple(map(np.float32, p[:4])),
        "LOG_SLOPE": np.float32(-slope * 2.0**-23),
        "RSQRT_SEED": int(round(p[4])),
        "RSQRT": np.float32(p[5]),
        "COS": scaled(p[6:10], 0),
        "SIN": scaled(p[10:], 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fit", action="store_true", help="derive constants instead of measuring the shipped ones")
    parser.add_argument("--polish", action="store_true", help="improve the shipped constants on a finer grid")
    parser.add_argument(
        "--slopes",
        type=float,
        nargs="+",
        default=list(np.geomspace(1, 4, 17)[:-1]),
        help="phases to start from; 4 is 1 again",
    )
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS / "noise.json")
    args = parser.parse_args()
    results = []
    if args.fit:
        for slope in args.slopes:
            slope = float(np.float32(slope))
            error, p = fit(_start(slope), slope, args.iterations, GRID, 1)
            print(f"slope {slope:.6f}: {error:.3e}", flush=True)
            results.append((error, slope, p))
    if args.polish:
        _, slope, p = min(results, key=lambda r: r[0]) if results else (None, *shipped()[::-1])
        error, p = fit(p, slope, 12, FINE_GRID, 0.1)
        results.append((0, slope, p))
    if results:
        _, slope, p = min(results, key=lambda r: r[0])
        for name, value in constants(p, slope).items():
            setattr(noise, name, value)
            print(
                f"{name} = {hex(value) if isinstance(value, int) else ', '.join(str(v) for v in np.atleast_1d(value))}"
            )
    figures = quality()
    for key, value in figures.items():
        print(f"{key}: {value:.3e}")
    if not results:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
