"""Contract under test: what may be asked of a run, and which of it may change when the run goes on."""

import dataclasses

from es_finetune.config import RESUMABLE, TrainConfig

# What decides the log of a run: with any of these changed, it would be another run.
DECIDED = """task max_new_tokens dtype lora_rank pad_token generations population sigma lr sigma_schedule lr_schedule
final_scale shaping antithetic momentum momentum_window weight_decay anchored base perturb_rounding update_rounding tune
freeze sigma_for prompts seed""".split()


def test_an_option_is_resumable_or_decides_the_log():
    options = {option.name for option in dataclasses.fields(TrainConfig)}
    assert options - RESUMABLE == {*DECIDED}
