"""Contract under test: es_finetune.optim.shaping.

- Z in f64, cast to f32 once; mean 0 and standard deviation 1 over the scored members, 0 for a dropped one; None where
  the rewards hold no signal, whatever rounding leaves of it.
- Ranks see only the order, ties share their mean rank; per_prompt counts every prompt that tells members apart the
  same.
"""

import math

import numpy as np
import pytest

from es_finetune.optim.shaping import SHAPINGS, centred_ranks, per_prompt, z_scores


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).tolist()


def standardized(values):
    return (np.array(values) - np.mean(values)) / np.std(values)


@pytest.mark.parametrize("shaping", SHAPINGS)
def test_z_are_f32_of_mean_zero_and_std_one_over_the_scored(shaping):
    for seed in range(20):
        rewards = normal(seed, 30, 5) if shaping == "per_prompt" else normal(seed, 30)
        rewards[7] = rewards[20] = None
        z = SHAPINGS[shaping](rewards)
        assert (
            len(z) == 30
            and z[7] == z[20] == 0
            and all(type(value) is float and value == float(np.float32(value)) for value in z)
        )
        rest = [value for member, value in enumerate(z) if member not in (7, 20)]
        assert abs(np.mean(rest)) < 1e-7 and abs(np.std(rest) - 1) < 1e-7


def test_z_scores():
    values = normal(1, 30)
    np.testing.assert_allclose(z_scores(values), standardized(values), rtol=1e-6)
    assert z_scores([1.0, None, 3.0]) == (-1.0, 0.0, 1.0)


def test_no_signal_is_equal_rewards_and_not_a_small_spread():
    assert z_scores([0.015] * 30) is None and np.std([0.015] * 30) > 0
    assert z_scores([2.0, None, 2.0]) is None and z_scores([5.0]) is None
    assert z_scores([1.0, 1.0 + 2**-52]) is not None
    for scale in (1e-320, 1e-170, 1e170, 1e300):  # squares of these vanish or overflow
        np.testing.assert_allclose(z_scores([0.0, scale, 2 * scale]), (-(1.5**0.5), 0, 1.5**0.5), rtol=1e-6, atol=1e-7)


def test_ranks_see_only_the_order():
    expected = z_scores([0, 1, 2, 3, 4])
    assert centred_ranks([-7.0, -6.99, 0.0, 1.0, 1e300]) == expected
    assert centred_ranks([1e300, 1.0, 0.0, -6.99, -7.0]) == expected[::-1]
    values = normal(2, 31)
    ranks = np.argsort(np.argsort(values))
    plain = ranks / 30 - 0.5  # Salimans et al.
    np.testing.assert_allclose(centred_ranks(values), plain / plain.std(), rtol=1e-6, atol=1e-7)


def test_ties_share_their_mean_rank():
    assert centred_ranks([2.0, 1.0, 2.0, None, 3.0, 2.0, -0.0, 0.0]) == z_scores([4, 2, 4, None, 6, 4, 0.5, 0.5])
    assert centred_ranks([1.0, 0.0, 0.0, 0.0]) == z_scores([1, 0, 0, 0])
    assert centred_ranks([4.0, None, 4.0]) is None
    assert centred_ranks([1.0] * 5000 + [2.0] * 5000) == (-1.0,) * 5000 + (1.0,) * 5000


def test_per_prompt_is_the_mean_of_the_z_scores_of_each_prompt():
    rewards = np.array(normal(3, 8, 4)) * [1.0, 100.0, 1e-6, 1.0] + [0.0, 1e3, 0.0, 7.0]
    mean = np.mean([standardized(rewards[:, prompt]) for prompt in range(4)], axis=0)
    np.testing.assert_allclose(per_prompt(rewards.tolist()), standardized(mean), rtol=1e-5)


def test_a_prompt_counts_the_same_however_large_its_rewards():
    rewards = np.array(normal(4, 8, 3))
    np.testing.assert_allclose(
        per_prompt((rewards * [1, 1000, 1] + [0, 0, 5]).tolist()), per_prompt(rewards.tolist()), rtol=1e-5
    )


def test_prompts_without_signal_contribute_nothing():
    rewards = normal(5, 8, 3)
    padded = [[0.015, *row, 1.0] for row in rewards]
    assert per_prompt(padded) == per_prompt(rewards)
    assert per_prompt([[1.0, 2.0]] * 4) is None
    assert per_prompt([row[:1] for row in rewards]) == z_scores([row[0] for row in rewards])


def test_the_rounding_left_by_prompts_that_cancel_is_no_signal():
    """Otherwise it would become a step of full size."""
    left_over = 0
    for seed in range(50):
        values = normal(seed, 6)
        rows = [[value, -7 * value + 0.1] for value in values]
        left_over += (
            len({math.fsum(pair) for pair in zip(*map(standardized, zip(*rows, strict=True)), strict=True)}) > 1
        )
        assert per_prompt(rows) is None
    assert left_over > 10
    assert per_prompt([[0.0, 1.0], [1.0, 0.0]]) is None


def test_dropped_members_are_in_no_statistic():
    rewards = normal(6, 6, 3)
    z = per_prompt([rewards[0], None, *rewards[1:4], None, *rewards[4:]])
    assert (*z[:1], *z[2:5], *z[6:]) == per_prompt(rewards) and z[1] == z[5] == 0


def test_unequal_numbers_of_prompts_are_refused():
    with pytest.raises(ValueError, match="member 0 has 2 rewards and member 2 has 3"):
        per_prompt([[1.0, 2.0], None, [1.0, 2.0, 3.0]])
