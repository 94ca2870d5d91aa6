"""Contract under test: numbers about numbers.

An interval is Wilson's for right and wrong. The KL estimate is that of the k3 formula and converges to the true
divergence, within its standard error. Saved answers can be read back line by line.
"""

import math
import random
import statistics

import pytest
import torch

from es_finetune.engines import Answer
from es_finetune.evaluation.statistics import KL, interval, kl_to_base


@pytest.mark.parametrize(
    "right, n, low, high",
    [
        (15, 50, 0.1910, 0.4375),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (1, 1, 0.2065, 1.0),
        (1740, 2000, 0.8545, 0.8841),
    ],
)
def test_wilson_interval(right, n, low, high):
    """The roots of |p - right / n| = z sqrt(p (1 - p) / n), and published or easily computed values of them."""
    ends = interval([1] * right + [0] * (n - right))
    assert ends == pytest.approx((low, high), abs=1e-4)
    for p in ends:
        if 0 < p < 1:
            assert abs(p - right / n) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n), rel=1e-6)


def test_interval_of_a_mean():
    values = [0.3, 1.7, -2.0, 0.4, 5.0]
    half = 1.959964 * statistics.stdev(values) / math.sqrt(5)
    assert interval(values) == pytest.approx((statistics.mean(values) - half, statistics.mean(values) + half))
    assert interval([3.0]) == (None, None)
    with pytest.raises(ValueError, match="at least one value"):
        interval([])


def test_intervals_hold_the_truth_95_times_in_100():
    draw = random.Random(0)
    within = 0
    for _ in range(2000):
        low, high = interval([float(draw.random() < 0.3) for _ in range(60)])
        within += low <= 0.3 <= high
    assert 0.93 < within / 2000 < 0.97


def test_kl_is_the_mean_over_all_tokens():
    answers = [Answer("", (1, 2, 3)), Answer("", ()), Answer("", (4,))]
    tuned = [torch.tensor([-1.0, -2.0, -0.5]), torch.empty(0), torch.tensor([-3.0])]
    base = [torch.tensor([-1.0, -1.0, -4.5]), torch.empty(0), torch.tensor([-2.5])]
    terms = [math.exp(d) - d - 1 for d in (0.0, 1.0, -4.0, 0.5)]
    kl = kl_to_base(answers, tuned, base)
    assert kl.value == pytest.approx(sum(terms) / 4, rel=1e-6) and kl.tokens == 4
    assert kl_to_base(answers, tuned, tuned) == KL(0.0, 0.0, 4)
    tiny = kl_to_base(answers[2:], [torch.tensor([-3.0])], [torch.tensor([-3.0 + 2**-22])])
    assert tiny.value == pytest.approx(2**-45, rel=1e-3)  # not lost to cancellation
    assert tiny.standard_error is None


def test_kl_converges_to_the_divergence_within_its_standard_error():
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(torch.randn(50, generator=generator), 0)  # tuned
    q = torch.softmax(p.log() + 0.5 * torch.randn(50, generator=generator), 0)  # base
    truth = (p * (p / q).log()).sum().item()
    values, errors = [], []
    for _ in range(200):
        answers = [
            Answer("", tuple(torch.multinomial(p, length, True, generator=generator).tolist()))
            for length in range(1, 40)
        ]
        picked = [torch.tensor(answer.ids) for answer in answers]
        kl = kl_to_base(answers, [p.log()[ids] for ids in picked], [q.log()[ids] for ids in picked])
        values.append(kl.value)
        errors.append(kl.standard_error)
    assert statistics.mean(values) == pytest.approx(truth, abs=3 * statistics.stdev(values) / math.sqrt(200))
    assert statistics.mean(errors) == pytest.approx(statistics.stdev(values), rel=0.15)


def test_the_standard_error_of_kl_knows_that_tokens_of_an_answer_depend_on_each_other():
    tuned = [torch.full((10,), -1.0), torch.full((10,), -2.0), torch.full((10,), -1.0), torch.full((10,), -2.0)]
    base = [torch.full((10,), -1.5)] * 4
    answers = [Answer("", tuple(range(10)))] * 4
    per_answer = [math.exp(d) - d - 1 for d in (-0.5, 0.5, -0.5, 0.5)]
    assert kl_to_base(answers, tuned, base).standard_error == pytest.approx(statistics.stdev(per_answer) / 2)


def test_kl_of_other_answers_is_refused():
    with pytest.raises(ValueError, match="answer 0 has 2 tokens but 2 and 3 log probabilities"):
        kl_to_base([Answer("", (1, 2))], [torch.zeros(2)], [torch.zeros(3)])
    with pytest.raises(ValueError, match="at least one token"):
        kl_to_base([Answer("", ())], [torch.empty(0)], [torch.empty(0)])
