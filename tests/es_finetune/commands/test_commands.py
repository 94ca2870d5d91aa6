"""Contract under test: the functions beside the Trainer.

They take a command's flags as keyword arguments, of which data and reward may be objects as for a Trainer, are offered
by the package without a heavy import, and say how far they are through `logging` alone.
"""

import dataclasses
import inspect
import json
import logging
import subprocess
import sys

import pytest

import es_finetune
from es_finetune import TrainConfig, Trainer
from es_finetune.commands import replay as replay_module
from es_finetune.config import CalibrateConfig, EvalConfig, ExportConfig, ReplayConfig, ReportConfig
from es_finetune.errors import UserError
from es_finetune.runs.files import read_rows

FUNCTIONS = {
    "calibrate": CalibrateConfig,
    "evaluate": EvalConfig,
    "export": ExportConfig,
    "replay": ReplayConfig,
    "report": ReportConfig,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_takes_the_options_of_its_command(name):
    signature = inspect.signature(getattr(es_finetune, name))
    assert list(signature.parameters) == [field.name for field in dataclasses.fields(FUNCTIONS[name])]
    with pytest.raises(TypeError, match="sgima"):
        getattr(es_finetune, name)(sgima=1)


QUESTIONS = [{"prompt": f"^{a}:", "length": a % 7} for a in range(1, 30)]


def right_length(completion, item):
    return 6 - abs(len(completion) - item["length"])


def test_data_and_reward_may_be_objects_as_for_a_trainer(tmp_path):
    run, file = tmp_path / "run", tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    objects = {"data": QUESTIONS, "reward": right_length}
    own = {"model": "embedded", "task": "custom", "max_new_tokens": 6}
    small = {"generations": 1, "population": 4, "prompts": 0, "report_to": ["none"], "save_model": False}
    Trainer(TrainConfig(output=run, **own, **small), **objects).train()
    with pytest.raises(UserError, match="the task 'custom' needs data .* and a reward"):
        es_finetune.evaluate(run=run)
    measured = es_finetune.evaluate(run=run, **objects)
    assert measured["value"] == read_rows(run / "evals.jsonl")[-1]["reward"]
    mixed = es_finetune.evaluate(run=run, data=file, reward=right_length)
    assert (mixed["value"], mixed["tokens"]) == (measured["value"], measured["tokens"])
    options = {**own, "members": 4, "sigmas": [0.01]}
    calibrated, mixed = (es_finetune.calibrate(**options, **{**objects, "data": data}) for data in (QUESTIONS, file))
    assert calibrated["base_reward"] == mixed["base_reward"] and calibrated["sigma"] == mixed["sigma"]
    with pytest.raises(UserError, match="reward is for the task 'custom', .* 'countdown-char'"):
        es_finetune.calibrate(reward=right_length)
    assert es_finetune.evaluate(run=run, model=None, task=None, **objects)["value"] == measured["value"]  # not given


def test_the_package_lists_its_names_and_loads_them_when_asked():
    script = (
        "import sys, es_finetune\n"
        "names = set(dir(es_finetune)) >= set(es_finetune.__all__)\n"
        "print(names, sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "True []\n"
    classes = {"Callback", "EvolutionStrategy", "TrainConfig", "Trainer", "Update"}
    assert set(es_finetune.__all__) == {*classes, *FUNCTIONS}
    assert all(getattr(es_finetune, name).__name__ == name for name in es_finetune.__all__)
    with pytest.raises(AttributeError, match="'es_finetune' has no attribute 'evalute'"):
        es_finetune.evalute  # noqa: B018


def test_replay_says_how_far_it_is_and_prints_nothing(tmp_path, caplog, capsys, monkeypatch):
    options = {"generations": 2, "population": 4, "prompts": 16, "eval_items": 32, "report_to": ["none"]}
    Trainer(TrainConfig(output=tmp_path / "run", save_model=False, **options)).train()
    capsys.readouterr()
    monkeypatch.setattr(replay_module, "SECONDS_BETWEEN_MESSAGES", 0.0)
    with caplog.at_level(logging.INFO, "es_finetune"):
        rebuilt = es_finetune.replay(tmp_path / "run")
    assert rebuilt.optimizer.generation == len(rebuilt.generations) == 2
    assert caplog.messages == [f"replaying {tmp_path / 'run'}: {done} generations made again" for done in (1, 2)]
    assert not capsys.readouterr().out
    assert es_finetune.replay(tmp_path / "run", generation=1).optimizer.generation == 1
