"""Contract under test: `calibrate` recommends a sigma.

It finds the sigma where noise begins to cost, whatever the scale and sign of the rewards, and says so where there is
none; it stops once the reward is gone; it measures what it says it measures; the model is as before; bad input is
refused before a model is loaded.
"""

import contextlib
import io
import json
import math
from statistics import mean, stdev

import pytest
import torch

import es_finetune.commands.calibrate as calibrate_module
from es_finetune.cli import main
from es_finetune.commands.calibrate import _cells, _line, calibrate, measure_sigma, recommend, refuse_too_few
from es_finetune.config import CalibrateConfig
from es_finetune.engines import Answer
from es_finetune.errors import UserError
from es_finetune.evaluation.evaluator import Evaluator
from es_finetune.monitor.health import Health
from es_finetune.optim.evolution_strategy import EvolutionStrategy
from es_finetune.tasks import Item, Score

QUICK = {"members": 4, "prompts": 16}


def rows(*lost, base=1.0, spread=0.05, sigma=0.001, error=0.001):
    """As measure_sigma's, sigma doubling; spread: of all, or of each."""
    spreads = [spread] * len(lost) if isinstance(spread, float) else spread
    return [
        {
            "sigma": sigma * 2**i,
            "reward": base - x,
            "lost": x,
            "lost_error": error,
            "spread": s,
            "correlation": ["w", 1.0],
            "swallowed": 0,
        }
        for i, (x, s) in enumerate(zip(lost, spreads, strict=True))
    ]


def test_the_largest_sigma_that_costs_a_tenth():
    assert recommend(1.0, rows(0.0, 0.01, 0.1, 0.4))[0] == 0.004
    # between 0.002, which costs 0.05, and 0.004, which costs 0.2: where a loss that grows as a power of sigma is 0.1
    assert recommend(1.0, rows(0.0, 0.05, 0.2, 0.8))[0] == float(f"{0.002 * math.sqrt(2):.2g}")
    assert recommend(1.0, rows(-0.1, -0.2, 0.3))[0] == float(f"{0.002 * math.sqrt(2):.2g}")  # noise may help


@pytest.mark.parametrize("scale", [1000.0, 0.001, -1000.0])
def test_scale_and_sign_of_the_rewards_do_not_matter(scale):
    lost, size = (0.01, 0.03, 0.08, 0.3, 0.9), abs(scale)
    expected = recommend(1.0, rows(*lost))
    recommended = recommend(scale, rows(*(size * x for x in lost), spread=0.05 * size, error=0.001 * size))
    assert recommended == expected and "costs 30%" in recommended[1]


def test_a_loss_within_its_error_is_none():
    # Twice what they may lose, if it were certain
    assert recommend(0.1, rows(0.0, 0.02, 0.02, 0.09, error=0.015, base=0.1))[0] == 0.004


def test_one_sigma_that_does_harm_is_chance_two_in_a_row_are_a_limit():
    assert recommend(1.0, rows(0.0, 0.4, 0.0, 0.0)) == recommend(1.0, rows(0.0, 0.0, 0.0, 0.0))
    assert recommend(1.0, rows(0.3, 0.0, 0.05, 0.2, 0.8))[0] == recommend(1.0, rows(0.0, 0.0, 0.05, 0.2, 0.8))[0]
    # Of the last one nothing says otherwise
    assert recommend(1.0, rows(0.0, 0.05, 0.2, 0.4))[0] == recommend(1.0, rows(0.0, 0.05, 0.2))[0]


def test_a_base_model_without_reward():
    """Nothing can be lost; the sigma that finds most is taken, not the one beyond which all is broken."""
    sigma, reason = recommend(0.0, rows(0.0, -0.01, -0.02, -0.001, 0.0, spread=[0.0, 0.01, 0.02, 0.002, 0.0]))
    assert sigma == 0.004 and "beyond they all fail" in reason


@pytest.mark.parametrize(
    "base, measured, words",
    [
        (0.0, rows(0.0, 0.0, spread=0.0), "never gets a reward"),
        (0.3, rows(0.0, 0.0, spread=0.0), "gets 0.3 whatever the noise"),
        (1.0, rows(0.3, 0.9), "even sigma 0.001 costs 0.3"),
        (1.0, rows(0.0, 0.0, 0.9, spread=[0.0, 0.0, 0.1]), "up to 0.002 all members score the same, and 0.004 harms"),
    ],
)
def test_where_no_sigma_serves_it_says_so(base, measured, words):
    sigma, reason = recommend(base, measured)
    assert sigma is None and words in reason and "\n" not in reason


def test_caveats():
    sigma, reason = recommend(1.0, rows(0.0, 0.01, 0.02))
    assert sigma == 0.004 and "a larger one may learn faster" in reason
    measured = rows(0.0, 0.1, 0.4)
    measured[1] |= {"swallowed": 3, "correlation": ["norm.weight", 0.36]}
    assert (
        "In 3 tensor(s) the dtype swallows part of the noise (norm.weight: correlation 0.36)"
        in recommend(1.0, measured)[1]
    )


@pytest.fixture(scope="module")
def embedded():
    """What it returns in Python; it prints nothing."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        result = calibrate(sigmas=[0.3, 0.001, 0.01, 0.4, 0.5], **QUICK)
    assert not out.getvalue()
    return result


def test_a_result(embedded):
    assert json.loads(json.dumps(embedded)) == embedded
    tried = embedded["sigmas"]
    # Smallest first, and none after a collapse that is confirmed
    assert [row["sigma"] for row in tried] == [0.001, 0.01, 0.3, 0.4]
    assert 0 < embedded["base_reward"] < 1
    for row in tried:
        assert row["reward"] + row["lost"] == pytest.approx(embedded["base_reward"])
        assert row["correlation"][1] > 0.999 and row["swallowed"] == 0 and row["seconds"] > 0
    assert tried[0]["identical"] >= 0.5 > tried[1]["identical"]
    assert tried[2]["reward"] < 0.1 * embedded["base_reward"]
    assert 0.001 < embedded["sigma"] < 0.3 and embedded["lr"] == embedded["sigma"] / 2


def test_what_is_printed(capsys):
    assert main(["calibrate", "--sigmas", "0.01", "--members", "4", "--prompts", "16"]) == 0
    first, *legend, head, base, tried, result = capsys.readouterr().out.splitlines()
    assert first == "countdown-char, embedded: 4 members, 16 prompts"
    assert head.split() == ["sigma", *(line.partition(":")[0] for line in legend), "seconds"]
    assert (base.split()[0], tried.split()[0]) == ("0", "0.01")
    assert max(map(len, (*legend, head, base, tried))) < 80
    assert result.startswith("sigma 0.01, lr 0.005: the largest one tried")
    widest = {
        "sigma": 0.000123,
        "reward": -12345.6,
        "lost": -12345.6,
        "lost_error": 1234.5,
        "spread": 0.000012345,
        "signal": 0.000012345,
        "identical": 1.0,
    }
    line = _line(_cells({**widest, "correlation": ["w", 0.5], "swallowed": 123, "norms": 0, "seconds": 12345.6}))
    assert len(line) <= 80 and len(line.split()) == 12  # no column runs into another


def test_one_seed_one_result(embedded):
    again, other = (calibrate(sigmas=[0.01], seed=seed, **QUICK) for seed in (0, 1))
    without_time = [{**row, "seconds": 0} for row in (again["sigmas"][0], embedded["sigmas"][1])]
    assert without_time[0] == without_time[1] and again["base_reward"] == embedded["base_reward"]
    assert other["base_reward"] != again["base_reward"]


def test_the_rank_is_that_of_the_members_noise():
    full, low = (calibrate(sigmas=[0.02], noise_rank=rank, **QUICK) for rank in (0, 1))
    assert full["base_reward"] == low["base_reward"]
    assert full["sigmas"][0]["spread"] != low["sigmas"][0]["spread"]


def test_bf16_that_swallows_the_noise():
    (row,) = calibrate(sigmas=[1e-4], dtype="bfloat16", **QUICK)["sigmas"]
    assert (
        row["correlation"][1] < 0.9
        and "norm" not in row["correlation"][0]
        and row["swallowed"] > 5
        and row["norms"] == 5
    )
    # As in the paper's run: norms alone
    (row,) = calibrate(sigmas=[1e-3], dtype="bfloat16", **QUICK)["sigmas"]
    assert row["swallowed"] == 0 < row["norms"] and "norm" in row["correlation"][0]


class Thermometer:
    """An engine whose answer is the weight, and a task that pays it and fails on more than 2.5."""

    floor = -7.0

    def __init__(self, weight):
        self.weight = weight

    def encode(self, prompts):
        return prompts

    def generate(self, encoded, sampling=None):
        return [Answer(str(self.weight.item()), ()) for _ in encoded]

    def score(self, item, completion):
        return Score(None, error="hot") if float(completion) > 2.5 else Score(float(completion))


def test_what_is_measured():
    scalar, large = torch.nn.Parameter(torch.tensor(0.5)), torch.nn.Parameter(torch.zeros(100))
    optimizer = EvolutionStrategy([("scalar", scalar), ("large", large)], population=6, antithetic=True, master="copy")
    before = (optimizer.fingerprint("theta"), optimizer.fingerprint("live"))
    machine = Thermometer(scalar)
    evaluator, health = Evaluator(machine, machine, [Item("", 0), Item("", 1)]), Health(optimizer)
    row = measure_sigma(3.0, [0.5, 0.5], optimizer, evaluator, health)
    assert (optimizer.fingerprint("theta"), optimizer.fingerprint("live")) == before
    rewards = []
    for member in optimizer.ask():
        with optimizer.perturbed(member):
            rewards.append(machine.floor if scalar.item() > 2.5 else scalar.item())
    assert machine.floor in rewards and len(set(rewards)) > 3
    odd = [(a - b) / 2 for a, b in zip(rewards[::2], rewards[1::2], strict=True)]
    even = [(a + b) / 2 - 0.5 for a, b in zip(rewards[::2], rewards[1::2], strict=True)]
    expected = {
        "sigma": 3.0,
        "reward": mean(rewards),
        "lost": 0.5 - mean(rewards),
        "lost_error": max(stdev(even) / math.sqrt(3), (max(rewards) - min(rewards)) / 2),  # one of two answers
        "spread": stdev(rewards),
        "spread_error": stdev(rewards) / math.sqrt(10),
        "signal": math.sqrt(mean(x * x for x in odd)),
        "damage": math.sqrt(mean(x * x for x in even)),
        "identical": 0.0,
        "swallowed": 0,
        "norms": 0,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert row["correlation"] == ["large", pytest.approx(1)]


class Lottery:
    """29 questions, of which the model without noise gets `right`; any noise loses the first of them, a large one half
    of the rest too."""

    floor = 0.0

    def __init__(self, weight, right, worth=1.0):
        self.weight, self.right, self.worth = weight, right, worth

    def encode(self, prompts):
        return prompts

    def generate(self, encoded, sampling=None):
        moved = abs(self.weight.item() - 0.5)
        gets = range(bool(moved), self.right // 2 if moved > 0.1 else self.right)
        return [Answer(str(float(n in gets)), ()) for n in range(29)]

    def score(self, item, completion):
        return Score(self.worth * float(completion))


@pytest.mark.parametrize("worth", [1.0, 1000.0])
def test_one_answer_that_all_members_lose_is_no_certainty(worth):
    """Alike in all members, so that their spread says nothing; of 6 right answers it is more than a tenth of the
    reward."""
    weight = torch.nn.Parameter(torch.tensor(0.5))
    optimizer = EvolutionStrategy([("weight", weight)], population=4, antithetic=True, master="copy")
    lottery = Lottery(weight, right=6, worth=worth)
    evaluator, health = Evaluator(lottery, lottery, [Item("", n) for n in range(29)]), Health(optimizer)
    base = [worth * (n < 6) for n in range(29)]
    measured = [measure_sigma(sigma, base, optimizer, evaluator, health) for sigma in (0.001, 0.002, 10.0, 20.0)]
    assert [row["lost"] for row in measured[:2]] == [pytest.approx(worth / 29)] * 2
    assert [row["lost_error"] for row in measured[:2]] == [pytest.approx(worth / 29)] * 2 and measured[0]["spread"] == 0
    measured[0]["spread"] = measured[1]["spread"] = 0.01 * worth  # that members differ is no matter here
    assert recommend(sum(base) / 29, measured)[0] == 0.002


@pytest.mark.parametrize(
    "rewards, words",
    [
        ([0.0] * 28 + [1.0], "succeeds at 1 of 29 prompts"),
        ([0.0] * 60 + [1.0] * 4, "succeeds at 4 of 64 prompts"),
        ([-1.0] * 25 + [0.0] * 4, "succeeds at 4 of 29 prompts"),
        ([0.0] * 20, "succeeds at 0 of 20 prompts"),
        ([0.0] * 40 + [0.1] * 20 + [1.0] * 2, "earns on 62 prompts as much as 4.0 of its best answers"),  # a part pays
        ([-300.0] * 60 + [0.0, -150.0], "earns on 62 prompts as much as 1.5 of its best answers"),
    ],
)
def test_a_base_model_that_earns_too_little_is_refused(rewards, words):
    with pytest.raises(
        ValueError,
        match=f"the base model {words}.* which takes 5: "
        "use more or easier prompts, or a reward that also pays for a part$",
    ):
        refuse_too_few(rewards)
    refuse_too_few([*rewards, *[max(rewards) or 1.0] * 5])


def test_graded_rewards_count_by_what_they_hold():
    refuse_too_few([-100.0 - 10 * n for n in range(16)])
    refuse_too_few([0.0] * 4 + [0.1] * 50 + [1.0])  # the format alone, of many
    refuse_too_few([1.0] * 8)


def test_graded_rewards_of_fewer_prompts_than_that_are_taken():
    """The task conciseness has two prompts, and rewards below 0."""
    refuse_too_few([-3.0, -10.0])
    refuse_too_few([-3.0, -3.0])
    with pytest.raises(ValueError, match="succeeds at 2 of 3 prompts"):
        refuse_too_few([1.0, 1.0, 0.0])


def test_it_is_refused_before_a_sigma_is_tried(capsys, monkeypatch):
    monkeypatch.setattr(
        "es_finetune.tasks.countdown_char.CountdownChar.score", lambda self, item, completion: Score(0.0, 0.0)
    )
    assert main(["calibrate", "--prompts", "8"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: the base model succeeds at 0 of 8 prompts")
    assert "sigma" not in captured.out


@pytest.mark.parametrize(
    "options, words",
    [
        ({"sigmas": [0.0]}, "each of sigmas must be a positive number, not 0.0"),
        ({"sigmas": [0.1, math.nan]}, "not nan"),
        ({"members": 3}, "members must be at least 4"),
        ({"members": 5}, "must be even, not 5"),
        ({"prompts": -1}, "prompts must be at least 0"),
        ({"task": "countdown"}, "needs a model"),
        ({"model": "somewhere"}, "no task was given"),
        ({"dtype": "int8"}, "dtype must be"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        CalibrateConfig(**options)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"prompts": 10**6}, "prompts must be at most"),
        ({"task": "no-such-task", "model": "embedded"}, "unknown task 'no-such-task'"),
    ],
)
def test_refused_before_a_model_is_loaded(options, words, monkeypatch):
    monkeypatch.setattr(calibrate_module, "load_model", None)
    with pytest.raises(ValueError, match=words):
        calibrate(**options)


def test_defaults():
    config = CalibrateConfig()
    assert (config.task, config.model, config.members, config.batch_size) == ("countdown-char", "embedded", 8, 128)
    assert config.sigmas[0] == 1e-4 and 0.025 < config.sigmas[-1] < 0.03 and config.sigmas == sorted(config.sigmas)
    assert CalibrateConfig(sigmas=[0.2, 0.1, 0.2]).sigmas == [0.1, 0.2]


def test_command_line(capsys):
    assert main(["calibrate", "--sigmas", "0.01", "0.001", "--members", "4", "--prompts", "16"]) == 0
    assert "sigma 0.01" in capsys.readouterr().out
    for flags in (
        ["--sigmas", "-1"],
        ["--sigmas", "much"],
        ["--members", "7"],
        ["--model", "/no/such/folder", "--task", "countdown"],
    ):
        assert main(["calibrate", *flags]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and len(captured.err.splitlines()) == 1 and not captured.out


def test_a_reward_that_always_fails_is_named(tmp_path):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": f"^{n}:"}) + "\n" for n in range(20)))
    (tmp_path / "r.py").write_text("def reward(completion, item):\n    return 1 / 0\n")
    own = {"data": tmp_path / "data.jsonl", "reward": f"{tmp_path}/r.py:reward", "model": "embedded"}
    with pytest.raises(UserError, match="no answer could be scored; .*ZeroDivisionError"):
        calibrate(**own, max_new_tokens=4, members=4)


def test_a_task_whose_answers_are_read_is_measured_by_log_probabilities():
    data = [{"prompt": f"^{a},{b}:", "answer": f"{a}+{b}"} for a in range(9) for b in range(3)]
    options = {"task": "custom", "model": "embedded", "members": 4, "max_new_tokens": 6, "sigmas": [1e-3, 0.01, 0.1]}
    result = calibrate(**options, data=data, reward="logprob")
    mean = calibrate(**{**options, "sigmas": [1e-3]}, data=data, reward="logprob", logprob_per_token=True)
    assert result["base_reward"] == pytest.approx(4 * mean["base_reward"])  # three tokens and the end
    assert all(row["identical"] == 0 < row["spread"] for row in result["sigmas"]) and result["sigma"] is not None
