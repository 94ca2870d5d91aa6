"""Contract under test: the health of a run.

The realised noise and step and the drift are those of the weights, computed by hand from all elements, for each master,
for fused and strided tensors and with members of opposite noise; a sample of them is close to that; measuring changes
no bit.
"""

import math

import numpy as np
import pytest
import torch

import es_kernels
from es_finetune.monitor.health import Health
from es_finetune.optim.evolution_strategy import EvolutionStrategy
from es_kernels.noise import member_seed, normal, stream_id

SIGMA = 1e-3


def around_one(name="norm.weight", shape=(20, 50), dtype=torch.bfloat16):
    """Weights that bf16 stores in steps of 1/128: the noise is mostly swallowed."""
    values = 1 + 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return name, torch.nn.Parameter(values.to(dtype))


def small(name="mlp.weight", shape=(40, 30), dtype=torch.float32):
    return name, torch.nn.Parameter((0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(2))).to(dtype))


def make(*params, **options):
    return EvolutionStrategy(list(params), **{"sigma": SIGMA, "lr": 5e-4, "population": 4, "seed": 3, **options})


def noise(name, tensor, noise_rank=0):
    seed = member_seed(3, 0, 0)
    if noise_rank:
        ((left, right),) = es_kernels.factors({name: tensor.shape}, seed, noise_rank).values()
        return (left[0] @ right[0].T / math.sqrt(noise_rank)).numpy()
    return normal(seed, stream_id(name), np.arange(tensor.numel())).reshape(tensor.shape)


def correlation(x, y):
    return np.corrcoef(np.ravel(x), np.ravel(y))[0, 1]


def rms(x):
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def numbers(tensor):
    return tensor.detach().to(torch.float64).numpy()


def generation(optimizer, health, rewards=(1.0, 0.0, 0.5, 0.25)):
    """One generation as the trainer does it; returns its health."""

    def closure(member):
        if member == 0:
            health.measure_member()
        return rewards[member]

    told = optimizer.evaluate(closure)
    health.measure_before_update()
    optimizer.tell(told)
    return health.measure_after_update()


@pytest.mark.parametrize("master, noise_rank", [("fp32", 0), ("copy", 0), ("host", 0), (None, 0), ("fp32", 2)])
def test_realised_noise_is_that_of_the_weights(master, noise_rank):
    name, weight = around_one()
    before = numbers(weight)
    optimizer = make((name, weight), small(), master=master, noise_rank=noise_rank)
    health = Health(optimizer, samples=10_000)
    with optimizer.perturbed(0):
        realised = numbers(weight) - before
        measured = health.measure_member()
    intended = noise(name, weight, noise_rank)
    expected = correlation(realised, intended)
    assert 0.2 < expected < 0.6
    # With master=None the noise is taken out of the sample to find the weights without it: the same statistics, not the
    # same bits.
    close = 0.05 if master is None else 1e-5
    ratio = rms(realised) / rms(SIGMA * intended)
    assert measured["correlation"] == {name: [pytest.approx(expected, abs=close), pytest.approx(ratio, rel=2 * close)]}
    assert measured["correlation_min"] == [name, measured["correlation"][name][0]] and measured["rms_ratio_min"] == [
        name,
        measured["correlation"][name][1],
    ]


def test_noise_that_vanishes_has_correlation_0():
    name, weight = around_one()
    optimizer = make((name, weight), sigma=1e-6)
    with optimizer.perturbed(0):
        measured = Health(optimizer).measure_member()
    assert measured["correlation"] == {name: [0.0, 0.0]} and measured["rms_ratio_min"] == [name, 0.0]


def test_theta_between_two_bf16_numbers_is_no_noise():
    """theta in f32 is not what the model computes with when no member is in place."""
    name, weight = around_one()
    optimizer = make((name, weight), sigma=1e-6)
    optimizer.tables[0].theta.tensors[0].add_(1e-3)
    with optimizer.perturbed(0):
        assert Health(optimizer).measure_member()["rms_ratio_min"][1] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("samples", [64, 100, 4096])
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("master, noise_rank", [("fp32", 0), (None, 0), ("copy", 1), (None, 3)])
def test_every_tensor_draws_the_noise_of_its_place(master, antithetic, samples, noise_rank):
    """In f32 all noise arrives, so one wrong index, name or sign would show as a correlation near 0, or of -1."""
    fused = torch.nn.Parameter(torch.zeros(60, 40))
    rows = [
        es_kernels.Segment("q", 20, 40, width=40),
        # The columns of a shard
        es_kernels.Segment("k", 20, 30, offset=800, row_stride=40, first=7, index_stride=100, width=100),
        es_kernels.Segment("v", 1, 700, offset=1600, first=29, width=45),  # from within a row to within another
        es_kernels.Segment("a row", 1, 100, offset=2300, first=10, width=1000),
    ]
    strided = torch.nn.Parameter(torch.zeros(5, 30, 160)[:, ::2, 10:140])
    columns = torch.nn.Parameter(torch.zeros(70, 160)[:, 10:140])
    scalar = torch.nn.Parameter(torch.zeros(()))
    optimizer = make(
        ("qkv", fused, rows),
        ("strided", strided),
        ("columns", columns),
        small(),
        ("scalar", scalar),
        master=master,
        antithetic=antithetic,
        noise_rank=noise_rank,
    )
    for member in (0, 1, 3):
        with optimizer.perturbed(member):
            measured = Health(optimizer, samples).measure_member()
        assert measured["correlation"] == {}
        assert measured["correlation_min"][1] > 0.9999 and measured["rms_ratio_min"][1] == pytest.approx(1, abs=1e-3)


def test_groups_have_their_own_sigma():
    optimizer = make({"params": [small("a")], "sigma": 0.1}, {"params": [small("b")], "sigma": 1e-4})
    with optimizer.perturbed(2):
        measured = Health(optimizer).measure_member()
    assert measured["correlation"] == {} and measured["rms_ratio_min"][1] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("noise_rank", [0, 1])
@pytest.mark.parametrize("segments", [None, [es_kernels.Segment("norm.weight", 1, 100_000, width=1000)]])
def test_a_sample_is_close_to_the_whole(segments, noise_rank):
    name, weight = around_one(shape=(100, 1000))
    optimizer = make((name, weight, segments), noise_rank=noise_rank)
    correlations = []
    for samples in (2000, 100_000):
        health = Health(optimizer, samples)
        with optimizer.perturbed(0):
            correlations.append(health.measure_member()["correlation"][name][0])
    assert correlations[0] != correlations[1] and correlations[0] == pytest.approx(correlations[1], abs=0.05)


def test_tensors_too_small_for_a_correlation_are_left_out():
    tiny = around_one("tiny", (63,))
    optimizer = make(tiny)
    health = Health(optimizer)
    measured = generation(optimizer, health)
    assert (
        measured["correlation"] == {}
        and measured["correlation_min"] is None
        and measured["rms_ratio_min"] is None
        and measured["step_correlation"] is None
    )
    optimizer = make(around_one("tiny", (63,)), around_one("large", (64,)))
    assert set(generation(optimizer, Health(optimizer))["correlation"]) == {"large"}
    # One tensor of a checkpoint, in two parts
    halves = [es_kernels.Segment("whole", 1, 40, offset=40 * i, first=40 * i) for i in range(2)]
    optimizer = make((*around_one("memory", (80,)), halves))
    assert set(generation(optimizer, Health(optimizer))["correlation"]) == {"whole"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 1e3},
        {"weight_decay": 1e3, "anchored": True},
        {"antithetic": True},
        {"momentum": 0.9},
        {"noise_rank": 1},
    ],
)
@pytest.mark.parametrize("master", ["fp32", "copy", None])
def test_in_f32_the_whole_step_arrives(master, options):
    name, weight = small()
    optimizer = make((name, weight), master=master, **options)
    health = Health(optimizer)
    for number in range(3):
        before = numbers(weight)
        measured = generation(optimizer, health, (number, 2.0, 0.5, 1.0))
        moved = numbers(weight) - before
        assert measured["step_correlation"] == pytest.approx(1, abs=1e-5)
        assert measured["step_rms"] == pytest.approx(rms(moved), rel=1e-3)


@pytest.mark.parametrize("master", ["fp32", "copy", None])
def test_realised_step_in_bf16(master):
    name, weight = around_one()
    exact = make(around_one(dtype=torch.float32), lr=2e-3)
    optimizer = make((name, weight), master=master, lr=2e-3)
    with torch.no_grad():
        exact.tables[0].live.tensors[0].copy_(weight)
    exact.adopt_live()
    health = Health(optimizer)
    generation(exact, Health(exact))
    told = optimizer.evaluate(lambda member: (1.0, 0.0, 0.5, 0.25)[member])
    before = numbers(weight)
    health.measure_before_update()
    optimizer.tell(told)
    measured = health.measure_after_update()
    intended = numbers(exact.tables[0].theta.tensors[0]) - numbers(around_one()[1])
    expected = correlation(numbers(weight) - before, intended)
    assert 0.2 < expected < 0.9
    assert measured["step_correlation"] == pytest.approx(expected, abs=1e-4)
    assert measured["step_rms"] == pytest.approx(rms(numbers(weight) - before), rel=1e-5)


def test_without_signal_there_is_no_step():
    optimizer = make(small())
    health = Health(optimizer)
    generation(optimizer, health)
    measured = generation(optimizer, health, (1.0, 1.0, 1.0, 1.0))
    assert measured["step_correlation"] is None and measured["step_rms"] == 0 and measured["drift"] > 0


@pytest.mark.parametrize("master", ["fp32", "copy", None])
def test_drift_counts_each_weight_once(master):
    """A chunk of 100 stands for all of its tensor, however large that is."""
    large, few = torch.nn.Parameter(torch.full((10_000,), 2.0)), torch.nn.Parameter(torch.full((100,), 5.0))
    optimizer = make(("large", large), ("few", few), master=master, lr=0.0)
    health = Health(optimizer, samples=100)
    with torch.no_grad():
        large.add_(1.0)
        few.add_(3.0)
    optimizer.adopt_live()
    measured = generation(optimizer, health)
    drift = math.sqrt((10_000 * 1 + 100 * 9) / 10_100)
    # master=None: adding and taking out the noise of four members rounds in f32
    assert measured["drift"] == pytest.approx(drift, rel=1e-5)
    assert measured["drift_relative"] == pytest.approx(drift / math.sqrt((10_000 * 4 + 100 * 25) / 10_100), rel=1e-5)


@pytest.mark.parametrize("master", ["fp32", "copy", "host", None])
def test_measuring_changes_nothing(master):
    prints = []
    for with_health in (True, False):
        optimizer = make(around_one(), small(), master=master, weight_decay=0.1, anchored=True, momentum=0.5)
        health = Health(optimizer, samples=70)
        for _ in range(3):
            if with_health:
                generation(optimizer, health)
            else:
                optimizer.tell(optimizer.evaluate(lambda member: (1.0, 0.0, 0.5, 0.25)[member]))
        prints.append((optimizer.fingerprint("theta"), optimizer.fingerprint("live")))
    assert prints[0] == prints[1]


def test_it_keeps_a_sample_only():
    optimizer = make(small("a", (1000, 100)), small("b", (10,)))
    health = Health(optimizer, samples=500)
    kept = [tensor for tensor in vars(health).values() if isinstance(tensor, torch.Tensor)]
    assert kept and all(len(tensor) == 510 for tensor in kept)


def test_measurements_out_of_order_are_refused():
    health = Health(make(small()))
    with pytest.raises(RuntimeError, match="without a member"):
        health.measure_member()
    with pytest.raises(RuntimeError, match="without measure_before_update"):
        health.measure_after_update()
