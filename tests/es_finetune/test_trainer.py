"""Contract under test: a run from the command line.

It leaves metrics.jsonl, summary.json, reward.png and a model/ that transformers loads, whose weights have the fingerprint
of the summary; two runs with one seed have one fingerprint; the demo can be run again in its folder, and no other folder is
ever overwritten; a config that cannot run is one line on stderr and exit code 2, with nothing written.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import es_kernels
from es_finetune.cli import main
from es_finetune.segments import named_segments
from es_finetune.trainer import EMBEDDED_MODEL, TrainConfig

SMALL = ["--generations", "2", "--population", "4", "--prompts", "16", "--eval_items", "32"]


def train(output, *flags):
    return main(["train", "--output", str(output), *SMALL, *flags])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "demo"
    assert train(output) == 0
    return output


def summary(output):
    return json.loads((output / "summary.json").read_text())


def test_a_run_leaves_what_it_promises(run):
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "metrics.jsonl", "model", "reward.png", "summary.json"]
    found = summary(run)
    assert {"base_exact", "final_exact", "generations", "seconds_total", "seconds_kernels", "backend", "noise_version", "fingerprint"} <= set(found)
    assert found["generations"] == 2 and found["noise_version"] == es_kernels.noise.VERSION
    assert 0 < found["seconds_kernels"] < found["seconds_total"]
    assert found["backend"] == es_kernels.active_backend(torch.device("cpu"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["generation"] for row in rows] == [0, 1]
    for row in rows:
        assert row["reward_min"] <= row["reward_mean"] <= row["reward_max"]
        assert row["theta"] == row["live"]  # f32 weights, so both are the same numbers
    assert rows[-1]["theta"] == found["fingerprint"]
    assert (run / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_the_model_loads_and_is_theta(run):
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert f"{es_kernels.fingerprint(dict(model.named_parameters())):016x}" == summary(run)["fingerprint"]
    assert tokenizer.padding_side == "left" and tokenizer("^3,4,7=14:")["input_ids"]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_one_seed_one_fingerprint(run, tmp_path):
    assert train(tmp_path / "again") == 0
    assert summary(tmp_path / "again")["fingerprint"] == summary(run)["fingerprint"]
    assert train(tmp_path / "other", "--seed", "1") == 0
    assert summary(tmp_path / "other")["fingerprint"] != summary(run)["fingerprint"]


def test_the_same_run_may_be_done_again_and_another_only_by_overwrite(run, capsys):
    before = summary(run)
    assert train(run) == 0
    assert summary(run)["fingerprint"] == before["fingerprint"]
    assert train(run, "--seed", "5") == 2
    assert "holds a run of another config" in capsys.readouterr().err
    assert summary(run)["fingerprint"] == before["fingerprint"]
    assert train(run, "--seed", "5", "--overwrite") == 0
    assert summary(run)["fingerprint"] != before["fingerprint"]
    assert train(run, "--overwrite") == 0  # as the other tests found it


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert train(tmp_path, "--overwrite") == 2
    assert "no run of es_finetune" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert train(tmp_path / "thesis.tex") == 2
    assert "is a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--sigma", "0"], "sigma must be"),
        (["--sigma", "-1"], "sigma must be"),
        (["--population", "1"], "population must be"),
        (["--population", "5", "--antithetic"], "even"),
        (["--generations", "0"], "generations must be"),
        (["--task", "sudoku"], "unknown task 'sudoku'"),
        (["--task", "countdown"], "needs a model"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--base", "fp8"], "base must be"),
        (["--prompts", "100000"], "prompts must be at most"),
        (["--device", "abacus"], "abacus"),
        (["--no_such_flag", "1"], "no_such_flag"),
    ],
    ids=str,
)
def test_a_bad_config_is_one_clear_line_and_exit_code_2(tmp_path, capsys, flags, words):
    assert train(tmp_path / "run", *flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and words in lines[-1]
    assert not (tmp_path / "run").exists()


def test_commands(capsys):
    assert main(["--help"]) == 0 and "train" in capsys.readouterr().out
    assert main([]) == 2 and main(["fly"]) == 2
    assert "unknown command 'fly'" in capsys.readouterr().err


def test_progress_in_a_pipe_is_plain_lines(tmp_path, capsys):
    assert train(tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\r" not in out
    assert "generation 1/2  reward 0." in out and "generation 2/2" in out and "kernels" in out and "%" in out


@pytest.mark.parametrize("base", ["fp32", "copy", "none"])
def test_a_bf16_model_stays_bf16(tmp_path, base):
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(tmp_path / "bf16")
    assert train(tmp_path / "run", "--model", str(tmp_path / "bf16"), "--sigma", "0.01", "--lr", "0.01", "--base", base) == 0
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype="auto")
    assert tuned.dtype == torch.bfloat16
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert f"{es_kernels.fingerprint(dict(tuned.named_parameters())):016x}" == rows[-1]["live"]
    assert (rows[-1]["live"] == rows[-1]["theta"]) == (base != "fp32")


def test_countdown_runs_on_a_model_given_by_path(tmp_path):
    flags = ["--model", str(EMBEDDED_MODEL), "--task", "countdown", "--prompts", "2", "--eval_items", "2", "--max_new_tokens", "4"]
    assert train(tmp_path / "run", *flags) == 0
    assert summary(tmp_path / "run")["final_exact"] == 0


def test_without_flags_the_papers_run_is_meant():
    config = TrainConfig(output="x", task="countdown", model="some/model")
    assert (config.sigma, config.lr, config.population, config.generations, config.prompts) == (1e-3, 5e-4, 30, 500, 0)


def test_names_are_those_of_the_checkpoint(tiny_llama):
    plain = [name for name, _ in tiny_llama.named_parameters()]
    wrapped = torch.nn.Module()
    wrapped.module = torch.nn.Module()
    wrapped.module._orig_mod = tiny_llama
    assert [name for name, _ in named_segments(wrapped)] == plain
