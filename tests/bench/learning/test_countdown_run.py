"""Contract: the learning run's base model practises on questions that the task neither trains nor tests with, and on
answers that the task's own scorer judges as meant; the run is stopped, finished, replayed and reported by the command
line; a decoding that fails or hangs leaves the next one."""

import contextlib
import io
import json
import logging
import random
import re
import signal
import subprocess
import sys

import pytest
import torch

from bench import ROOT
from bench.learning import countdown_model, countdown_run
from bench.publish import tables
from es_finetune import cli
from es_finetune.tasks import Item
from es_finetune.tasks.countdown import Countdown


@pytest.fixture(scope="module")
def examples():
    draws, known = random.Random(1), countdown_model.held_out()
    return [countdown_model.example(draws, known) for _ in range(400)]


def question(prompt):
    numbers = tuple(sorted(map(int, re.search(r"\[(.*?)\]", prompt)[1].split())))
    return numbers, int(re.search(r"equals (\d+)", prompt)[1])


def test_examples_are_new_questions_with_right_answers_in_one_of_two_styles(examples):
    task, known, plain = Countdown(), countdown_model.held_out(), 0
    assert len(known) == len(task.train) + len(task.test)
    for prompt, completion in examples:
        key = question(prompt)
        score = task.score(Item(prompt, key), completion.removesuffix(countdown_model.END))
        assert key not in known
        assert score.reward == pytest.approx(1.1 if "<answer>" in completion else 0.01)
        plain += "<answer>" in completion
    assert 0.35 < plain / len(examples) < 0.65


def test_every_step_of_a_thought_is_true(examples):
    for _, completion in examples:
        steps = re.findall(r"(-?\d+)([-+*/])(-?\d+)=(-?\d+)", completion.partition("</think>")[0])
        assert steps
        for a, sign, b, c in steps:
            a, b, c = int(a), int(b), int(c)
            assert c == {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[sign]


def test_a_text_is_its_tokens_and_fits(examples):
    tokenizer = countdown_model.make_tokenizer()
    for prompt, completion in examples:
        ids = tokenizer(prompt + completion)["input_ids"]
        assert tokenizer.decode(ids) == prompt + completion and tokenizer.unk_token_id not in ids
        assert len(tokenizer(completion)["input_ids"]) <= countdown_model.MAX_NEW_TOKENS


def test_a_batch_learns_completions_only():
    ids, labels = next(iter(countdown_model.Examples(countdown_model.make_tokenizer(), 8)))
    learnt = labels != -100
    assert ids.shape == labels.shape and (labels[learnt] == ids[learnt]).all()
    tokenizer = countdown_model.make_tokenizer()
    for row, mask in zip(ids, learnt, strict=True):
        prompt = Countdown().train[0].prompt
        assert tokenizer.decode(row[mask]).endswith(
            countdown_model.END
        ) and "helpful assistant" not in tokenizer.decode(row[mask])
        assert tokenizer.decode(row).startswith(prompt[:50])


@pytest.mark.parametrize("failing", ["at once", "by hanging"])
def test_the_next_decoding_serves_where_one_makes_no_generation(tmp_path, monkeypatch, failing):
    made, calls = {"n": 0}, []

    def es_finetune(*arguments, stop=lambda: False):
        calls.append(arguments)
        if "static" in arguments:
            while failing == "by hanging" and not stop():
                pass
            return 1, "it broke"
        made["n"] = 7
        return 0, "done"

    monkeypatch.setattr(countdown_run, "es_finetune", es_finetune)
    monkeypatch.setattr(countdown_run, "generations", lambda run: made["n"])
    monkeypatch.setattr(countdown_run, "TO_COMPILE", 0.2)
    decoding, command = countdown_run.trained(tmp_path / "run", ["--sigma", 0.01], ["static", "dynamic"], 60)
    assert decoding == "dynamic" and command[-2:] == ["--decoding", "dynamic"]
    assert calls[-1][:2] == ("train", "--resume") and calls[-1][-2:] == ("--generations", 7)
    made["n"] = 0
    with pytest.raises(SystemExit, match="no generation was made: it broke"):
        countdown_run.trained(tmp_path / "run", [], ["static"], 1)


def test_a_run_is_not_stopped_before_its_second_generation(tmp_path, monkeypatch):
    """However late it starts, on a machine that is busy; one stopped while it starts prints nothing."""
    made, asked = {"n": 0}, []

    def es_finetune(*arguments, stop=lambda: False):
        while arguments[1] != "--resume" and not stop():
            asked.append(made["n"])
            made["n"] += len(asked) % 5 == 0
        return 130, ""

    monkeypatch.setattr(countdown_run, "es_finetune", es_finetune)
    monkeypatch.setattr(countdown_run, "generations", lambda run: made["n"])
    with pytest.raises(SystemExit, match="the run could not be finished: exit code 130"):
        countdown_run.trained(tmp_path / "run", [], ["dynamic"], seconds=0)
    assert made["n"] == countdown_run.LEAST and set(asked) == {0, 1}


def test_a_log_that_is_not_begun_holds_no_generation(tmp_path):
    """It is asked of while a run starts, which makes the file before it writes the first line."""
    assert countdown_run.generations(tmp_path) == 0
    (tmp_path / "run.log").touch()
    assert countdown_run.generations(tmp_path) == 0


@pytest.mark.parametrize("deaf", [False, True])
def test_a_command_is_stopped_also_where_the_shell_ignores_interrupts(tmp_path, monkeypatch, deaf):
    begun = tmp_path / "begun"
    lines = ["import pathlib, signal, sys, time", f"pathlib.Path({str(begun)!r}).touch()", "time.sleep(60)"]
    if deaf:
        lines.insert(1, "signal.signal(signal.SIGINT, signal.SIG_IGN)")
    program = "; ".join(["print('begun', flush=True)", *lines])
    popen = subprocess.Popen
    monkeypatch.setattr(
        countdown_run.subprocess, "Popen", lambda command, **options: popen([sys.executable, "-c", program], **options)
    )
    monkeypatch.setattr(countdown_run, "TO_LOOK", 0.05)
    monkeypatch.setattr(countdown_run, "TO_STOP", 0.5)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code, text = countdown_run.es_finetune("train", stop=begun.exists)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == (-signal.SIGKILL if deaf else -signal.SIGINT) and text.startswith("begun")


def test_a_whole_run(tmp_path, monkeypatch, caplog):
    """Of its commands only the one that is stopped is a process here: each would import torch and transformers."""
    process = countdown_run.es_finetune

    def es_finetune(*arguments, **options):
        if "stop" in options:
            return process(*arguments, **options)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code = cli.main([*map(str, arguments)])
        return code, printed.getvalue()

    monkeypatch.setattr(countdown_run, "es_finetune", es_finetune)
    monkeypatch.setattr(countdown_run, "pretrain", lambda *flags: countdown_model.main([*map(str, flags)]))
    monkeypatch.setattr(countdown_run, "TO_LOOK", 0.2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'python'}")
    caplog.set_level(logging.INFO, "es_finetune")  # which main sets, too: it is set back
    flags = ["--seconds", "4", "--sigma", "0.01", "--model", "hidden=32", "layers=1", "heads=2", "batch=16"]
    flags += ["--train", "population=2", "eval_items=10", "prompts=4", "threads=1", "device=cpu"]
    monkeypatch.setattr(sys, "argv", ["countdown_run.py", "--out", str(tmp_path), *flags])
    with pytest.raises(SystemExit, match="^False$"):
        countdown_run.main()
    report = json.loads((tmp_path / "countdown-cpu.json").read_text())
    assert report["replays_equal_the_run"] and report["replays"]["cpu"]["theta"] == report["summary"]["fingerprint"]
    assert report["summary"]["generations"] >= 1 and 0 < report["shares"]["generate"] < 1
    assert {p.name for p in (tmp_path / "countdown-cpu").iterdir()} == set(countdown_run.KEPT)
    assert (tmp_path / "work/run/report.html").exists()
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert f"| {report['summary']['generations']} |" in tables.learning_runs()
