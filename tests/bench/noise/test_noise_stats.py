"""Contract: bench/noise/noise_stats.py finds planted defects in 1e6 values and passes the noise as it is; the words
it tests are those of the kernels; the committed results are complete and passed."""

import itertools
import json

import numpy as np
import pytest
import torch

from bench import RESULTS
from bench.noise import noise_stats
from es_kernels import factors, noise

SEQUENCES = noise_stats.SEQUENCES[:8]


@pytest.fixture(scope="module")
def law():
    return noise_stats.Law(32)


@pytest.fixture
def normals():
    """2^20 values: two members, four streams."""
    return next(noise_stats.chunks(1))[:8].clone()


def rows(law, x):
    statistics = noise_stats.Statistics(law, SEQUENCES)
    for half in x.split(x.shape[1] // 2, dim=1):  # in two chunks
        statistics.long_lags = [lag for lag in noise_stats.LONG_LAGS if lag < half.shape[1]]
        statistics.add(half.contiguous())
    return statistics.rows()


def first_defect(rows):
    """The row with the largest deviation, if the gate fails."""
    return (
        max(rows, key=lambda r: abs(r["z"] or 0))
        if noise_stats.worst([r["p"] for r in rows]) < noise_stats.GATE
        else None
    )


def test_clean_noise_passes(law, normals):
    result = rows(law, normals)
    assert first_defect(result) is None
    assert min(r["p"] for r in result) * len(result) > 0.01


@pytest.mark.parametrize("rank", (1, 3))
def test_factors_of_low_rank_pass(law, normals, rank):
    """Two members, two streams, L and R of each; then L of one, its neighbour in the list, and full noise of the same
    streams, two members."""
    n = normals.shape[1] // rank * rank
    seeds = [noise.member_seed(noise_stats.RUN_SEED, 0, member) for member in range(2)]
    names = noise_stats.NAMES[:2]
    drawn = factors(dict.fromkeys(names, (n // rank, n // rank)), seeds, rank)
    whole = n // 128 * 128  # two chunks of whole rows of 64
    sides = [drawn[name][side][member].flatten()[:whole] for member in (0, 1) for name in names for side in (0, 1)]
    assert first_defect(rows(law, torch.stack(sides))) is None
    full = [normals[4 * member + k, :whole] for member in (0, 1) for k in (0, 1)]
    assert (
        first_defect(rows(law, torch.stack([t for pair in zip(sides[::2], full, strict=True) for t in pair]))) is None
    )


def test_a_shifted_mean_is_found(law, normals):
    result = rows(law, normals + 0.01)
    assert first_defect(result)
    assert abs(next(r["z"] for r in result if r["name"] == "E x^1")) > 8


def test_a_correlation_at_lag_3_is_found(law, normals):
    row = first_defect(rows(law, normals + 0.01 * normals.roll(3, dims=1)))
    assert (row["group"], row["name"]) == ("lags, x", "lag 3")
    assert row["value"] == pytest.approx(0.01, rel=0.4)


def test_a_repeated_stream_is_found(law, normals):
    normals[1] = normals[0]
    row = first_defect(rows(law, normals))
    assert row["group"].startswith("streams, ") and row["name"].count("member 0") == 2


def test_a_repeated_member_is_found(law, normals):
    normals[4] = normals[0]
    assert first_defect(rows(law, normals))["group"].startswith("members, ")


def test_pairs_of_equals_are_found(law, normals):
    normals[:, 1::2] = normals[:, ::2]
    assert first_defect(rows(law, normals))


def test_the_law_is_that_of_fit_noise(law):
    figures = json.loads((RESULTS / "noise.json").read_text())
    assert law.distance_to_normal == pytest.approx(figures["CDF error"], rel=0.02)
    assert abs(law.moments[2] - 1) <= abs(figures["variance - 1"])
    assert abs(law.moments[6] / 15 - 1) <= abs(figures["sixth moment / 15 - 1"])


def test_exact_independent_normals_differ_from_the_law_only_by_little(law):
    """The law is close enough to N(0, 1) that 1e6 exact normals pass as well."""
    assert first_defect(rows(law, torch.randn(8, 2**17, generator=torch.Generator().manual_seed(1)))) is None


def test_words_are_those_of_the_kernels():
    first = 2**34 + 5
    streams = [noise.stream_id(f"model.layers.{i}.mlp.down_proj.weight") for i in range(noise_stats.STREAMS)]
    seeds = [noise.member_seed(noise_stats.RUN_SEED, 0, k) for k in range(3)]
    places = {
        "one stream": [(seeds[0], streams[0], first + k) for k in range(3)],
        "streams in turn": [(seeds[0], streams[k], first) for k in range(3)],
        "members in turn": [(seeds[k], streams[0], first) for k in range(3)],
    }
    assert set(places) == set(noise_stats.ORDERS)
    for order, expected in places.items():
        batch, following = (w.reshape(-1, 4) for w in itertools.islice(noise_stats.words(order, first), 2))
        assert batch.shape == (noise_stats.BATCH, 4)
        np.testing.assert_array_equal(batch[:3], [noise.words(*place, 0) for place in expected])
        each = {"one stream": 1, "streams in turn": noise_stats.STREAMS, "members in turn": noise_stats.MEMBERS}[order]
        np.testing.assert_array_equal(
            following[0], noise.words(seeds[0], streams[0], first + noise_stats.BATCH // each, 0)
        )


def test_without_dieharder_it_says_so(monkeypatch):
    monkeypatch.setattr(noise_stats.shutil, "which", lambda name: None)
    result, why = noise_stats.run_dieharder()
    assert result is None and why.startswith("not run: ")


def test_dieharder_reads_the_words():
    if not noise_stats.shutil.which("dieharder"):
        pytest.skip("no dieharder")
    (row,) = noise_stats.dieharder("one stream", 1, 100, None)
    assert row["test"] == "sts_monobit" and 1e-6 < row["p"] < 1 - 1e-6
    assert row["words"] >= row["tsamples"] * row["psamples"]


def test_results():
    if not (RESULTS / "noise_stats.json").exists():
        pytest.skip("not measured")
    report = json.loads((RESULTS / "noise_stats.json").read_text())
    assert report["values"] >= 10**9 and report["run_seed"] == noise_stats.RUN_SEED
    assert report["versions"]["noise"] == noise.VERSION
    assert all(p >= noise_stats.GATE for p in report["bonferroni"].values())
    for row in report["normals"]:
        assert set(row) >= {"group", "name", "n", "value", "expected", "error", "z", "p"}
    if isinstance(report["words"], str):
        assert report["words"].startswith("not run: ")
    else:
        assert {row["order"] for row in report["words"]} == set(noise_stats.ORDERS)
        assert all(set(row) >= {"test", "ntuple", "tsamples", "psamples", "p", "words"} for row in report["words"])
