"""Contract under test: the model card says of what a model was made and how to make it again, with the log's own
figures, and names no local folder (es_finetune.runs.model_card)."""

import re
import shlex

import pytest
import yaml

from es_finetune import TrainConfig, Trainer, export
from es_finetune.cli import _parse
from es_finetune.runs.log import read_log
from es_finetune.runs.model_card import write_model_card

SMALL = {"generations": 2, "population": 4, "prompts": 4, "eval_items": 4, "report_to": ["none"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """With an adapter, so that there is one to merge."""
    folder = tmp_path_factory.mktemp("card") / "run"
    config = TrainConfig(output=folder, lora_rank=1, lr_schedule="linear", save_model=True, **SMALL)
    Trainer(config).train()
    return folder


def card(folder):
    """(metadata, rows, commands, text) of a card."""
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    rows = dict(re.findall(r"^\| (\S.*?) \| (.*) \|$", body, re.MULTILINE))
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^es-finetune .*", body, re.MULTILINE)]
    return yaml.safe_load(front), rows, commands, text


def test_the_model_of_a_run_has_a_card(run):
    metadata, rows, commands, text = card(run / "model")
    header, generations = read_log(run / "run.log")
    assert metadata == {"library_name": "peft", "tags": ["evolution-strategies", "lora"]}
    assert rows["task"] == "countdown-char, reward: the task's" and rows["base model"] == "`embedded`"
    assert (rows["generations"], rows["population"], rows["seed"]) == ("2", "4", "0")
    assert rows["lr"] == f"{generations[0].lr[0]:g} to {generations[1].lr[0]:g}" and rows["sigma"] == "0.01"
    assert rows["fingerprint of the base model"] == f"`{header['base_fingerprint']}`"
    assert rows["fingerprint of the exact weights"] == f"`{generations[1].theta:016x}`"
    assert rows["fingerprint of the tuned weights here"] == f"`{generations[1].live:016x}`"
    assert "https://arxiv.org/abs/2509.24372" in text and str(run.parent) not in text
    assert [_parse(words[1:])["generation"] for words in commands] == [2, 2]


def test_an_export_has_the_card_of_its_generation(run, tmp_path):
    export(run, output=tmp_path / "merged", generation=1, merge_lora=True)
    metadata, rows, commands, _ = card(tmp_path / "merged")
    _, generations = read_log(run / "run.log")
    assert metadata == {"library_name": "transformers", "tags": ["evolution-strategies"]}
    assert rows["generations"] == "1" and "--merge_lora" in commands[1]
    assert rows["fingerprint of the tuned weights here, before they were merged"] == f"`{generations[0].live:016x}`"


@pytest.mark.parametrize(
    "identity, base, shown",
    [
        ({"model": "owner/name", "commit": "abc"}, "owner/name", "`owner/name`, commit abc"),
        ({"model": "/home/me/name", "commit": None}, None, "`name`"),
        (
            {"model": "/home/me/mine", "base_model": "owner/name", "commit": "abc"},
            "owner/name",
            "`owner/name`, commit abc, with the adapter `mine`",
        ),
        ({"model": "owner/name:a.gguf", "commit": "abc", "file": "a.gguf"}, None, "`owner/name:a.gguf`, commit abc"),
    ],
)
def test_a_model_of_the_hub_is_named_and_a_folder_is_not(run, tmp_path, identity, base, shown):
    header, _ = read_log(run / "run.log")
    header["model"] |= identity
    header["config"]["reward"] = "/home/me/reward.py:reward"
    write_model_card(tmp_path, header, [])
    metadata, rows, _, text = card(tmp_path)
    assert metadata.get("base_model") == base
    assert rows["base model"] == shown and rows["task"].endswith("reward: `reward.py:reward`")
    assert rows["fingerprint of the exact weights"] == f"`{header['theta']}`" and "/home" not in text


def test_a_log_of_before_there_was_low_rank_is_of_full_noise(run, tmp_path):
    header, _ = read_log(run / "run.log")
    del header["config"]["noise_rank"]
    write_model_card(tmp_path, header, [])
    assert card(tmp_path)[1]["noise"] == "version 1, full rank"
