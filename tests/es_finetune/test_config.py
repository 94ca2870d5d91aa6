"""Contract under test: what may be asked of a run, of which choices, and what may change when the run goes on."""

import dataclasses
import re

import pytest

from es_finetune.config import GROUPS, RESUMABLE, CalibrateConfig, EvalConfig, ExportConfig, ReportConfig, TrainConfig
from es_finetune.errors import UserError

# What decides the log of a run: with any of these changed, it would be another run.
DECIDED = """task max_new_tokens dtype lora_rank pad_token generations population sigma lr sigma_schedule lr_schedule
final_scale shaping antithetic noise_rank momentum momentum_window weight_decay anchored master perturb_rounding
update_rounding tune freeze sigma_for prompts seed members_at_once
temperature samples objective logprob_per_token""".split()


def test_an_option_is_resumable_or_decides_the_log():
    options = {option.name for option in dataclasses.fields(TrainConfig)}
    assert options - RESUMABLE == {*DECIDED}


@pytest.mark.parametrize("kind", [TrainConfig, EvalConfig, CalibrateConfig, ExportConfig, ReportConfig])
def test_every_option_has_a_group_and_a_help(kind):
    for option in dataclasses.fields(kind):
        assert option.metadata["group"] in GROUPS and option.metadata["help"]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"engine": "tgi"}, "engine must be hf or vllm, not 'tgi'"),
        ({"update_rounding": "up"}, "update_rounding must be nearest or stochastic, not 'up'"),
        ({"report_to": ["none", "fax"]}, "report_to must be tensorboard, wandb, trackio or none, not 'fax'"),
    ],
)
def test_a_value_that_is_none_of_the_choices_is_refused_with_all_of_them(options, words):
    with pytest.raises(UserError, match=re.escape(words)):
        TrainConfig(**options)


@pytest.mark.parametrize(
    "option", [o for o in dataclasses.fields(TrainConfig) if o.metadata["choices"]], ids=lambda o: o.name
)
def test_every_choice_can_be_made(option):
    for choice in option.metadata["choices"]:
        more = {"samples": 2, "temperature": 1.0} if choice == "best" else {}
        config = TrainConfig(**{option.name: [choice] if option.name == "report_to" else choice}, **more)
        assert getattr(config, option.name) in (choice, [choice])


def test_members_share_a_batch_where_they_can():
    def chosen(**options):
        return TrainConfig(task="countdown-char", **options).members_at_once

    assert chosen() == chosen(engine="vllm") == chosen(noise_rank=1, decoding="continuous") == 1
    assert chosen(noise_rank=1) == chosen(noise_rank=1, engine="vllm") == 0
    assert chosen(noise_rank=64, members_at_once=7) == 7
    assert chosen(noise_rank=1, members_at_once=1) == 1
    for options, words in (
        ({}, "1 with noise_rank 0, not 4"),
        ({"engine": "vllm"}, "1 with noise_rank 0, not 4"),
        ({"noise_rank": 1, "decoding": "continuous"}, "1 with decoding continuous, not 4"),
    ):
        with pytest.raises(UserError, match=f"members_at_once must be {words}"):
            chosen(members_at_once=4, **options)
    with pytest.raises(UserError, match="at least 0, not -1"):
        chosen(noise_rank=1, members_at_once=-1)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"samples": 4}, "4 greedy samples are all the same: give a temperature above 0, or samples 1"),
        ({"samples": 0}, "samples must be at least 1, not 0"),
        ({"temperature": -1.0}, "temperature must be at least 0, not -1.0"),
        ({"temperature": float("inf")}, "temperature must be a finite number, not inf"),
        ({"temperature": 1.0, "objective": "best"}, "objective best is of several samples: give samples above 1"),
        ({"temperature": 1.0, "decoding": "continuous"}, "members would not share their random numbers"),
    ],
)
def test_samples_that_cannot_be_are_refused(options, words):
    with pytest.raises(UserError, match=re.escape(words)):
        TrainConfig(**options)
