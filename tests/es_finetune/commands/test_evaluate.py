"""Contract under test: `es-finetune eval`.

The accuracy of a run's base and tuned weights is what the run itself measured, and that of a saved folder is that of
the run it came from; the answers are saved; several samples are drawn at temperature 1 from the seed; the divergence of
a model from itself is 0 and of a tuned one is not; bad input is one line.
"""

import json

import pytest

from es_finetune import TrainConfig, Trainer
from es_finetune.cli import main
from es_finetune.runs.files import read_rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = {"generations": 3, "population": 4, "prompts": 32, "lr": 0.03, "eval_every": 1, "report_to": ["none"]}
    Trainer(TrainConfig(output=str(folder), **options)).train()
    return folder


def evaluate(capsys, *flags):
    assert main(["eval", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_runs_weights_are_measured_as_the_run_did(run, capsys):
    for row in read_rows(run / "evals.jsonl"):
        result = evaluate(capsys, "--run", str(run), "--generation", str(row["generation"]))
        assert (result["value"], result["interval_95"], result["questions"]) == (
            row["exact"],
            [row["low"], row["high"]],
            269,
        )
        assert result["generation"] == row["generation"] and result["decoding"] == "greedy"
        assert json.loads((run / f"eval-{row['generation']}" / "result.json").read_text())["value"] == row["exact"]
    last = evaluate(capsys, "--run", str(run))
    assert last["generation"] == 3
    rows = read_rows(run / "eval-3" / "answers.jsonl")
    assert len(rows) == 269 and sum(row["exact"] for row in rows) / 269 == last["value"]


def test_a_saved_folder_is_measured_like_its_run(run, capsys, tmp_path):
    flags = [
        "--model",
        str(run / "model"),
        "--task",
        "countdown-char",
        "--batch_size",
        "128",
        "--threads",
        "1",
        "--output",
        str(tmp_path / "out"),
    ]
    assert evaluate(capsys, *flags)["value"] == read_rows(run / "evals.jsonl")[-1]["exact"]
    train = evaluate(capsys, *flags, "--split", "train", "--items", "50")
    assert train["questions"] == 50 and train["split"] == "train"


def test_samples_are_drawn_from_the_seed(run, capsys):
    flags = ["--run", str(run), "--items", "20", "--samples", "4"]
    first, again, other = (evaluate(capsys, *flags, "--seed", seed) for seed in "001")
    assert first["decoding"].startswith("temperature 1") and len(read_rows(run / "eval-3" / "answers.jsonl")) == 80
    assert (
        first["value"] == again["value"]
        and first["tokens"] == again["tokens"]
        and (first["value"], first["tokens"]) != (other["value"], other["tokens"])
    )


def test_the_divergence_from_the_base_model(run, capsys):
    flags = ["--run", str(run), "--items", "40", "--kl"]
    base, tuned = (evaluate(capsys, *flags, "--generation", generation) for generation in "03")
    assert base["kl"] == 0 and tuned["kl"] > 3 * tuned["kl_standard_error"] > 0
    assert tuned["kl_tokens"] == tuned["tokens"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--generation", "1"], "goes with --run"),
        (["--kl"], "give --kl_model, or --run"),
        (["--samples", "0"], "samples must be at least 1"),
        (["--split", "all"], "split must be"),
        (["--task", "countdown"], "needs a model"),
        (["--run", "/nowhere"], "cannot be read"),
        (["--model", "/nowhere", "--task", "countdown"], "/nowhere"),
    ],
)
def test_bad_input_is_one_line(flags, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0] and not list(tmp_path.iterdir())


def test_a_generation_the_run_does_not_have(run, capsys):
    for generation, words in (("4", "has 3 generations, not 4"), ("-1", "generation must be at least 0, not -1")):
        assert main(["eval", "--run", str(run), "--generation", generation]) == 2
        assert words in capsys.readouterr().err


def test_messages_do_not_mix_with_the_json(run, capsys, monkeypatch):
    monkeypatch.setattr("es_finetune.commands.replay.SECONDS_BETWEEN_MESSAGES", 0.0)
    assert main(["eval", "--run", str(run), "--items", "1"]) == 0
    out, error = capsys.readouterr()
    assert json.loads(out)["questions"] == 1 and "3 generations made again" in error
