"""Contract under test: EvolutionStrategy.

- theta and live: live == nearest(theta) after construction, step, tell, load_state_dict and on leaving perturbed(), by
  exception too, to the bit, for every master that is kept apart.
- The update is the formula of its docstring: one add_noise_ of the members' seeds, with momentum also those of the
  generations before, oldest first; equal rewards change nothing; a reward that is missing or no finite number is
  refused before any weight changed. (The Z of each shaping: test_shaping.py.)
- Each option changes what it says and nothing else.
- Equal rewards give equal bits on every backend, after a resume from state_dict, and in a replay of the recorded
  updates.
- Weights that others wrote are refused by every call that would undo it, and adopt_live takes them as theta. A copy is
  refused.
- A state of another optimizer, or saved by another version, is refused in one sentence, with nothing changed.
- master="host" has the bits of "fp32", and writes theta only when no kernel reads it any more.
- It is a torch optimizer: param_groups, LR schedulers, tied weights, mixed dtypes; a tensor given with segments draws
  the noise of the tensors that these name.
"""

import copy
import io
import itertools
import json
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

import es_kernels
from es_finetune import EvolutionStrategy, Update
from es_finetune.optim.shaping import centred_ranks, per_prompt, z_scores
from es_kernels.noise import member_seed

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32,), (BF16,), (F16,), (F32, BF16, F16)]


def tensors(opt, kind="theta"):
    return {
        name: t.detach().clone()
        for w in opt._weights
        for name, t in zip(getattr(w, kind).names, getattr(w, kind).tensors, strict=True)
    }


def assert_same(bits, left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(bits(left[name]), bits(right[name])), name


def assert_live_is_theta(bits, opt):
    theta, live = tensors(opt), tensors(opt, "live")
    assert_same(bits, {name: theta[name].to(t.dtype) for name, t in live.items()}, live)  # torch rounds to nearest even


def rewards(generation, n=6):
    return np.random.default_rng(generation).normal(size=n).tolist()


def run(opt, generations):
    for _ in range(generations):
        for member in opt.ask():
            with opt.perturbed(member):
                pass
        opt.tell(rewards(opt.generation, opt.population))


# --- theta and live --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("master", ["fp32", "copy", "host"])
@pytest.mark.parametrize("perturb_rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("noise_rank", [0, 1])
def test_live_is_theta_whenever_no_member_is_inside(bits, weights, dtypes, master, perturb_rounding, noise_rank):
    options = {"master": master, "perturb_rounding": perturb_rounding, "noise_rank": noise_rank}
    opt = EvolutionStrategy(weights(*dtypes), sigma=0.05, lr=0.02, population=6, **options)
    assert_live_is_theta(bits, opt)
    start = tensors(opt)
    for generation in range(3):
        before = tensors(opt)
        for member in opt.ask():
            with opt.perturbed(member):
                assert opt.fingerprint("live") != opt.fingerprint("theta")
            assert_live_is_theta(bits, opt)
            assert_same(bits, before, tensors(opt))
        opt.tell(rewards(generation))
        assert_live_is_theta(bits, opt)
    opt.step(lambda: float(opt.param_groups[0]["params"][0].sum()))
    assert_live_is_theta(bits, opt)
    assert any(not torch.equal(start[name], t) for name, t in tensors(opt).items())


@pytest.mark.parametrize("master, dtypes", [("fp32", (BF16,)), ("copy", (F32, BF16, F16))], ids=str)
def test_ten_thousand_members_leave_no_trace(bits, weights, master, dtypes):
    opt = EvolutionStrategy(weights(*dtypes), sigma=0.05, lr=0.02, population=10_000, master=master)
    opt.tell(rewards(0, 10_000))  # theta is now no longer a value that live can hold
    theta = tensors(opt)
    for member in opt.ask():
        with opt.perturbed(member):
            pass
    assert_same(bits, theta, tensors(opt))
    assert_live_is_theta(bits, opt)


@pytest.mark.parametrize("master", ["fp32", "copy", "host"])
def test_an_exception_inside_perturbed_restores(bits, weights, master):
    opt = EvolutionStrategy(weights(BF16), sigma=0.05, population=4, master=master)
    opt.tell(rewards(0, 4))
    for kind in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(kind), opt.perturbed(3):
            raise kind
        assert_live_is_theta(bits, opt)
        with pytest.raises(kind):
            opt.evaluate(lambda member: raise_if(member == 2, kind))
        assert_live_is_theta(bits, opt)


def raise_if(condition, kind):
    if condition:
        raise kind


@pytest.mark.parametrize("bad", [lambda: 1 / 0, lambda: None, lambda: math.nan, lambda: "0.5x", lambda: math.inf])
def test_a_step_that_fails_changes_nothing(bits, weights, bad):
    opt = EvolutionStrategy(weights(BF16), sigma=0.05, population=4)
    opt.tell(rewards(0, 4))
    theta, calls = tensors(opt), []

    def closure():
        calls.append(1)
        return bad() if len(calls) == 3 else float(len(calls))

    with pytest.raises((ValueError, ZeroDivisionError)):
        opt.step(closure)
    assert_same(bits, theta, tensors(opt))
    assert_live_is_theta(bits, opt)
    assert opt.generation == 1


@pytest.mark.parametrize("noise_rank", [0, 1])
def test_without_a_base_f32_comes_back_nearly(weights, noise_rank):
    named = weights(F32)
    opt = EvolutionStrategy(named, sigma=0.05, population=4, master=None, noise_rank=noise_rank)
    assert opt._weights[0].theta is opt._weights[0].live
    start = tensors(opt)
    seen = []

    def closure():
        seen.append(tensors(opt, "live"))
        return 1.0  # no signal, so no update

    opt.step(closure)
    for member, live in enumerate(seen):
        expected = {name: t.clone() for name, t in start.items()}
        es_kernels.add_noise_(expected, [member_seed(0, 0, member)], [0.05], noise_rank=noise_rank)
        for name in start:
            torch.testing.assert_close(live[name], expected[name], rtol=0, atol=1e-6)
    for name, t in tensors(opt).items():
        torch.testing.assert_close(t, start[name], rtol=0, atol=1e-6)
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    for name, t in tensors(opt).items():
        torch.testing.assert_close(t, start[name], rtol=0, atol=1e-6)


def test_without_a_base_most_bf16_weights_come_back():
    """A member is taken out before the next is put in: what is left is in weights that changed their power of two in
    between. A swap in one pass would leave a rounding of every member, in 3 of 4 weights."""
    weight = torch.nn.Parameter(
        torch.empty(1 << 14).normal_(0, 0.02, generator=torch.Generator().manual_seed(0)).bfloat16()
    )
    before = weight.detach().clone()
    EvolutionStrategy([("w", weight)], sigma=1e-3, lr=5e-4, population=30, master=None).step(lambda: 0.0)
    assert 0 < (weight != before).float().mean() < 0.3


def calls(opt):
    yield lambda: opt.perturbed(1).__enter__()
    yield lambda: opt.step(lambda: 0.0)
    yield lambda: opt.evaluate(lambda member: 0.0)
    yield lambda: opt.tell([0.0] * 4)
    yield lambda: opt.replay(Update(0, None, 4, 0.0))
    yield opt.state_dict


def test_members_do_not_nest_and_nothing_else_runs_inside(weights):
    opt = EvolutionStrategy(weights(F32), population=4)
    with opt.perturbed(0):
        for call in calls(opt):
            with pytest.raises(RuntimeError, match="member's noise is in the weights"):
                call()
    with pytest.raises(ValueError, match="0..3"), opt.perturbed(4):
        pass


# --- weights that others write ---------------------------------------------------------------------------------------


def doors(opt):
    yield lambda: opt.step(lambda: 0.0)
    yield lambda: opt.evaluate(lambda member: 0.0)
    yield lambda: opt.perturbed(1).__enter__()
    yield lambda: opt.perturb(1)
    yield opt.restore
    yield lambda: opt.tell([0.0, 1.0, 2.0, 3.0])
    yield lambda: opt.apply(Update(opt.generation, (1.0, -1.0, 1.0, -1.0), 4, 0.0))
    yield lambda: opt.replay(Update(opt.generation, (1.0, -1.0, 1.0, -1.0), 4, 0.0))


@torch.no_grad()
def by_another_optimizer(named):
    for _, p in named:
        p.grad = torch.ones_like(p)
    torch.optim.SGD([p for _, p in named], lr=0.5).step()


@torch.no_grad()
def by_loading(named):
    module = torch.nn.Module()
    module.p = named[2][1]
    module.load_state_dict({"p": torch.full_like(module.p, 3.0)})


def by_data(named):  # as PEFT merges: torch counts no version
    named[2][1].data += 1.0


def by_another_memory(named):  # as PEFT's safe merge
    named[2][1].data = named[2][1].data + 1.0


WRITERS = [by_another_optimizer, by_loading, by_data, by_another_memory]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("master", ["fp32", "copy", "host"])
def test_weights_that_others_wrote_are_refused_at_every_door_and_adopted(bits, weights, master, write):
    named = weights(BF16)
    groups = [{"params": named[:1]}, {"params": named[1:]}]
    opt = EvolutionStrategy(groups, sigma=0.05, lr=0.02, population=4, master=master, anchored=True, weight_decay=0.5)
    opt.tell(rewards(0, 4))
    theta, anchor = tensors(opt), tensors(opt, "anchor")
    write(named)
    written = {name: p.detach().clone() for name, p in named}
    for call in doors(opt):
        with pytest.raises(RuntimeError, match=r"'layer[02]\.weight' .* adopt_live\(\)"):
            call()
        assert_same(bits, theta, tensors(opt))
        assert_same(bits, written, {name: p.detach() for name, p in named})
    opt.adopt_live()
    assert_same(bits, written, {name: p.detach() for name, p in named})
    assert_same(bits, {name: t.to(theta[name].dtype) for name, t in written.items()}, tensors(opt))
    assert_same(bits, anchor, tensors(opt, "anchor"))
    assert opt.generation == 1
    run(opt, 1)
    assert_live_is_theta(bits, opt)


def test_theta_can_be_put_back_instead(bits, weights):
    named = weights(BF16)
    opt = EvolutionStrategy(named, sigma=0.05, population=4)
    run(opt, 1)
    before = tensors(opt)
    by_data(named)
    opt.load_state_dict(opt.state_dict())
    assert_same(bits, before, tensors(opt))
    assert_live_is_theta(bits, opt)
    run(opt, 1)


def test_a_write_of_the_same_values_is_no_change(weights):
    named = weights(BF16)
    opt = EvolutionStrategy(named, population=4)
    with torch.no_grad():
        for _, p in named:
            p.copy_(p.clone())
    run(opt, 1)


@pytest.mark.parametrize("drive", ["step", "evaluate", "perturbed", "perturb"])
def test_weights_written_while_a_member_is_in_place_are_said_to_be_undone(bits, weights, drive):
    named = weights(BF16)
    opt = EvolutionStrategy(named, sigma=0.05, population=4)
    theta = tensors(opt)

    members = itertools.cycle(range(4))

    def write_in_the_last(member=None):
        if next(members) == 3:
            by_loading(named)
        return 1.0

    def perturbed():
        with opt.perturbed(1):
            by_loading(named)

    def perturb():
        opt.perturb(1)
        by_loading(named)
        with pytest.raises(RuntimeError, match="others"):
            opt.perturb(2)
        opt.restore()

    calls = {"perturbed": perturbed, "perturb": perturb}
    calls |= {"step": lambda: opt.step(write_in_the_last), "evaluate": lambda: opt.evaluate(write_in_the_last)}
    with pytest.raises(RuntimeError, match="'layer2.weight' was written by others while a member's noise"):
        calls[drive]()
    assert_same(bits, theta, tensors(opt))
    assert_live_is_theta(bits, opt)
    with pytest.raises(ZeroDivisionError), opt.perturbed(1):  # which is not hidden
        by_loading(named)
        raise ZeroDivisionError
    run(opt, 1)


def test_without_a_base_what_others_write_is_theta(bits, weights):
    one, two = weights(F32), weights(F32)
    by_data(two)
    opt, other = EvolutionStrategy(one, population=4, master=None), EvolutionStrategy(two, population=4, master=None)
    by_data(one)
    for of in (opt, other):
        run(of, 1)
        of.adopt_live()
    assert_same(bits, tensors(opt), tensors(other))


def test_what_theta_cannot_hold_is_not_adopted(weights):
    for change, master in ((lambda p: p.data.float(), "copy"), (lambda p: p.data[:3], "fp32")):
        named = weights(BF16)
        opt = EvolutionStrategy(named, population=4, master=master)
        named[0][1].data = change(named[0][1])
        with pytest.raises(ValueError, match="'layer0.weight' is .* cannot hold: make a new EvolutionStrategy"):
            opt.adopt_live()
    opt = EvolutionStrategy(weights(BF16), population=4)
    with opt.perturbed(0), pytest.raises(RuntimeError, match="member's noise is in the weights"):
        opt.adopt_live()


def test_groups_may_be_views_of_one_tensor():
    """As q, k and v are of what an engine fuses: torch counts the writes to all of them together."""
    fused = torch.zeros(12, 8)
    groups = [
        {"params": [(name, fused[4 * i : 4 * i + 4].detach().requires_grad_())], "sigma": 0.1 + i}
        for i, name in enumerate("qkv")
    ]
    optimizer = EvolutionStrategy(groups, population=4, seed=1)
    rewards = iter(range(100))
    for _ in range(2):
        optimizer.step(lambda: next(rewards))
    with optimizer.perturbed(0):
        pass
    with pytest.raises(RuntimeError, match="written by others"):
        with optimizer.perturbed(0):
            fused.add_(1)


@pytest.mark.parametrize("master", ["fp32", "host"])
def test_an_interrupted_write_is_nobodys_change(bits, weights, monkeypatch, master):
    """Of the member, of its end, of theta."""
    opt = EvolutionStrategy(weights(BF16), sigma=0.05, population=4, master=master)
    add_noise_ = es_kernels.add_noise_
    for broken in range(3):
        writes = iter(range(9))

        def interrupted(*arguments, **options):
            add_noise_(*arguments, **options)
            if next(writes) == broken:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(es_kernels, "add_noise_", interrupted)
            with pytest.raises(KeyboardInterrupt):
                opt.perturb(1)
                opt.restore()
                opt.tell(rewards(0, 4))
        opt.restore()
        if broken < 2:  # at the third theta has moved, and live has not yet
            assert_live_is_theta(bits, opt)
    run(opt, 1)
    assert_live_is_theta(bits, opt)


# --- the update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_rank", [0, 1, 3])
def test_the_update_is_the_formula(bits, weights, noise_rank):
    """One pass: theta - decay * (theta - anchor) + sum coefs[i] noise(seeds[i]), in member order."""
    options = {"lr": 0.03, "weight_decay": 0.5, "anchored": True, "noise_rank": noise_rank}
    opt = EvolutionStrategy(weights(BF16), sigma=0.05, population=6, seed=9, **options)
    anchor = tensors(opt, "live")
    for generation in range(2):
        expected = tensors(opt)
        fitness = rewards(generation)
        coefs = [float(np.float32(0.03 / 6 * z)) for z in z_scores(fitness)]
        seeds = [member_seed(9, generation, member) for member in range(6)]
        es_kernels.add_noise_(expected, seeds, coefs, decay=0.03 * 0.5, anchor=anchor, noise_rank=noise_rank)
        update = opt.tell(fitness)
        assert update.generation == generation and update.scored == 6 and update.z == z_scores(fitness)
        assert_same(bits, expected, tensors(opt))


def test_step_and_ask_tell_are_the_same_generation(bits, weights):
    stepped, told = (EvolutionStrategy(weights(F32, BF16), sigma=0.05, population=6, seed=3) for _ in range(2))
    fitness = rewards(0)
    seen = iter(fitness)
    live = []

    def closure():
        assert not torch.is_grad_enabled()
        live.append(tensors(stepped, "live"))
        return next(seen)

    assert stepped.step(closure) == math.fsum(fitness) / 6
    for member in told.ask():
        with told.perturbed(member):
            assert_same(bits, live[member], tensors(told, "live"))
    told.tell(fitness)
    assert_same(bits, tensors(stepped), tensors(told))
    assert stepped.generation == told.generation == 1


def test_antithetic_pairs_share_noise_and_fold_their_scores(bits, weights):
    opt = EvolutionStrategy(weights(F32), sigma=0.05, lr=0.03, population=6, antithetic=True, seed=2)
    theta = tensors(opt)
    for member in opt.ask():
        expected = {name: torch.empty_like(t) for name, t in theta.items()}
        es_kernels.add_noise_(
            expected, [member_seed(2, 0, member // 2)], [0.05 if member % 2 == 0 else -0.05], base=theta
        )
        with opt.perturbed(member):
            assert_same(bits, expected, tensors(opt, "live"))
    z = z_scores(rewards(0))
    coefs = [float(np.float32(0.03 / 6 * (z[2 * k] - z[2 * k + 1]))) for k in range(3)]
    es_kernels.add_noise_(theta, [member_seed(2, 0, k) for k in range(3)], coefs)
    opt.tell(rewards(0))
    assert_same(bits, theta, tensors(opt))
    with pytest.raises(ValueError, match="even"):
        EvolutionStrategy(weights(F32), population=5, antithetic=True)


def test_dropped_members_have_coefficient_zero_and_do_not_count(bits, weights):
    opt = EvolutionStrategy(weights(F32), lr=0.03, population=6)
    theta, fitness = tensors(opt), rewards(0)
    rest = [None if m in (1, 4) else r for m, r in enumerate(fitness)]
    update = opt.tell([math.nan if r is None else r for r in rest], dropped=[1, 4])
    assert update.scored == 4 and update.z == z_scores(rest) and update.z[1] == update.z[4] == 0
    es_kernels.add_noise_(
        theta, [member_seed(0, 0, m) for m in range(6)], [float(np.float32(0.03 / 4 * z)) for z in update.z]
    )
    assert_same(bits, theta, tensors(opt))

    paired = EvolutionStrategy(weights(F32), population=6, antithetic=True)
    z = paired.tell(fitness, dropped=[3]).z
    assert z[2] == z[3] == 0 and all(z[m] for m in (0, 1, 4, 5))
    for dropped, words in (([0, 2, 4], "every member was dropped"), ([6], "dropped members")):
        with pytest.raises(ValueError, match=words):
            paired.tell(fitness, dropped=dropped)


def test_equal_rewards_mean_no_noise_and_no_decay(bits, weights):
    opt = EvolutionStrategy(weights(BF16), weight_decay=0.5, population=6)
    theta = tensors(opt)
    assert opt.tell([0.015] * 6).z is None
    assert_same(bits, theta, tensors(opt))
    assert opt.generation == 1


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, "", [1.0, 2.0]])
def test_a_reward_that_is_none_is_refused_with_nothing_changed(bits, weights, bad):
    opt = EvolutionStrategy(weights(BF16), population=4)
    theta = tensors(opt)
    with pytest.raises(ValueError, match="reward of member 2"):
        opt.tell([0.0, 1.0, bad, 3.0])
    with pytest.raises(ValueError, match="4 rewards"):
        opt.tell([0.0, 1.0, 3.0])
    assert_same(bits, theta, tensors(opt))
    assert opt.generation == 0


def test_a_copy_rounds_its_update_stochastically_with_the_seed_of_the_generation(bits, weights):
    opt = EvolutionStrategy(weights(BF16), lr=1e-4, population=6, master="copy", seed=5)
    theta = tensors(opt)
    coefs = [float(np.float32(1e-4 / 6 * z)) for z in z_scores(rewards(0))]
    es_kernels.add_noise_(
        theta,
        [member_seed(5, 0, m) for m in range(6)],
        coefs,
        rounding="stochastic",
        rounding_seed=member_seed(5, 0, 0, purpose=3),
    )
    opt.tell(rewards(0))
    assert_same(bits, theta, tensors(opt))


@pytest.mark.parametrize("shaping, shaped", [("zscore", z_scores), ("ranks", centred_ranks)])
def test_the_update_uses_the_z_of_its_shaping(bits, weights, shaping, shaped):
    opt = EvolutionStrategy(weights(BF16), lr=0.03, population=6, shaping=shaping)
    theta, fitness = tensors(opt), [3.0, 1.0, 1.0, None, -2.0, 1e9]
    z = shaped(fitness)
    es_kernels.add_noise_(
        theta, [member_seed(0, 0, m) for m in range(6)], [float(np.float32(0.03 / 5 * value)) for value in z]
    )
    assert opt.tell(fitness, dropped=[3]) == Update(0, z, 5, math.fsum([3.0, 1.0, 1.0, -2.0, 1e9]) / 5, (3,))
    assert_same(bits, theta, tensors(opt))


def test_per_prompt_takes_a_sequence_of_rewards_from_each_member(bits, weights):
    told, stepped = (
        EvolutionStrategy(weights(BF16), sigma=0.05, lr=0.03, population=4, shaping="per_prompt") for _ in range(2)
    )
    fitness = [[0.0, 10.0, 1.0], [1.0, 10.0, 3.0], [1.0, 10.0, 2.5], [0.5, 10.0, -1.0]]
    theta, z = tensors(told), per_prompt(fitness)
    es_kernels.add_noise_(
        theta, [member_seed(0, 0, m) for m in range(4)], [float(np.float32(0.03 / 4 * value)) for value in z]
    )
    update = told.tell([tuple(fitness[0]), np.array(fitness[1]), torch.tensor(fitness[2]), fitness[3]])
    assert update.z == z and update.scored == 4
    assert update.reward == math.fsum(math.fsum(row) / 3 for row in fitness) / 4
    rows = iter(fitness)
    assert stepped.step(lambda: next(rows)) == update.reward
    for opt in (told, stepped):
        assert_same(bits, theta, tensors(opt))


@pytest.mark.parametrize(
    "bad, words",
    [
        (1.0, "must be a sequence"),
        ([], "must be a sequence"),
        ("12", "must be a sequence"),
        ({0: 1.0, 1: 2.0}, "must be a sequence"),
        (torch.zeros(2, 1), "must be a sequence"),
        (torch.tensor(1.0), "must be a sequence"),
        (None, "must be a sequence"),
        ([1.0, None], "must be one number"),
        ([1.0, math.nan], "is nan"),
        ([1.0, 2.0, 3.0], "has 3"),
    ],
    ids=str,
)
def test_per_prompt_refuses_what_is_no_reward_for_each_prompt(bits, weights, bad, words):
    opt = EvolutionStrategy(weights(BF16), population=4, shaping="per_prompt")
    theta = tensors(opt)
    for drive in (opt.tell, lambda fitness: opt.step(iter(fitness).__next__)):
        with pytest.raises(ValueError, match=f"member 2 .*{words}"):
            drive([[0.0, 1.0], [1.0, 0.0], bad, [1.0, 1.0]])
    assert_same(bits, theta, tensors(opt))
    assert_live_is_theta(bits, opt)
    assert opt.generation == 0


@pytest.mark.parametrize("antithetic, noise_rank", [(False, 0), (True, 0), (True, 1)])
def test_momentum_is_one_pass_over_the_last_generations_oldest_first(bits, weights, antithetic, noise_rank):
    """Generation 2 has no signal, generation 3 drops two members, lr changes: every coefficient takes the present lr
    and its own N."""
    opt = EvolutionStrategy(
        weights(BF16),
        lr=0.5,
        weight_decay=0.1,
        population=6,
        momentum=0.7,
        momentum_window=4,
        antithetic=antithetic,
        noise_rank=noise_rank,
        update_rounding="stochastic",
    )
    past = []
    for generation in range(8):
        lr = opt.param_groups[0]["lr"] = 0.5 / (1 + generation)
        theta, fitness = tensors(opt), [1.0] * 6 if generation == 2 else rewards(generation)
        update = opt.tell(fitness, dropped=[2, 3] if generation == 3 else [])
        if generation == 2:
            assert update.z is None
            assert_same(bits, theta, tensors(opt))
            continue
        past.append(update)
        seeds, coefs = [], []
        for then in past:
            age = generation - then.generation
            if age < 4:
                z = [a - b for a, b in zip(then.z[::2], then.z[1::2], strict=True)] if antithetic else then.z
                seeds += [member_seed(0, then.generation, m) for m in range(len(z))]
                coefs += [float(np.float32(lr / (4 if then.generation == 3 else 6) * 0.7**age * value)) for value in z]
        es_kernels.add_noise_(
            theta,
            seeds,
            coefs,
            decay=lr * 0.1,
            rounding="stochastic",
            rounding_seed=member_seed(0, generation, 0, purpose=3),
            noise_rank=noise_rank,
        )
        assert_same(bits, theta, tensors(opt))
        assert_live_is_theta(bits, opt)


@pytest.mark.parametrize(
    "options", [{"momentum": 0.0, "momentum_window": 3}, {"momentum": 0.9, "momentum_window": 1}], ids=str
)
def test_without_momentum_nothing_is_carried_over(bits, weights, options):
    plain, other = (
        EvolutionStrategy(weights(BF16), population=6),
        EvolutionStrategy(weights(BF16), population=6, **options),
    )
    run(plain, 3)
    run(other, 3)
    assert_same(bits, tensors(plain), tensors(other))
    assert plain.state_dict()["es"]["history"] == []
    assert len(other.state_dict()["es"]["history"]) == (1 if options["momentum"] else 0)


@pytest.mark.parametrize(
    "options",
    [
        {"shaping": "ranks"},
        {"shaping": "per_prompt"},
        {"momentum": 0.9},
        {"weight_decay": 0.1},
        {"lr": 0.3},
        {"update_rounding": "stochastic"},
        {"master": "copy"},
        {"master": "host"},
    ],
    ids=str,
)
def test_what_changes_the_update_does_not_change_the_members(bits, weights, options):
    """Weights in f32, where no master rounds."""
    plain = EvolutionStrategy(weights(F32), sigma=0.05, population=6)
    other = EvolutionStrategy(weights(F32), sigma=0.05, population=6, **options)
    for member in plain.ask():
        with plain.perturbed(member), other.perturbed(member):
            assert_same(bits, tensors(plain, "live"), tensors(other, "live"))
    for opt in (plain, other):
        for generation in range(2):
            fitness = (
                [[r, -(r**2)] for r in rewards(generation)] if opt.shaping == "per_prompt" else rewards(generation)
            )
            opt.tell(fitness)
    same = all(torch.equal(bits(t), bits(tensors(other)[name])) for name, t in tensors(plain).items())
    assert same == ("master" in options or "update_rounding" in options)


# --- evaluate and replay ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("master", ["fp32", "copy", "host", None])
def test_evaluate_shows_every_member_and_leaves_theta(bits, weights, master):
    """Then told, it is a step; asked for nothing else, it is nothing."""
    opt, stepped, looked = (
        EvolutionStrategy(weights(F32), sigma=0.05, population=6, master=master, seed=4) for _ in range(3)
    )
    before, seen = tensors(opt), []

    def closure(member):
        assert not torch.is_grad_enabled()
        seen.append((member, tensors(opt, "live")))
        return {"member": member}

    assert opt.evaluate(closure) == [{"member": member} for member in range(6)]
    assert [member for member, _ in seen] == list(range(6)) and opt.generation == 0
    if master is not None:
        assert_same(bits, before, tensors(opt))
        assert_live_is_theta(bits, opt)
        for member, live in seen:
            with looked.perturbed(member):
                assert_same(bits, live, tensors(looked, "live"))
    fitness = iter(rewards(0))
    seen_by_step = []
    stepped.step(lambda: seen_by_step.append(tensors(stepped, "live")) or next(fitness))
    for (_, live), other in zip(seen, seen_by_step, strict=True):
        assert_same(bits, live, other)
    opt.tell(rewards(0))
    assert_same(bits, tensors(opt), tensors(stepped))
    assert_same(bits, tensors(opt, "live"), tensors(stepped, "live"))


def test_a_generation_passes_over_memory_so_often(weights, monkeypatch):
    passes = []
    add_noise_ = es_kernels.add_noise_
    monkeypatch.setattr(
        es_kernels,
        "add_noise_",
        lambda out, seeds, coefs, **rest: passes.append(len(seeds)) or add_noise_(out, seeds, coefs, **rest),
    )
    looks = []
    fingerprint = es_kernels.fingerprint
    monkeypatch.setattr(es_kernels, "fingerprint", lambda table: looks.append(table) or fingerprint(table))
    for master, step, replay in (("fp32", [1, 1, 1, 1, 4, 0], [4, 0]), (None, [1] * 8 + [4], [1] * 8 + [4])):
        opt = EvolutionStrategy(weights(F32), population=4, master=master)
        fitness = iter(rewards(0, 4))
        opt.step(fitness.__next__)
        assert passes == step
        passes.clear()
        opt.replay(Update(1, z_scores(rewards(1, 4)), 4, 0.0))
        assert passes == replay
        assert len(looks) == (5 if master else 0)  # for what others write: one at the start, two a generation
        passes.clear()
        looks.clear()


REPLAYED = [
    {"master": "fp32", "shaping": "ranks"},
    {"master": "copy", "perturb_rounding": "stochastic", "momentum": 0.9, "momentum_window": 2},
    {"master": "host", "momentum": 0.9, "weight_decay": 0.1, "anchored": True},
    {"master": None},
    {"master": None, "antithetic": True, "momentum": 0.5, "weight_decay": 0.1, "anchored": True},
    {"master": "copy", "noise_rank": 1, "momentum": 0.5},
    {"master": None, "noise_rank": 3},
]


@pytest.mark.parametrize("config", REPLAYED, ids=str)
def test_a_replay_of_the_updates_is_the_run(bits, weights, config):
    """In bf16, where with master=None each member leaves its rounding; the second generation has no signal, and lr and
    sigma change."""
    original, replayed = (
        EvolutionStrategy(weights(BF16), sigma=0.05, lr=0.02, population=6, seed=3, **config) for _ in range(2)
    )
    shaped = centred_ranks if "shaping" in config else z_scores
    for generation in range(4):
        for opt in (original, replayed):
            opt.param_groups[0].update(sigma=0.05 / (1 + generation), lr=0.02 * (1 + generation))
        fitness = [1.0] * 6 if generation == 1 else rewards(generation)
        if generation == 3:
            original.evaluate(lambda member: None)
            update = original.tell([*fitness[:4], None, None], dropped=[4, 5])
        else:
            left = iter(fitness)
            update = Update(generation, shaped(fitness), 6, original.step(lambda: next(left)))
        assert replayed.replay(update) == update
        assert replayed.generation == generation + 1
        assert_same(bits, tensors(original), tensors(replayed))
        assert_same(bits, tensors(original, "live"), tensors(replayed, "live"))


def test_an_update_of_another_generation_or_population_is_refused(bits, weights):
    opt = EvolutionStrategy(weights(BF16), population=4, master=None)
    theta = tensors(opt)
    for update, words in (
        (Update(1, (1.0, -1.0, 1.0, -1.0), 4, 0.0), "of generation 1, but this optimizer is at 0"),
        (Update(0, (1.0, -1.0, 0.5), 3, 0.0), "3 values of z, but the population is 4"),
    ):
        with pytest.raises(ValueError, match=words):
            opt.replay(update)
    assert_same(bits, theta, tensors(opt))
    assert opt.generation == 0


# --- theta in host memory --------------------------------------------------------------------------------------------


def test_host_has_the_bits_of_fp32_and_its_state_is_on_the_cpu(bits, weights):
    options = {
        "sigma": 0.05,
        "lr": 0.02,
        "population": 6,
        "weight_decay": 0.1,
        "anchored": True,
        "perturb_rounding": "stochastic",
    }
    fp32, host = (EvolutionStrategy(weights(F32, BF16, F16), master=master, **options) for master in ("fp32", "host"))
    for generation in range(3):
        for member in fp32.ask():
            with fp32.perturbed(member), host.perturbed(member):
                assert_same(bits, tensors(fp32, "live"), tensors(host, "live"))
        assert fp32.tell(rewards(generation)) == host.tell(rewards(generation))
        assert_same(bits, tensors(fp32), tensors(host))
        assert fp32.fingerprint() == host.fingerprint()
    assert {t.dtype for t in tensors(host).values()} == {F32}
    assert all(t.device.type == "cpu" for w in host._weights for table in (w.theta, w.anchor) for t in table.tensors)


def test_host_is_not_written_before_the_device_has_read_it(weights, monkeypatch):
    """On a GPU kernels are queued, while the CPU writes at once: of each table that was read, a wait must come before
    the write. And before the caller goes on, who may free it."""
    opt = EvolutionStrategy([{"params": weights(F32)[:2]}, {"params": weights(F32)[2:]}], population=4, master="host")
    add_noise_, pending, writes = es_kernels.add_noise_, set(), []

    def watched(out, seeds, coefs, base=None, **options):
        if base is None:
            assert id(out) not in pending
            writes.append(id(out))
        else:
            pending.add(id(base))
        return add_noise_(out, seeds, coefs, base=base, **options)

    monkeypatch.setattr(es_kernels, "add_noise_", watched)
    monkeypatch.setattr(
        "es_finetune.optim.weights.GroupWeights.wait_for_readers", lambda self: pending.discard(id(self.theta))
    )
    fitness = iter(rewards(0, 4))
    opt.step(lambda: next(fitness))
    assert not pending and len(writes) == 2
    with opt.perturbed(1):
        assert len(pending) == 2
    assert not pending
    opt.tell(rewards(1, 4))
    assert not pending and len(writes) == 4


# --- the same bits everywhere ----------------------------------------------------------------------------------------

CONFIGS = [
    {"master": "fp32"},
    {"master": "copy", "perturb_rounding": "stochastic", "momentum": 0.9, "momentum_window": 2},
    {"master": None, "momentum": 0.5, "weight_decay": 0.1},
    {"master": "host", "antithetic": True, "weight_decay": 0.1, "anchored": True, "shaping": "ranks", "momentum": 0.5},
    {"master": "copy", "noise_rank": 2, "momentum": 0.5, "weight_decay": 0.1},
    {"master": None, "noise_rank": 1},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_run_with_recorded_scores_is_the_same_on_every_backend(bits, weights, kernel_backend, config):
    def whole_run():
        opt = EvolutionStrategy(weights(F32, BF16, F16), sigma=0.05, lr=0.02, population=4, seed=1, **config)
        run(opt, 2)
        recorded = iter(rewards(99, 4))
        opt.step(lambda: next(recorded))
        return tensors(opt), tensors(opt, "live"), opt.fingerprint("theta"), opt.fingerprint("live")

    here = whole_run()
    with es_kernels.backend("reference"):
        golden = whole_run()
    assert_same(bits, golden[0], here[0])
    assert_same(bits, golden[1], here[1])
    assert golden[2:] == here[2:]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_resumed_run_ends_with_the_bits_of_one_never_stopped(bits, weights, config):
    options = {"sigma": 0.05, "lr": 0.02, "population": 6, "seed": 2**64 - 1, **config}
    whole = EvolutionStrategy(weights(F32, BF16), **options)
    run(whole, 3)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    run(whole, 4)

    other = [(name, torch.nn.Parameter(torch.zeros_like(p))) for name, p in weights(F32, BF16)]
    # The rest is in the state
    resumed = EvolutionStrategy(other, master=config["master"], sigma=0.05, population=2, anchored="anchored" in config)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.generation == 3 and resumed.seed == 2**64 - 1
    if config["master"]:
        assert_live_is_theta(bits, resumed)
    run(resumed, 4)
    assert_same(bits, tensors(whole), tensors(resumed))
    assert_same(bits, tensors(whole, "live"), tensors(resumed, "live"))
    assert whole.fingerprint() == resumed.fingerprint()


@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        pickle.dumps,
        lambda opt: torch.save(opt, io.BytesIO()),
        lambda opt: copy.deepcopy({"optimizer": opt}),
    ],
)
def test_a_copy_is_refused_and_the_state_serves(bits, weights, copied):
    opt, other = (EvolutionStrategy(weights(BF16), population=4) for _ in range(2))
    run(opt, 1)
    with pytest.raises(TypeError, match=r"cannot be copied or pickled.*state_dict\(\).*load_state_dict\(\)"):
        copied(opt)
    other.load_state_dict(pickle.loads(pickle.dumps(copy.deepcopy(opt.state_dict()))))
    assert_same(bits, tensors(opt), tensors(other))


def test_a_state_that_does_not_fit_is_refused_with_nothing_changed(bits, weights):
    opt = EvolutionStrategy(weights(BF16), population=4)
    theta = tensors(opt)
    state = copy.deepcopy(EvolutionStrategy(weights(BF16), population=4, master="copy").state_dict())
    with pytest.raises(ValueError, match="master 'copy'"):
        opt.load_state_dict(state)
    for change, words in (
        (lambda es: es["theta"].popitem(), "differ in 1"),
        (lambda es: es["theta"].update({"layer1.weight": torch.zeros(5)}), "layer1.weight"),
        (lambda es: es.update(noise_version=99), "noise_version 99"),
        # As states were saved before `base` was named `master`
        (lambda es: es.update(base=es.pop("master")), "no 'master', so another version .* load it with that version"),
        *((lambda es, key=key: es.pop(key), f"no '{key}', so another version") for key in opt.state_dict()["es"]),
    ):
        state = copy.deepcopy(opt.state_dict())
        state["es"]["generation"] = 7
        change(state["es"])
        with pytest.raises(ValueError, match=words):
            opt.load_state_dict(state)
    with pytest.raises(ValueError, match="no state of an EvolutionStrategy"):
        opt.load_state_dict(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]).state_dict())
    assert_same(bits, theta, tensors(opt))
    assert opt.generation == 0


# --- a torch optimizer -----------------------------------------------------------------------------------------------


def test_groups_have_their_own_sigma_lr_and_decay(bits, weights):
    named = weights(F32, BF16)
    groups = [{"params": named[:2], "sigma": 0.5, "lr": 0.0}, {"params": named[2:], "weight_decay": 0.1}]
    opt = EvolutionStrategy(groups, sigma=0.01, lr=0.02, population=4)
    assert [(g["sigma"], g["lr"], g["weight_decay"]) for g in opt.param_groups] == [(0.5, 0.0, 0.0), (0.01, 0.02, 0.1)]
    theta = tensors(opt)
    with opt.perturbed(1):
        moved = {
            name: (t.float() - theta[name]).square().mean().sqrt().item()
            for name, t in tensors(opt, "live").items()
            if t.numel() > 30
        }
    assert moved.pop("layer2.weight") == pytest.approx(0.01, rel=0.3)
    assert all(rms == pytest.approx(0.5, rel=0.3) for rms in moved.values())
    opt.tell(rewards(0, 4))
    after = tensors(opt)
    assert_same(
        bits,
        {n: theta[n] for n in ("layer0.weight", "layer1.weight")},
        {n: after[n] for n in ("layer0.weight", "layer1.weight")},
    )
    assert not torch.equal(theta["layer2.weight"], after["layer2.weight"])


def test_groups_have_their_own_rank_and_keep_it_in_the_state(bits, weights):
    named = weights(F32, BF16)

    def optimizer(parameters, ranks):
        groups = [{"params": parameters[:2], "noise_rank": ranks[0]}, {"params": parameters[2:], **ranks[1]}]
        return EvolutionStrategy(groups, sigma=0.01, lr=0.02, population=4, noise_rank=3)

    opt = optimizer(named, (1, {}))
    assert [group["noise_rank"] for group in opt.param_groups] == [1, 3]
    theta, expected = tensors(opt), tensors(opt, "live")
    for names, rank in ((("layer0.weight", "layer1.weight"), 1), (("layer2.weight", "layer3.weight"), 3)):
        of_group = {name: expected[name] for name in names}
        base = {name: theta[name] for name in names}
        es_kernels.add_noise_(of_group, member_seed(0, 0, 1), 0.01, base=base, noise_rank=rank)
    with opt.perturbed(1):
        assert_same(bits, expected, tensors(opt, "live"))
    run(opt, 1)
    state = copy.deepcopy(opt.state_dict())
    resumed = optimizer(weights(F32, BF16), (0, {"noise_rank": 2}))
    resumed.load_state_dict(state)
    run(opt, 1)
    run(resumed, 1)
    assert_same(bits, tensors(opt), tensors(resumed))
    for group in state["param_groups"]:  # as saved before there was noise of low rank
        del group["noise_rank"]
    resumed.load_state_dict(state)
    assert [group["noise_rank"] for group in resumed.param_groups] == [0, 0]


def test_how_parameters_are_grouped_does_not_change_the_noise(bits, weights):
    one, two = weights(F32), weights(F32)
    whole = EvolutionStrategy(one, population=4)
    parts = EvolutionStrategy([{"params": two[2:]}, {"params": two[:2]}], population=4)
    run(whole, 2)
    run(parts, 2)
    assert_same(bits, tensors(whole), tensors(parts))
    assert whole.fingerprint() == parts.fingerprint()


FUSED = [es_kernels.Segment(f"experts.{i}.up", 1, 32, offset=32 * i, width=8) for i in range(2)]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("config", [*CONFIGS, {"master": None, "anchored": True, "weight_decay": 0.1}], ids=str)
def test_a_fused_tensor_is_the_tensors_of_its_segments(bits, dtype, config):
    """[2, 4, 8] in memory, two of [4, 8] in the checkpoint."""
    value = 0.1 * torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))

    def parameter(tensor):
        return torch.nn.Parameter(tensor.to(dtype, copy=True))

    fused = EvolutionStrategy(
        [("experts.up", parameter(value), FUSED), ("norm", parameter(torch.ones(3)))],
        sigma=0.05,
        population=6,
        **config,
    )
    apart = EvolutionStrategy(
        [*((f"experts.{i}.up", parameter(value[i])) for i in range(2)), ("norm", parameter(torch.ones(3)))],
        sigma=0.05,
        population=6,
        **config,
    )

    def compare(kind):
        one, two = tensors(fused, kind), tensors(apart, kind)
        assert one.keys() == {"experts.up", "norm"}
        assert_same(bits, {f"experts.{i}.up": one["experts.up"][i] for i in range(2)} | {"norm": one["norm"]}, two)

    for generation in range(2):
        for member in range(6):
            with fused.perturbed(member), apart.perturbed(member):
                compare("live")
        assert fused.tell(rewards(generation)) == apart.tell(rewards(generation))
        compare("theta")
        compare("live")
    assert fused.fingerprint() == apart.fingerprint()
    assert fused.state_dict()["es"]["theta"].keys() == {"experts.up", "norm"}
    assert fused.state_dict()["param_groups"][0]["param_names"] == ["experts.up", "norm"]


@pytest.mark.parametrize("drive", ["step", "tell", "replay"])
def test_lr_schedulers_drive_lr(weights, drive, recwarn):
    opt = EvolutionStrategy(weights(F32), lr=0.08, population=4)
    schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
    seen = []
    for generation in range(3):
        seen.append(opt.param_groups[0]["lr"])
        before = tensors(opt)
        if drive == "step":
            recorded = iter(rewards(0, 4))
            opt.step(lambda: next(recorded))
        elif drive == "tell":
            opt.tell(rewards(0, 4))
        else:
            opt.replay(Update(generation, z_scores(rewards(0, 4)), 4, 0.0))
        coefs = [float(np.float32(seen[-1] / 4 * z)) for z in z_scores(rewards(0, 4))]
        es_kernels.add_noise_(before, [member_seed(0, generation, m) for m in range(4)], coefs)
        assert torch.equal(before["layer0.weight"], tensors(opt)["layer0.weight"])
        schedule.step()
    assert seen == [0.08, 0.04, 0.02]
    assert not recwarn.list  # torch warns where a scheduler believes that no step was made


def test_tied_weights_are_one_parameter_under_their_first_name(bits, tiny_llama):
    named = list(tiny_llama.named_parameters(remove_duplicate=False))
    assert len(named) > len(list(tiny_llama.named_parameters()))
    opt = EvolutionStrategy(named, sigma=0.01, lr=0.01, population=4)
    assert opt._weights[0].live.names == [name for name, _ in tiny_llama.named_parameters()]
    start = tensors(opt)
    run(opt, 2)
    assert tiny_llama.lm_head.weight is tiny_llama.model.embed_tokens.weight
    assert_live_is_theta(bits, opt)
    assert not torch.equal(start["model.embed_tokens.weight"], tensors(opt)["model.embed_tokens.weight"])


def test_frozen_parameters_stay_out(bits, weights):
    named = weights(F32)
    named[0][1].requires_grad_(False)
    before = named[0][1].clone()
    opt = EvolutionStrategy(named, population=4)
    run(opt, 1)
    assert "layer0.weight" not in tensors(opt)
    assert torch.equal(bits(before), bits(named[0][1]))


def test_it_learns_a_quadratic(weights):
    named = weights(F32)
    goal = {name: torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1 for name, p in named}

    def closure():
        return -sum(((p - goal[name]) ** 2).sum().item() for name, p in named)

    opt = EvolutionStrategy(named, sigma=0.02, lr=0.1, population=40)
    first = closure()
    for _ in range(60):
        opt.step(closure)
    assert closure() > first / 4


@pytest.mark.parametrize(
    "options, words",
    [
        ({"sigma": 0.0}, "sigma must be"),
        ({"sigma": math.nan}, "sigma must be"),
        ({"lr": -1.0}, "lr must be"),
        ({"weight_decay": math.inf}, "weight_decay must be"),
        ({"population": 1}, "population must be at least 2"),
        ({"master": "bf16"}, "master must be"),
        ({"perturb_rounding": "up"}, "perturb_rounding must be"),
        ({"master": None, "perturb_rounding": "stochastic"}, "needs weights to return to"),
        ({"shaping": "rank"}, "shaping must be"),
        ({"momentum": 1.0}, "momentum must be"),
        ({"momentum": -0.1}, "momentum must be"),
        ({"momentum": math.nan}, "momentum must be"),
        ({"momentum": "0.9"}, "momentum must be a number, not '0.9'"),
        ({"momentum_window": 0}, "momentum_window"),
        ({"momentum_window": 2.0}, "momentum_window.* must be a whole number, not 2.0"),
        ({"sigma": 1e-50}, "sigma must be a number that float32 holds"),
        ({"sigma": 1e39}, "sigma must be a number that float32 holds"),
        ({"sigma": True}, "sigma must be a number, not True"),
        ({"lr": 1e39}, "lr must be a number that float32 holds"),
        ({"lr": 1e-50}, "lr must be a number that float32 holds"),
        ({"lr": 1e-30, "weight_decay": 1e-30}, r"the decay, lr \* weight_decay, must be a number that float32 holds"),
        ({"lr": 1e30, "weight_decay": 1e30}, r"the decay, lr \* weight_decay, must be a number that float32 holds"),
        ({"population": True}, "population must be a whole number, not True"),
        ({"population": 6.0}, "population must be a whole number, not 6.0"),
        ({"population": 2**32}, "population must be at most 4294967295"),
        ({"seed": 2**64}, r"seed must be a whole number of 64 bits, at most 2\^64 - 1, not 18446744073709551616"),
        ({"seed": 0.0}, "seed must be a whole number, not 0.0"),
    ],
    ids=str,
)
def test_bad_options_are_named(weights, options, words):
    with pytest.raises(ValueError, match=words):
        EvolutionStrategy(weights(F32), **options)


def test_numbers_of_numpy_are_numbers(bits, weights):
    plain = EvolutionStrategy(weights(F32), sigma=0.5, lr=0, population=4, seed=2**63)
    opt = EvolutionStrategy(
        weights(F32), sigma=np.float32(0.5), lr=np.int64(0), population=np.int64(4), seed=np.uint64(2**63)
    )
    json.dumps([opt.population, opt.seed, opt.param_groups[0]["sigma"], opt.param_groups[0]["lr"]])  # as a log must
    for each in (plain, opt):
        each.perturb(3)
    assert_same(bits, tensors(plain, "live"), tensors(opt, "live"))


@pytest.mark.parametrize("master", ["fp32", None])
@pytest.mark.parametrize(
    "options", [{"sigma": 1e39}, {"sigma": math.nan}, {"lr": 1e40}, {"lr": math.nan}, {"weight_decay": 1e45}], ids=str
)
def test_a_group_that_was_given_an_impossible_number_is_refused_with_nothing_changed(bits, weights, master, options):
    """In the second group, when the first could have been changed already."""
    first, second = weights(F32)[:2], weights(F32)[2:]
    opt = EvolutionStrategy([{"params": first}, {"params": second}], sigma=0.05, population=4, master=master)
    before = tensors(opt, "live")
    opt.param_groups[1].update(options)
    with pytest.raises(ValueError, match="float32"):
        opt.step(iter([1.0, 2.0, 3.0, 4.0]).__next__)
    if master is None and "sigma" not in options:  # the members' own rounding is left
        return
    assert_same(bits, before, tensors(opt, "live"))
    assert opt.generation == 0


@pytest.mark.parametrize("shaping", ["zscore", "ranks", "per_prompt"])
def test_rewards_whose_mean_could_overflow_are_refused(bits, weights, shaping):
    opt = EvolutionStrategy(weights(F32), population=4, shaping=shaping)
    before = tensors(opt)
    for huge in (1e308, -1e308, np.longdouble("1e4000")):
        fitness = [huge, 1e308, 1.0, 2.0]
        with pytest.raises(
            ValueError, match=r"the reward of member 0 is .*; its size must be at most 1e\+100|must be declared dropped"
        ):
            opt.tell([[reward] for reward in fitness] if shaping == "per_prompt" else fitness)
    assert_same(bits, before, tensors(opt))
    fitness = [1e100, -1e100, 1e100, -1e100]
    assert opt.tell([[reward] for reward in fitness] if shaping == "per_prompt" else fitness).z == (
        1.0,
        -1.0,
        1.0,
        -1.0,
    )


def test_bad_parameters_are_named(weights):
    named = weights(F32)
    for params, words in (
        ([p for _, p in named], "named_parameters"),
        ([("twice", named[0][1]), ("twice", named[1][1])], "'twice'"),
        ([("frozen", torch.nn.Parameter(torch.zeros(2), requires_grad=False))], "frozen"),
        ([{"params": named}, {"params": named}], "already in another group"),
        ([("fused", named[2][1], ["experts.0.up"])], "es_kernels.Segment"),
        ([("fused", torch.nn.Parameter(torch.zeros(2, 32)), [FUSED[0], FUSED[0]])], "'fused' and 'fused'"),
        (
            [("fused", torch.nn.Parameter(torch.zeros(2, 32)), FUSED), ("experts.1.up", named[0][1])],
            "'fused' and 'experts.1.up'",
        ),
        (
            [
                {"params": [("fused", torch.nn.Parameter(torch.zeros(2, 32)), FUSED)]},
                {"params": [("experts.1.up", named[0][1])]},
            ],
            "'experts.1.up'",
        ),
        (
            [
                {"params": [("experts.1.up", named[0][1])]},
                {"params": [("fused", torch.nn.Parameter(torch.zeros(2, 32)), FUSED)]},
            ],
            "'experts.1.up'",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            EvolutionStrategy(params)


def test_importing_es_finetune_does_not_import_transformers():
    code = "import sys, es_finetune; sys.exit(any(name.split('.')[0] == 'transformers' for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)
