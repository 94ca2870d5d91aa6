"""Contract under test: a run and its folder.

A run leaves what README promises, and a model that transformers loads, whose weights have the fingerprint of the log;
one seed gives one fingerprint. Every option changes what it should. Any model of transformers with noise-capable
weights is tuned: tied embeddings, fused experts, adapters. A reward that raises or hangs costs its answer, not the run.
Sampled answers have the same random numbers for all members, in one batch and one by one. Trained on log-probabilities,
a model gives held-out answers larger ones.
"""

import json
import pathlib
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import es_kernels
from es_finetune import TrainConfig, Trainer, evaluate
from es_finetune.config import recorded_options
from es_finetune.errors import RewardFailed, UserError
from es_finetune.models.load import EMBEDDED_MODEL
from es_finetune.monitor.rows import EvalRow, GenerationRow, Health, MemberLine, Summary
from es_finetune.runs.files import read_rows
from es_finetune.runs.log import read_journals, read_log
from es_finetune.tasks import Item, Score, load_task
from es_finetune.trainer import follow

SMALL = {"generations": 2, "population": 4, "prompts": 16, "eval_items": 32, "report_to": ["none"]}


def train(output, task=None, **options):
    options |= {} if task is None else {"task": task.name}
    trainer = Trainer(TrainConfig(output=str(output), **{**SMALL, **options}), task=task)
    trainer.train()
    return trainer


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


class Letters:
    """Any model's answers have some of the letters that the embedded tokenizer knows: a reward that even random weights
    can move."""

    name, metric, floor, max_new_tokens, eval_samples, notes = "letters", "reward", None, 4, 1, ()
    train = [Item(f"^{a},{b}:", (a, b)) for a in range(1, 5) for b in range(5, 9)]
    test = [Item(f"^{a}:", (a,)) for a in range(1, 9)]

    def score(self, item, completion):
        return Score(sum(map(ord, completion)) / 100)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "demo"
    train(folder, report_to=["tensorboard"])
    return folder


def test_a_run_leaves_what_it_promises(run):
    names = "answers config.json evals.jsonl journal metrics.jsonl model reward.png run.log summary.json tensorboard"
    assert sorted(path.name for path in run.iterdir()) == names.split()
    result = summary(run)
    assert (
        result["generations"] == 2
        and result["noise_version"] == es_kernels.noise.VERSION
        and result["metric"] == "exact"
    )
    assert result["backend"] == es_kernels.active_backend(torch.device("cpu"))
    assert 0 < result["seconds_kernels"] < result["seconds_total"] and 0 < result["share_outside"] < 1
    low, high = result["base_interval"]
    assert 0 < low < result["base"] < high < 1
    assert result["log_bytes"] == (run / "run.log").stat().st_size
    assert (run / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert len(read_rows(run / "answers" / "base.jsonl")) == len(read_rows(run / "answers" / "tuned.jsonl")) == 32
    assert [row["generation"] for row in read_rows(run / "evals.jsonl")] == [0, 2]


def test_rows_and_log_say_the_same(run):
    rows = read_rows(run / "metrics.jsonl")
    header, generations = read_log(run / "run.log")
    assert [row["generation"] for row in rows] == [g.update.generation for g in generations] == [0, 1]
    assert header["model"]["model"] == "embedded" and header["config"]["population"] == 4
    assert set(header["versions"]) == {"python", "torch", "transformers", "es_kernels"}
    assert set(header["machine"]) == {"processor", "gpu", "driver"}
    for row, logged in zip(rows, generations, strict=True):
        assert row["reward_min"] <= row["reward_mean"] == logged.update.reward <= row["reward_max"]
        assert row["reward_low"] < row["reward_mean"] < row["reward_high"]  # over the prompts
        assert row["theta"] == row["live"] == f"{logged.theta:016x}"  # f32 weights, so both are the same numbers
        assert (logged.lr, logged.sigma) == ((row["lr"],), (row["sigma"],))
        assert row["peak_memory_bytes"] > 1e6 and row["failed"] == 0
        assert (
            4 * 16 * 2 <= row["tokens"] <= 4 * 16 * 12
            and row["tokens_per_second"] == row["tokens"] / row["seconds_generate"]
        )
        assert row["seconds"] >= row["seconds_generate"] + row["seconds_score"]
    assert rows[-1]["theta"] == summary(run)["fingerprint"]
    assert rows[0]["health"]["correlation_min"][1] > 0.999 and rows[0]["health"]["drift"] > 0


def test_rows_have_exactly_the_fields_that_are_documented(run):
    for row in read_rows(run / "metrics.jsonl"):
        assert GenerationRow.__required_keys__ <= row.keys() <= GenerationRow.__annotations__.keys()
    first, last = (read_rows(run / "metrics.jsonl")[place] for place in (0, -1))
    assert first["health"].keys() == last["health"].keys() == Health.__annotations__.keys()
    for row in read_rows(run / "evals.jsonl"):
        assert row.keys() == EvalRow.__annotations__.keys()
    assert summary(run).keys() == Summary.__annotations__.keys()
    for line in read_journals(run):
        assert line.keys() == MemberLine.__annotations__.keys() | {"crc"}


def test_the_model_loads_and_is_theta(run):
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert f"{es_kernels.fingerprint(dict(model.named_parameters())):016x}" == summary(run)["fingerprint"]
    assert tokenizer.padding_side == "left" and tokenizer("^3,4,7=14:")["input_ids"]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_one_seed_one_fingerprint(run, tmp_path):
    train(tmp_path / "again")
    assert summary(tmp_path / "again")["fingerprint"] == summary(run)["fingerprint"]
    train(tmp_path / "other", seed=1)
    assert summary(tmp_path / "other")["fingerprint"] != summary(run)["fingerprint"]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral", "qwen3_moe", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_model_is_tuned_and_exported(save_tiny, tmp_path, kind, dtype):
    """The checkpoint's own tensors, read without transformers, have the fingerprint of the log."""
    model = save_tiny(tmp_path / "base", "llama" if kind == "lora" else kind)
    options = {"lora_rank": 2} if kind == "lora" else {}
    trainer = train(
        tmp_path / "run", Letters(), model=model, dtype=dtype, sigma=0.05, lr=0.05, prompts=0, batch_size=16, **options
    )
    _, generations = read_log(tmp_path / "run" / "run.log")
    assert generations[-1].update.z is not None
    (weights,) = (tmp_path / "run" / "model").glob("*.safetensors")
    tensors = load_file(weights)
    assert (
        es_kernels.fingerprint(tensors) == generations[-1].live == trainer.workers.weights.optimizer.fingerprint("live")
    )
    assert {t.dtype for t in tensors.values()} == {torch.float32 if kind == "lora" else getattr(torch, dtype)}
    if kind == "lora":
        base = {name: p for name, p in trainer.model.named_parameters() if not p.requires_grad}
        fresh = dict(
            Trainer(
                TrainConfig(output=str(tmp_path / "fresh"), model=model, task="letters", dtype=dtype, lora_rank=2),
                task=Letters(),
            ).model.named_parameters()
        )
        assert base and all(torch.equal(p, fresh[name]) for name, p in base.items())


@pytest.mark.parametrize("master", ["fp32", "copy", "host", "none"])
def test_a_bf16_model_stays_bf16(tmp_path, master):
    train(tmp_path / "run", dtype="bfloat16", master=master)
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype="auto")
    assert tuned.dtype == torch.bfloat16
    last = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
    assert f"{es_kernels.fingerprint(dict(tuned.named_parameters())):016x}" == last["live"]
    assert (last["live"] == last["theta"]) == (master in ("copy", "none"))


def test_master_host_has_the_bits_of_fp32(tmp_path):
    fingerprints = {
        master: summary_of(tmp_path / master, dtype="bfloat16", master=master)["fingerprint"]
        for master in ("fp32", "host")
    }
    assert fingerprints["fp32"] == fingerprints["host"]


def summary_of(folder, **options):
    train(folder, **options)
    return summary(folder)


TEMPLATE = "{% for m in messages %}^{{ m['content'] }}{% endfor %}:"


@pytest.mark.parametrize("task", ["countdown", "conciseness", "short-answers", "math", "reasoning-gym:mini_sudoku"])
def test_every_task_runs_on_a_chat_model(save_tiny, tmp_path, task):
    """From prompts to answers, scores, an update and an evaluation with samples: nothing to learn for a model of random
    weights."""
    model = save_tiny(tmp_path / "model", max_position_embeddings=4096)
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    (tmp_path / "model" / "tokenizer_config.json").write_text(
        json.dumps({**config, "chat_template": TEMPLATE, "model_max_length": 4096})
    )
    options = {"generations": 1, "population": 2, "prompts": 2, "eval_items": 2, "batch_size": 2, "max_new_tokens": 8}
    if task == "math":
        for name in ("data", "test_data"):
            rows = [{"problem": f"{name}: {n} + 1", "answer": str(n + 1), "level": 3} for n in range(4)]
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            options[name] = str(tmp_path / f"{name}.jsonl")
    trainer = Trainer(TrainConfig(output=str(tmp_path / "run"), task=task, model=model, report_to=["none"], **options))
    trainer.train()
    row = read_rows(tmp_path / "run" / "metrics.jsonl")[0]
    assert (row["tokens"] > 0) == (task != "short-answers")  # whose answers are read
    assert row["failed"] == 0 and trainer.workers.weights.optimizer.generation == 1
    result = evaluate(run=tmp_path / "run", items=1, batch_size=20)
    assert result["samples"] == (20 if task == "conciseness" else 1) and result["questions"] == 1


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A generation's reward of each member, z, and theta, without any option."""
    return outcome(tmp_path_factory.mktemp("plain") / "run")


def outcome(folder, **options):
    task = Letters()
    trainer = train(folder, task, **{"model": "embedded", "prompts": 0, "sigma": 0.02, "lr": 0.02, **options})
    rows = read_rows(folder / "metrics.jsonl")
    return {
        "rewards": (rows[0]["reward_min"], rows[0]["reward_mean"], rows[0]["reward_max"]),  # of the first population
        "z": read_log(folder / "run.log")[1][0].update.z,
        "theta": [row["theta"] for row in rows],
        "trainer": trainer,
        "rows": rows,
    }


def differing(changed, plain):
    pairs = {
        "rewards": (changed["rewards"], plain["rewards"]),
        "z": (changed["z"], plain["z"]),
        **dict(zip("12", zip(changed["theta"], plain["theta"], strict=True), strict=True)),
    }
    return [name for name, (here, there) in pairs.items() if here != there]


# What an option changes, of: the rewards of the first population (its perturbations), their z, theta after one
# generation, after two.
CHANGES = [
    ({"shaping": "ranks"}, "z 1 2"),
    ({"shaping": "per_prompt"}, "z 1 2"),
    ({"antithetic": True}, "rewards z 1 2"),
    ({"noise_rank": 1}, "rewards z 1 2"),
    ({"momentum": 0.9}, "2"),
    ({"momentum": 0.9, "momentum_window": 1}, ""),
    ({"weight_decay": 0.1}, "1 2"),
    ({"weight_decay": 0.1, "anchored": True}, "2"),  # in the first generation theta is where the anchor is
    ({"lr": 0.01}, "1 2"),
    ({"lr_schedule": "linear"}, "2"),
    ({"lr_schedule": "cosine"}, "2"),
    ({"sigma_schedule": "linear"}, "2"),
    ({"sigma_for": ["*norm*=0.5"]}, "rewards z 1 2"),
    ({"freeze": ["*embed*"]}, "rewards z 1 2"),
    ({"tune": ["*layers.0*"]}, "rewards z 1 2"),
    ({"prompts": 8}, "rewards z 1 2"),
    ({"temperature": 0.5}, "rewards z 1 2"),
    ({"master": "host"}, ""),
    ({"master": "copy"}, ""),  # of f32 weights
    ({"seed": 1}, "rewards z 1 2"),
    ({"batch_size": 16, "eval_every": 1, "health_every": 1, "snapshot_every": 1, "save_model": False}, ""),
]


@pytest.mark.parametrize("options, changed", CHANGES, ids=[str(options) for options, _ in CHANGES])
def test_every_option_changes_what_it_should_and_nothing_else(plain, tmp_path, options, changed):
    other = outcome(tmp_path / "run", **options)
    assert " ".join(differing(other, plain)) == changed


# The same of a bf16 model, in which roundings matter.
CHANGES_BF16 = [
    ({"update_rounding": "stochastic", "master": "copy"}, "1 2"),
    ({"update_rounding": "nearest", "master": "copy"}, "1 2"),
    ({"master": "copy"}, "1 2"),
    ({"master": "host"}, ""),
    ({"master": "none"}, "1 2"),
    ({"lora_rank": 2}, "rewards z 1 2"),
    ({"lr_schedule": "linear", "final_scale": 1.0}, ""),
    ({"decoding": "static"}, None),  # text may depend on it, but theta on the rewards only
]


@pytest.fixture(scope="module")
def plain_bf16(tmp_path_factory):
    return outcome(tmp_path_factory.mktemp("plain") / "run", dtype="bfloat16")


@pytest.mark.parametrize("options, changed", CHANGES_BF16, ids=[str(options) for options, _ in CHANGES_BF16])
def test_and_of_a_bf16_model(plain_bf16, tmp_path, options, changed):
    other = outcome(tmp_path / "run", dtype="bfloat16", **options)
    if changed is None:
        assert (other["rewards"] == plain_bf16["rewards"]) == (other["theta"][0] == plain_bf16["theta"][0])
    else:
        assert " ".join(differing(other, plain_bf16)) == changed


def test_roundings_reach_the_optimizer(tmp_path):
    options = {"perturb_rounding": "stochastic", "update_rounding": "stochastic"}
    optimizer = Trainer(TrainConfig(output=str(tmp_path / "run"), **options)).workers.weights.optimizer
    assert (optimizer.perturb_rounding, optimizer.update_rounding) == ("stochastic", "stochastic")


def test_masks_and_own_sigmas_reach_the_parameters_they_name(tmp_path):
    options = {"freeze": ["*embed*"], "sigma_for": ["*norm*=0.5", "*layers.1*=0.25"]}
    trainer = outcome(tmp_path / "run", **options)["trainer"]
    sigmas = {
        name: group["sigma"]
        for group, weights in zip(
            trainer.workers.weights.optimizer.param_groups,
            trainer.workers.weights.optimizer.tables,
            strict=True,
        )
        for name in weights.live.names
    }
    assert {name for name, sigma in sigmas.items() if sigma == 0.5} == {
        name for name, _ in trainer.model.named_parameters() if "norm" in name
    }
    assert sigmas["model.layers.1.mlp.up_proj.weight"] == 0.25 and sigmas["model.layers.0.mlp.up_proj.weight"] == 0.02
    assert not any("embed" in name for name in sigmas)
    start = AutoModelForCausalLM.from_pretrained(Trainer(TrainConfig(output=str(tmp_path / "x"))).model.name_or_path)
    assert torch.equal(start.model.embed_tokens.weight, trainer.model.model.embed_tokens.weight)


def test_all_members_see_the_same_prompts_and_each_generation_draws_its_own(tmp_path):
    seen = []

    class Watched(Letters):
        def score(self, item, completion):
            seen.append(item.key)
            return super().score(item, completion)

    task = Watched()
    train(tmp_path / "run", task, model="embedded", prompts=5, eval_items=1)
    inner = seen[1:-1]  # without the evals on the one held-out item
    members = [inner[i : i + 5] for i in range(0, len(inner), 5)]
    assert len(members) == 8 and members[0] == members[1] == members[2] == members[3] != members[4] == members[7]


# --- rewards that fail ------------------------------------------------------------------------------------------------


class Failing(Letters):
    def score(self, item, completion):
        return Score(None, error="ValueError: no luck") if item.key == (2, 6) else super().score(item, completion)


def test_a_reward_that_fails_gets_the_lowest_reward_is_counted_and_shown(tmp_path):
    class Lowest(Letters):
        def score(self, item, completion):
            return Score(-1000.0) if item.key == (2, 6) else super().score(item, completion)

    class SometimesLowest(Lowest):
        def score(self, item, completion):
            return Score(None, error="late") if item.key == (3, 7) else super().score(item, completion)

    class BothLowest(Lowest):
        def score(self, item, completion):
            return Score(-1000.0) if item.key == (3, 7) else super().score(item, completion)

    same = {"model": "embedded", "prompts": 0}
    train(tmp_path / "failing", SometimesLowest(), **same)
    train(tmp_path / "both", BothLowest(), **same)
    assert summary(tmp_path / "failing")["fingerprint"] == summary(tmp_path / "both")["fingerprint"]
    row = read_rows(tmp_path / "failing" / "metrics.jsonl")[0]
    assert row["failed"] == 4 and "late" in row["failed_example"]


def test_a_declared_floor_counts_instead(tmp_path):
    class Floored(Failing):
        floor = -7.5

    class Explicit(Letters):
        def score(self, item, completion):
            return Score(-7.5) if item.key == (2, 6) else super().score(item, completion)

    same = {"model": "embedded", "prompts": 0}
    train(tmp_path / "floored", Floored(), **same)
    train(tmp_path / "explicit", Explicit(), **same)
    assert summary(tmp_path / "floored")["fingerprint"] == summary(tmp_path / "explicit")["fingerprint"]


def test_a_run_may_be_asked_to_stop_at_a_failing_reward(tmp_path):
    class Mended(Letters):
        name = "letters"

    class HeldOut(Letters):
        def score(self, item, completion):
            return Score(None, error="no luck here") if item.key == (3,) else super().score(item, completion)

    options = {"model": "embedded", "prompts": 0, "on_reward_error": "stop"}
    with pytest.raises(
        RewardFailed, match="held-out answers after 0 updates: scoring failed for 1; prompt 2: no luck here"
    ):
        train(tmp_path / "held-out", HeldOut(), **options)
    with pytest.raises(RewardFailed, match="generation 1, member 0: prompt .* no luck"):
        train(tmp_path / "run", Failing(), **options)
    with pytest.raises(RewardFailed, match="no luck"):
        train(tmp_path / "run", Failing(), resume=True, **options)
    train(tmp_path / "run", Mended(), resume=True, **options)  # what failed is scored again
    train(tmp_path / "whole", Letters(), **options)
    assert summary(tmp_path / "run")["fingerprint"] == summary(tmp_path / "whole")["fingerprint"]


def test_a_reward_that_always_fails_ends_the_run_at_its_first_eval(tmp_path):
    class Broken(Letters):
        floor = 0.0  # as in eval, a floor is no answer to it

        def score(self, item, completion):
            return Score(None, error="always")

    for again in ({}, {"resume": True}):
        with pytest.raises(
            RewardFailed,
            match="no answer of the base model to a held-out question could be scored; the first failure: always",
        ):
            train(tmp_path / "run", Broken(), model="embedded", prompts=0, **again)
    assert read_log(tmp_path / "run" / "run.log")[1] == [] and read_rows(tmp_path / "run" / "evals.jsonl") == []


def test_a_reward_that_fails_for_every_training_prompt_changes_nothing(tmp_path):
    class Broken(Letters):
        def score(self, item, completion):
            return Score(None, error="always") if item in self.train else super().score(item, completion)

    trainer = train(tmp_path / "run", Broken(), model="embedded", prompts=0)
    header, generations = read_log(tmp_path / "run" / "run.log")
    assert [g.update.z for g in generations] == [
        None,
        None,
    ] and f"{trainer.workers.weights.optimizer.fingerprint():016x}" == header["theta"]
    assert [row["failed"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [64, 64]


def test_a_held_out_answer_that_fails_counts_as_the_floor(tmp_path):
    class Half(Letters):
        floor = -10.0

        def score(self, item, completion):
            return Score(None, error="half of them") if item.key in [(a,) for a in range(1, 5)] else Score(2.0)

    train(tmp_path / "run", Half(), model="embedded", prompts=0)
    row = read_rows(tmp_path / "run" / "evals.jsonl")[0]
    assert row["reward"] == -4.0 == summary(tmp_path / "run")["base"] and row["low"] < -4 < row["high"]


# --- samples, and answers that are read -------------------------------------------------------------------------------


def rewards_of_last(folder):
    return [line["rewards"] for line in sorted(read_journals(folder), key=lambda line: line["member"])]


def test_members_share_random_numbers_in_one_batch_and_one_by_one(tmp_path):
    """A generation draws its own. Rewards are equal but for greedy ties that rounding breaks otherwise."""
    options = {"model": "embedded", "prompts": 0, "temperature": 2.0, "samples": 3, "noise_rank": 1, "sigma": 5e-3}
    options |= {"freeze": ["*norm*"], "generations": 1, "batch_size": 20}
    for name, more in (("together", {}), ("one", {"members_at_once": 1}), ("seed", {"seed": 1})):
        train(tmp_path / name, Letters(), **options, **more)
    together, one, seed = (rewards_of_last(tmp_path / name) for name in ("together", "one", "seed"))
    assert [len(rewards) for rewards in together] == [16] * 4  # one for each prompt
    pairs = [pair for ours, theirs in zip(together, one, strict=True) for pair in zip(ours, theirs, strict=True)]
    assert sum(ours == theirs for ours, theirs in pairs) > 0.9 * len(pairs)
    # Noise this small changes few tokens, other random numbers most
    members = [pair for rewards in together[1:] for pair in zip(together[0], rewards, strict=True)]
    others = [pair for ours, theirs in zip(together, seed, strict=True) for pair in zip(ours, theirs, strict=True)]
    assert sum(a == b for a, b in members) > 0.7 * len(members)
    assert sum(a == b for a, b in others) < 0.2 * len(others)


def test_a_prompt_is_worth_the_mean_of_its_samples_or_the_best_and_held_out_answers_are_greedy(tmp_path):
    drawn = {}

    class Watched(Letters):
        def score(self, item, completion):
            score = super().score(item, completion)
            drawn.setdefault(item.key, []).append(score.reward)
            return score

    options = {"model": "embedded", "prompts": 0, "generations": 1, "population": 2}
    train(tmp_path / "greedy", Letters(), **options)
    for objective, worth in (("mean", lambda rewards: sum(rewards) / 4), ("best", max)):
        drawn.clear()
        more = {"temperature": 2.0, "samples": 4, "objective": objective}
        trainer = train(tmp_path / objective, Watched(), **options, **more)
        lines = rewards_of_last(tmp_path / objective)
        for place, item in enumerate(Letters.train):
            expected = [worth(drawn[item.key][4 * member : 4 * member + 4]) for member in range(2)]
            assert [line[place] for line in lines] == pytest.approx(expected)
        assert max(len(set(rewards[:4])) for rewards in drawn.values()) > 2
        assert all(line["tokens"] > 4 * 16 for line in read_journals(tmp_path / objective))
        greedy, row = (read_rows(tmp_path / name / "evals.jsonl")[0] for name in ("greedy", objective))
        assert row["reward"] == greedy["reward"]
        logged = read_log(tmp_path / objective / "run.log")[0]["config"]
        assert {name: logged[name] for name in more} == more and trainer.rows[0]["reward_mean"] == pytest.approx(
            sum(map(sum, lines)) / 32
        )


def test_a_failed_sample_stops_a_run_that_is_asked_to_stop(tmp_path):
    class Sometimes(Letters):
        def score(self, item, completion):
            return Score(None, error="odd") if item.key == (1, 5) and len(completion) > 3 else Score(1.0)

    options = {"model": "embedded", "prompts": 0, "temperature": 2.0, "samples": 8}
    train(tmp_path / "floor", Sometimes(), **options)
    row = read_rows(tmp_path / "floor" / "metrics.jsonl")[0]
    assert 0 < row["failed"] < 8 * 4 and row["reward_min"] == 1.0
    with pytest.raises(RewardFailed, match="generation 1, member 0: prompt 0: odd"):
        train(tmp_path / "stop", Sometimes(), on_reward_error="stop", **options)


READ = [{"prompt": f"^{a},{b}:", "answer": f"{a}*{b}", "rejected": f"{a}-{b}"} for a in range(9) for b in range(4)]


def on_log_probs(folder, data=READ, **options):
    options = {"model": "embedded", "prompts": 0, "generations": 6, "population": 8, "max_new_tokens": 6, **options}
    config = TrainConfig(output=str(folder), task="custom", report_to=["none"], **options)
    trainer = Trainer(config, data=data, reward="logprob")
    trainer.train()
    return trainer


def held_out_log_p(trainer, model, field="answer"):
    """The mean of the sums over an answer and its end, by one forward pass over each text."""
    sums = []
    for item in trainer.task.test:
        ids = tokens(item.prompt + item.data[field]) + [2]
        log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
        sums.append(sum(log_p[place - 1, ids[place]].item() for place in range(len(tokens(item.prompt)), len(ids))))
    return sum(sums) / len(sums)


def tokens(text):
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)(text)["input_ids"]


@pytest.mark.parametrize("rejected", [False, True])
@pytest.mark.parametrize("options", [{}, {"noise_rank": 1}], ids=("one by one", "one batch"))
def test_log_probabilities_of_held_out_answers_rise(tmp_path, options, rejected):
    """In a few generations, and without a token generated in training."""
    data = READ if rejected else [{name: row[name] for name in ("prompt", "answer")} for row in READ]
    trainer = on_log_probs(tmp_path / "run", data, **options)
    rows, evals = trainer.rows, read_rows(tmp_path / "run" / "evals.jsonl")
    assert rows[-1]["reward_mean"] > rows[0]["reward_mean"] + 1 and all(row["tokens"] == 0 for row in rows)
    assert evals[-1]["reward"] > evals[0]["reward"] + 1
    assert all(row["identical"] == 0 for row in rows)
    for row, name in ((evals[0], EMBEDDED_MODEL), (evals[-1], tmp_path / "run" / "model")):
        model = AutoModelForCausalLM.from_pretrained(name)
        with torch.no_grad():
            expected = held_out_log_p(trainer, model)
            expected -= held_out_log_p(trainer, model, "rejected") if rejected else 0
        assert row["reward"] == pytest.approx(expected, abs=1e-4)
    assert summary(tmp_path / "run")["metric"] == "exact" and 0 <= evals[-1]["exact"] <= 1
    for split in ("base", "tuned"):
        for row in read_rows(tmp_path / "run" / "answers" / f"{split}.jsonl"):
            assert row["exact"] == (row["completion"].strip() == dict(by_prompt(data))[row["prompt"]])
    result = evaluate(run=tmp_path / "run", data=data)
    assert (result["metric"], result["value"]) == ("exact", evals[-1]["exact"])
    assert result["reward"] == pytest.approx(evals[-1]["reward"], abs=1e-4)


def by_prompt(data):
    return [(row["prompt"], row["answer"]) for row in data]


def test_members_are_worth_the_same_log_probabilities_in_one_batch_and_one_by_one(tmp_path):
    options = {"noise_rank": 1, "freeze": ["*norm*"], "generations": 1, "population": 6, "batch_size": 100}
    for name, more in (("together", {"members_at_once": 4}), ("one", {"members_at_once": 1})):
        on_log_probs(tmp_path / name, **options, **more)
    together, one = (rewards_of_last(tmp_path / name) for name in ("together", "one"))
    assert [len(rewards) for rewards in together] == [29] * 6
    np.testing.assert_allclose(together, one, rtol=0, atol=1e-4)


def test_what_cannot_be_read_is_refused_before_the_run(tmp_path):
    file, output = tmp_path / "data.jsonl", tmp_path / "run"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*READ[:9], {"prompt": "^1:", "answer": "7" * 80}]))
    with pytest.raises(UserError, match="data.jsonl, line 10: the answer has 81 tokens, too many after 3 of"):
        on_log_probs(output, str(file))
    for options, words in (
        ({"temperature": 1.0}, "temperature is for written answers, and reward logprob reads given ones"),
        ({"temperature": 1.0, "samples": 2}, "temperature is for written answers"),
    ):
        with pytest.raises(UserError, match=words):
            on_log_probs(output, **options)
    assert not output.exists()


# --- Python -----------------------------------------------------------------------------------------------------------


def test_a_model_and_a_reward_of_ones_own(tmp_path, tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(
        Trainer(TrainConfig(output=str(tmp_path / "x"))).model.name_or_path, padding_side="left"
    )
    task = load_task(
        "custom",
        data=[{"prompt": f"^{a}:", "length": a} for a in range(1, 10)],
        reward=lambda completion, item: -abs(len(completion) - item["length"]),
    )
    config = TrainConfig(
        output=str(tmp_path / "run"),
        model="mine",
        task="custom",
        max_new_tokens=6,
        **{**SMALL, "prompts": 0, "sigma": 0.05},
    )
    before = {name: p.clone() for name, p in tiny_llama.named_parameters()}
    result = Trainer(config, model=tiny_llama, tokenizer=tokenizer, task=task).train()
    assert result["metric"] == "reward" and result["final"] <= 0
    assert all(not torch.equal(before[name], p) for name, p in tiny_llama.named_parameters())


QUESTIONS = [{"prompt": f"^{a}:", "length": a} for a in range(1, 10)]


def right_length(completion, item):
    return -abs(len(completion) - item["length"])


def own(folder, **options):
    options = {"model": "embedded", "task": "custom", "max_new_tokens": 6, **SMALL, "prompts": 0, **options}
    return TrainConfig(output=str(folder), **options)


def test_data_and_reward_may_be_objects_files_or_both_with_one_result(tmp_path):
    """A path is kept in the log, so that the run is resumed without it; an object has to be given again."""
    file = tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    objects = Trainer(own(tmp_path / "objects"), data=QUESTIONS, reward=right_length).train()
    mixed = Trainer(own(tmp_path / "mixed"), data=file, reward=right_length).train()
    flags = Trainer(own(tmp_path / "flags", data=str(file)), reward=right_length).train()
    assert objects["fingerprint"] == mixed["fingerprint"] == flags["fingerprint"]
    recorded = {name: read_log(tmp_path / name / "run.log")[0]["config"]["data"] for name in ("objects", "mixed")}
    assert recorded == {"objects": None, "mixed": str(file)}
    again = Trainer.resume(tmp_path / "mixed", reward=right_length, generations=3).train()
    other = Trainer.resume(tmp_path / "objects", data=file, reward=right_length, generations=3).train()
    assert other["fingerprint"] == again["fingerprint"] != objects["fingerprint"]
    with pytest.raises(ValueError, match="the task 'custom' needs data .* and a reward"):
        Trainer.resume(tmp_path / "objects")


def test_a_reward_in_a_file_is_named_as_on_the_command_line(tmp_path):
    (tmp_path / "mine.py").write_text("def reward(completion, item):\n    return -len(completion)\n")
    trainer = Trainer(own(tmp_path / "run"), data=QUESTIONS, reward=f"{tmp_path}/mine.py:reward")
    assert trainer.config.reward == f"{tmp_path}/mine.py:reward" and trainer.task.code_digest


def test_a_path_serves_as_in_the_config_and_threads_as_with_a_task_by_name(tmp_path, monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    Trainer(own(tmp_path / "run", threads=2), data=QUESTIONS, reward=right_length)
    assert threads == [2]

    def load(name, **options):
        raise ValueError(f"{name} of {options['data']}")

    monkeypatch.setattr("es_finetune.runs.setup.load_task", load)
    with pytest.raises(ValueError, match="math of elsewhere.jsonl"):  # which has questions of its own, too
        Trainer(own(tmp_path / "run", task="math"), data=pathlib.Path("elsewhere.jsonl"))


@pytest.mark.parametrize(
    "options, objects, words",
    [
        ({}, {"task": Letters(), "data": QUESTIONS}, "data was given beside task, which has questions"),
        ({"task": "countdown-char"}, {"reward": right_length}, "reward is for the task 'custom', .* 'countdown-char'"),
        ({"data": "a.jsonl"}, {"data": QUESTIONS}, "data was given to the Trainer and in the config"),
        ({}, {"data": QUESTIONS}, "the task 'custom' needs data .* and a reward"),
        ({}, {"data": QUESTIONS, "reward": 3}, "the reward is of type int"),
        ({}, {"task": "countdown"}, "task must be an object, not 'countdown': name it in the config"),
        (
            {},
            {"data": QUESTIONS, "reward": right_length, "model": "embedded"},
            "model must be a loaded one, not 'embedded'",
        ),
    ],
    ids=("task", "another task", "config", "no reward", "no function", "name of a task", "name of a model"),
)
def test_contradictions_between_config_and_objects_are_refused(tmp_path, options, objects, words):
    with pytest.raises(ValueError, match=words):
        Trainer(own(tmp_path / "run", **options), **objects)
    assert not (tmp_path / "run").exists()


def test_a_rank_behind_the_first_is_sent_to_follow_which_refuses_what_the_first_does(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RuntimeError, match=r"call es_finetune.trainer.follow\(\) on the others"):
        Trainer(own(tmp_path))
    for config, changes, words in (
        (tmp_path, {}, "holds no run to resume"),
        (own(tmp_path), {"sigma": 0.5}, "sigma goes into the config"),
    ):
        with pytest.raises(UserError, match=words):
            follow(config, **changes)


def test_a_config_holds_plain_values_whatever_it_was_given():
    given = {"model": pathlib.Path("some/model"), "task": "countdown", "output": pathlib.Path("out")}
    config = TrainConfig(
        **given,
        population=np.int64(4),
        sigma=np.float32(0.5),
        seed=np.uint64(2**64 - 1),
        antithetic=np.True_,
        freeze=("*norm*",),
    )
    assert recorded_options(config) == json.loads(json.dumps(recorded_options(config), allow_nan=False))
    assert (config.model, config.output, config.population, config.sigma, config.seed) == (
        "some/model",
        "out",
        4,
        0.5,
        2**64 - 1,
    )
    assert (config.antithetic, config.freeze) == (True, ["*norm*"])
    for wrong, words in (
        ({"population": 4.0}, "population must be a whole number, not 4.0"),
        ({"generations": True}, "generations must be a whole number, not True"),
        ({"momentum": None}, "momentum must be a number, not None"),
        ({"model": 3}, "model must be text, not 3"),
        ({"report_to": "none"}, "report_to must be a list, not 'none'"),
        ({"antithetic": "false"}, "antithetic must be true or false, not 'false'"),
        ({"straggler_limit": float("nan")}, "straggler_limit must be a finite number, not nan"),
        ({"threads": 2000}, "threads must be at most 1024, not 2000"),
    ):
        with pytest.raises(ValueError, match=words):
            TrainConfig(**wrong)


@pytest.fixture
def messages(caplog):
    """What the Trainer has said since it was last asked."""
    caplog.set_level("INFO", "es_finetune")

    def said():
        lines = list(caplog.messages)
        caplog.clear()
        return lines

    return said


def own_task(questions):
    return load_task(
        "custom", data=[{"prompt": f"^{a}:"} for a in range(questions)], reward=lambda completion, item: len(completion)
    )


def test_a_custom_task_asks_128_prompts_a_generation_unless_told_otherwise(tmp_path, monkeypatch, messages):
    """Here 6, of the 16 that are left for training from 20. The run says so, and how many answers that is, before the
    first of them."""
    monkeypatch.setattr("es_finetune.runs.setup.CUSTOM_PROMPTS", 6)
    options = {
        "model": "embedded",
        "max_new_tokens": 4,
        "generations": 1,
        "population": 4,
        "eval_items": 1,
        "report_to": ["none"],
    }

    def prompts_of(name, questions=20, **more):
        config = TrainConfig(output=str(tmp_path / name), task="custom", **options, **more)
        Trainer(config, task=own_task(questions)).train()
        assert config.prompts == more.get("prompts")  # the caller's config serves for another file
        return read_log(tmp_path / name / "run.log")[0]["config"]["prompts"], messages()

    prompts, lines = prompts_of("many")
    assert prompts == 6
    assert lines[1:3] == [
        "6 of the 16 training prompts are drawn for each generation; --prompts 0 takes all",
        "24 answers a generation: 4 members x 6 prompts",
    ]
    for name, more, answers in (
        ("few", {"questions": 7}, "4 members x 6 prompts"),
        ("all", {"prompts": 0}, "4 members x 16 prompts"),
        ("some", {"prompts": 3}, "4 members x 3 prompts"),
    ):
        prompts, lines = prompts_of(name, **more)
        assert (
            prompts == more.get("prompts", 0)
            and answers in lines[1]
            and not any("--prompts 0" in line for line in lines)
        )
    # A run that was begun when all prompts were the default goes on with all of them.
    assert prompts_of("all", resume=True)[0] == 0
    with pytest.raises(ValueError, match="begun with prompts 3, not 0"):
        prompts_of("some", resume=True, prompts=0)


def test_the_whole_run_is_estimated_after_its_first_member(tmp_path, messages):
    train(tmp_path / "run")
    lines = messages()
    after_member, after_generation = (i for i, line in enumerate(lines) if line.startswith("estimate"))
    assert lines[after_member].startswith("estimate after the first member: ") and after_generation == after_member + 1
    assert all(
        "for 2 generations of" in lines[i] and "and 2 evals on the held-out prompts" in lines[i]
        for i in (after_member, after_generation)
    )
    train(tmp_path / "run", resume=True, generations=3)
    assert not [line for line in messages() if line.startswith("estimate")]


def test_a_trainer_prints_nothing(tmp_path, capfd):
    train(tmp_path / "run")
    printed = capfd.readouterr()
    bars = ("Loading weights", "Writing model shards", "")  # of transformers, which has a switch for them
    assert printed.out == "" and all(line.startswith(bars) for line in re.split(r"[\r\n]+", printed.err))


def test_a_task_without_items_is_refused(tmp_path):
    for split in ("train", "test"):
        task = Letters()
        setattr(task, split, [])
        with pytest.raises(ValueError, match=f"task letters has no {split} items"):
            train(tmp_path / "run", task, model="embedded", prompts=0)


def test_a_graders_failure_is_counted_and_shown_and_worth_nothing(tmp_path):
    class Grader(Letters):
        def score(self, item, completion):
            return Score(0.0, error="the grader was killed") if item.key == (2, 6) else super().score(item, completion)

    train(tmp_path / "run", Grader(), model="embedded", prompts=0, on_reward_error="stop")
    row = read_rows(tmp_path / "run" / "metrics.jsonl")[0]
    assert row["failed"] == 4 and "the grader was killed" in row["failed_example"]


def test_without_flags_the_papers_run_is_meant():
    config = TrainConfig(task="countdown", model="some/model")
    assert (config.sigma, config.lr, config.population, config.generations, config.prompts) == (1e-3, 5e-4, 30, 500, 0)
    assert config.output == "runs/countdown-model"


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_the_readmes_example_runs_as_it_stands(tmp_path, save_tiny, monkeypatch, capsys, dtype):
    root = pathlib.Path(__file__).parents[2]
    pages = [(root / page).read_text() for page in ("README.md", "docs/guides/own-task.md")]
    example, again = (
        block for page in pages for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "Trainer(" in block
    )
    assert example == again
    assert len(example.splitlines()) < 20
    model = save_tiny(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    example = example.replace("Qwen/Qwen2.5-0.5B", model).replace(
        "generations=50", f"generations=2, population=4, dtype={dtype!r}"
    )
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    assert "->" in capsys.readouterr().out and (tmp_path / "runs" / "short" / "summary.json").exists()
