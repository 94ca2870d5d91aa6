"""Contract under test: what a run says of itself.

The realised noise and step and the drift are those of the weights, computed by hand from all elements, for every base,
for fused and strided tensors and with members of opposite noise; a sample of them is close to that; looking changes no
bit. A warning comes with its cause, not without it, and not every generation.
"""

import math
import types

import numpy as np
import pytest
import torch
from es_finetune.monitor.health import REPEAT, Health, is_norm, norms_note, warnings_of
from es_finetune.optim.evolution_strategy import EvolutionStrategy

import es_kernels
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


def noise(name, tensor, member=0):
    return normal(member_seed(3, 0, member), stream_id(name), np.arange(tensor.numel())).reshape(tensor.shape)


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


@pytest.mark.parametrize("base", ["fp32", "copy", "host", None])
def test_realised_noise_is_that_of_the_weights(base):
    name, weight = around_one()
    before = numbers(weight)
    optimizer = make((name, weight), small(), base=base)
    health = Health(optimizer, samples=10_000)
    with optimizer.perturbed(0):
        realised = numbers(weight) - before
        found = health.measure_member()
    expected = correlation(realised, noise(name, weight))
    assert 0.2 < expected < 0.6
    # With base=None the noise is taken out of the sample to find the weights without it: the same statistics, not the
    # same bits.
    close = 0.05 if base is None else 1e-5
    ratio = rms(realised) / rms(SIGMA * noise(name, weight))
    assert found["correlation"] == {name: [pytest.approx(expected, abs=close), pytest.approx(ratio, rel=2 * close)]}
    assert found["correlation_min"] == [name, found["correlation"][name][0]] and found["rms_ratio_min"] == [
        name,
        found["correlation"][name][1],
    ]


def test_noise_that_vanishes_has_correlation_0():
    name, weight = around_one()
    optimizer = make((name, weight), sigma=1e-6)
    with optimizer.perturbed(0):
        found = Health(optimizer).measure_member()
    assert found["correlation"] == {name: [0.0, 0.0]} and found["rms_ratio_min"] == [name, 0.0]


def test_theta_between_two_bf16_numbers_is_no_noise():
    """theta in f32 is not what the model computes with when no member is in place."""
    name, weight = around_one()
    optimizer = make((name, weight), sigma=1e-6)
    optimizer.tables[0].theta.tensors[0].add_(1e-3)
    with optimizer.perturbed(0):
        assert Health(optimizer).measure_member()["rms_ratio_min"][1] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("samples", [64, 100, 4096])
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("base", ["fp32", None])
def test_every_tensor_draws_the_noise_of_its_place(base, antithetic, samples):
    """In f32 all noise arrives, so one wrong index, name or sign would show as a correlation near 0, or of -1."""
    fused = torch.nn.Parameter(torch.zeros(60, 40))
    rows = [
        es_kernels.Segment("q", 20, 40),
        es_kernels.Segment("k", 20, 30, offset=800, row_stride=40, first=7, index_stride=100),  # the columns of a shard
        es_kernels.Segment("v", 1, 800, offset=1600),
    ]
    strided = torch.nn.Parameter(torch.zeros(5, 30, 160)[:, ::2, 10:140])
    scalar = torch.nn.Parameter(torch.zeros(()))
    optimizer = make(
        ("qkv", fused, rows), ("strided", strided), small(), ("scalar", scalar), base=base, antithetic=antithetic
    )
    for member in (0, 1, 3):
        with optimizer.perturbed(member):
            found = Health(optimizer, samples).measure_member()
        assert found["correlation"] == {}
        assert found["correlation_min"][1] > 0.9999 and found["rms_ratio_min"][1] == pytest.approx(1, abs=1e-3)


def test_groups_have_their_own_sigma():
    optimizer = make({"params": [small("a")], "sigma": 0.1}, {"params": [small("b")], "sigma": 1e-4})
    with optimizer.perturbed(2):
        found = Health(optimizer).measure_member()
    assert found["correlation"] == {} and found["rms_ratio_min"][1] == pytest.approx(1, abs=1e-3)


def test_a_sample_is_close_to_the_whole():
    name, weight = around_one(shape=(100, 1000))
    optimizer = make((name, weight))
    found = []
    for samples in (2000, 100_000):
        health = Health(optimizer, samples)
        with optimizer.perturbed(0):
            found.append(health.measure_member()["correlation"][name][0])
    assert found[0] != found[1] and found[0] == pytest.approx(found[1], abs=0.05)


def test_tensors_too_small_for_a_correlation_are_left_out():
    tiny = around_one("tiny", (63,))
    optimizer = make(tiny)
    health = Health(optimizer)
    found = generation(optimizer, health)
    assert (
        found["correlation"] == {}
        and found["correlation_min"] is None
        and found["rms_ratio_min"] is None
        and found["step_correlation"] is None
    )
    optimizer = make(around_one("tiny", (63,)), around_one("large", (64,)))
    assert set(generation(optimizer, Health(optimizer))["correlation"]) == {"large"}
    # One tensor of a checkpoint, in two parts
    halves = [es_kernels.Segment("whole", 1, 40, offset=40 * i, first=40 * i) for i in range(2)]
    optimizer = make((*around_one("memory", (80,)), halves))
    assert set(generation(optimizer, Health(optimizer))["correlation"]) == {"whole"}


@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 1e3}, {"weight_decay": 1e3, "anchored": True}, {"antithetic": True}, {"momentum": 0.9}],
)
@pytest.mark.parametrize("base", ["fp32", "copy", None])
def test_in_f32_the_whole_step_arrives(base, options):
    name, weight = small()
    optimizer = make((name, weight), base=base, **options)
    health = Health(optimizer)
    for number in range(3):
        before = numbers(weight)
        found = generation(optimizer, health, (number, 2.0, 0.5, 1.0))
        moved = numbers(weight) - before
        assert found["step_correlation"] == pytest.approx(1, abs=1e-5)
        assert found["step_rms"] == pytest.approx(rms(moved), rel=1e-3)


@pytest.mark.parametrize("base", ["fp32", "copy", None])
def test_realised_step_in_bf16(base):
    name, weight = around_one()
    exact = make(around_one(dtype=torch.float32), lr=2e-3)
    optimizer = make((name, weight), base=base, lr=2e-3)
    with torch.no_grad():
        exact.tables[0].live.tensors[0].copy_(weight)
    exact.adopt_live()
    health = Health(optimizer)
    generation(exact, Health(exact))
    told = optimizer.evaluate(lambda member: (1.0, 0.0, 0.5, 0.25)[member])
    before = numbers(weight)
    health.measure_before_update()
    optimizer.tell(told)
    found = health.measure_after_update()
    intended = numbers(exact.tables[0].theta.tensors[0]) - numbers(around_one()[1])
    expected = correlation(numbers(weight) - before, intended)
    assert 0.2 < expected < 0.9
    assert found["step_correlation"] == pytest.approx(expected, abs=1e-4)
    assert found["step_rms"] == pytest.approx(rms(numbers(weight) - before), rel=1e-5)


def test_without_signal_there_is_no_step():
    optimizer = make(small())
    health = Health(optimizer)
    generation(optimizer, health)
    found = generation(optimizer, health, (1.0, 1.0, 1.0, 1.0))
    assert found["step_correlation"] is None and found["step_rms"] == 0 and found["drift"] > 0


@pytest.mark.parametrize("base", ["fp32", "copy", None])
def test_drift_counts_each_weight_once(base):
    """A chunk of 100 stands for all of its tensor, however large that is."""
    large, few = torch.nn.Parameter(torch.full((10_000,), 2.0)), torch.nn.Parameter(torch.full((100,), 5.0))
    optimizer = make(("large", large), ("few", few), base=base, lr=0.0)
    health = Health(optimizer, samples=100)
    with torch.no_grad():
        large.add_(1.0)
        few.add_(3.0)
    optimizer.adopt_live()
    found = generation(optimizer, health)
    drift = math.sqrt((10_000 * 1 + 100 * 9) / 10_100)
    # base=None: adding and taking out the noise of four members rounds in f32
    assert found["drift"] == pytest.approx(drift, rel=1e-5)
    assert found["drift_relative"] == pytest.approx(drift / math.sqrt((10_000 * 4 + 100 * 25) / 10_100), rel=1e-5)


@pytest.mark.parametrize("base", ["fp32", "copy", "host", None])
def test_looking_changes_nothing(base):
    prints = []
    for with_health in (True, False):
        optimizer = make(around_one(), small(), base=base, weight_decay=0.1, anchored=True, momentum=0.5)
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


def test_looks_out_of_order_are_refused():
    health = Health(make(small()))
    with pytest.raises(RuntimeError, match="without a member"):
        health.measure_member()
    with pytest.raises(RuntimeError, match="without measure_before_update"):
        health.measure_after_update()


# --- warnings
# ------------------------------------------------------------------------------------------------------------

CONFIG = types.SimpleNamespace(population=30, sigma=0.001)


def held_out(reward, half=0.01):
    return {"reward": reward, "reward_low": reward - half, "reward_high": reward + half}


def row(mean=0.4, std=0.03, **other):
    return {
        "reward_mean": mean,
        "reward_std": std,
        "reward_min": mean - 2 * std,
        "reward_max": mean + 2 * std,
        "reward_low": mean - 0.01,
        "reward_high": mean + 0.01,
        "sigma": 0.001,
        "lr": 0.0005,
        "share_outside": 0.03,
        "identical": 0.0,
        "failed": 0,
        "failed_example": None,
        "warnings": [],
        **other,
    }


def run(rows, **options):
    """Give each row its warnings, as the trainer does; returns those of the last."""
    for number, last in enumerate(rows):
        last["warnings"] = warnings_of(rows[: number + 1], CONFIG, **options)
    return rows[-1]["warnings"]


CAUSES = [
    (
        row(0.3, 0.0, identical=1.0),
        "every member scored the same, and 100% of them with the same answers",
        "raise sigma (now 0.001)",
    ),
    (row(0.0, 0.0), "every member scored the same, with different answers", "a reward that also pays for a part"),
    (row(identical=0.6), "members answer alike: 60%", "raise sigma"),
    (row(failed=60, failed_example="prompt 3: boom"), "scoring failed for 60 answers, 2 of each member", "boom"),
    (
        row(health={"correlation": {"a": [0.5, 0.6], "b": [0.1, 1.2], "c": [0.7, 0.8], "d": [0.8, 0.9]}}),
        "the noise does not fully arrive in 4 tensor(s)",
        "(correlation, rms realised / meant: b 0.10, 1.20; a 0.50, 0.60; c 0.70, 0.80; ...)",
    ),
]


@pytest.mark.parametrize("bad, begin, has", CAUSES)
def test_a_cause_gives_one_warning(bad, begin, has):
    assert run([row(), dict(bad)]) == run([dict(bad)])
    (warning,) = run([dict(bad)])
    assert warning.startswith(begin) and has in warning and "\n" not in warning


def test_a_good_run_gives_none():
    climb = [row(0.3 + 0.02 * i + 0.04 * (-1) ** i, identical=0.5, health={"correlation": {}}) for i in range(30)]
    run(climb)
    assert [r["warnings"] for r in climb] == [[]] * 30
    assert run([row()], look=held_out(0.45)) == []
    assert run([row(share_outside=0.5), row(share_outside=0.5)]) == []  # a first generation warms up


def test_a_persistent_cause_is_repeated_seldom():
    rows = [row(identical=0.55 + 0.001 * i) for i in range(2 * REPEAT + 1)]
    run(rows)
    assert [i for i, r in enumerate(rows) if r["warnings"]] == [0, REPEAT, 2 * REPEAT]
    assert len(run([row(identical=0.9), row(identical=0.9, failed=1)])) == 1  # another cause is not held back


@pytest.mark.parametrize("scale, shift", [(1, 0), (1000, -2000), (0.01, 0)])
def test_collapse_whatever_the_rewards_scale_and_sign(scale, shift):
    def fallen(means, std=0.03):
        return [
            w
            for w in warnings_of([row(shift + scale * mean, scale * std) for mean in means], CONFIG)
            if w.startswith("the reward has fallen from ")
        ]

    climb = [0.3 + 0.02 * i for i in range(20)]
    assert fallen(climb + [0.2] * 3) and fallen([0.5] * 8 + [0.3] * 3)  # with a rise before or without
    assert fallen(climb + [0.4] * 3) and not fallen(climb + [0.5] * 3)  # more, or less, than half of the gain is lost
    assert not fallen(climb + [0.4])  # one bad draw of prompts
    assert not fallen([0.3, 0.28, 0.32] * 8 + [0.25] * 3)  # within what members differ by
    # A small sigma: members hardly differ, but every draw of prompts does.
    assert not fallen([0.4 + 0.05 * (-1) ** i - 0.04 * (i > 20) for i in range(24)], 0.003)


def test_members_far_below_theta():
    (warning,) = run([row(0.1)], look=held_out(0.8))
    assert warning.startswith("members do far worse") and "lower sigma (now 0.001)" in warning
    assert (
        "reward 0.1 (0.09 to 0.11) on the training prompts, 0.8 (0.79 to 0.81) without noise on the held-out ones"
        in warning
    )
    assert run([row(0.7)], look=held_out(0.8)) == []
    assert run([row(0.0, 0.004)], look=held_out(0.01)) == []  # few rewards at all: within the members' own spread
    assert run([row(-160, 5)], look=held_out(-100)) != [] and run([row(-110, 5)], look=held_out(-100)) == []


def test_members_that_met_other_questions_than_theta_are_no_cause():
    """Theta is known by held-out prompts, the members by training prompts: where one draw of questions may be so much
    harder, nothing is said."""
    wide = {"reward_low": 0.0, "reward_high": 0.31}
    assert run([row(0.1, **wide)], look=held_out(0.8, 0.5)) == []  # from 0.3
    assert run([row(0.1, **wide)], look=held_out(0.8, 0.48)) != []  # from 0.32
    # Too few questions, or a run of an older version
    for unknown in (None, {"reward": 0.8}, {"reward": 0.8, "reward_low": None, "reward_high": None}):
        assert run([row(0.1)], look=unknown) == []
    assert run([row(0.1, reward_low=None, reward_high=None)], look=held_out(0.8)) == []


def test_norms_are_said_once_and_are_no_warning():
    names = [
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
        "h.3.ln_2.weight",
        "transformer.ln_f.bias",
        "self_attn.q_norm.weight",
        "ln1.weight",
    ]
    others = [
        "model.layers.0.mlp.up_proj.weight",
        "lm_head.weight",
        "norm.linear.weight",
        "vln.proj.weight",
        "q_proj.bias",
    ]
    assert [is_norm(name) for name in names + others] == [True] * 6 + [False] * 5

    def look(*tensors):
        return row(health={"correlation": {name: [0.3 + 0.1 * i, 1.0] for i, name in enumerate(tensors)}})

    rows = [row(), look(*names), row(), look(*names)]
    assert run(rows) == [] and [bool(norms_note(rows[: i + 1])) for i in range(4)] == [False, True, False, False]
    note = norms_note(rows[:2])
    assert (
        note.startswith("part of the noise is lost in 6 norm weight(s)")
        and "lowest correlation 0.30" in note
        and "so it is in the paper's run" in note
    )
    (warning,) = run([look(*names, *others)])
    assert (
        "does not fully arrive in 5 tensor(s)" in warning
        and "model.layers.0.mlp.up_proj.weight 0.90" in warning
        and "norm.weight" not in warning
    )


def test_time_outside_has_to_last():
    (warning,) = run([row(share_outside=0.2) for _ in range(3)])
    assert warning.startswith("time goes elsewhere: 20%")
    assert run([row(share_outside=0.2), row(share_outside=0.05), row(share_outside=0.2)]) == []
