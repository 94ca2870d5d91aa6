"""Contract under test: a run that was killed goes on as if it had not been.

After kill -9 at any moment `resume` ends with the fingerprint of a run never interrupted, for every master; what was
scored before the kill is never scored again. A callback may stop a run, or fail, and the run goes on in the same way.
A snapshot shortens the way and changes no bit. A log, model, task or config of another run is refused by name, with
nothing changed, and the constructor of a Trainer never changes anything. A disk that fills up ends the run with what
was written intact.
"""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import es_kernels
from es_finetune import Callback, TrainConfig, Trainer
from es_finetune.commands.report import report
from es_finetune.models.load import EMBEDDED_MODEL
from es_finetune.runs.files import read_rows
from es_finetune.runs.folder import ASIDE
from es_finetune.runs.log import SealedLines, read_log
from es_finetune.runs.replay import rebuild
from es_finetune.tasks.countdown_char import CountdownChar
from es_finetune.workers.worker import Worker

OPTIONS = {
    "generations": 5,
    "population": 4,
    "prompts": 24,
    "eval_items": 24,
    "eval_every": 2,
    "report_to": ["none"],
    "health_every": 2,
}


class Counted(CountdownChar):
    """Writes down every answer that it scores."""

    def __init__(self, path):
        super().__init__()
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def score(self, item, completion):
        os.write(self.file, b".")
        return super().score(item, completion)


def run(folder, resume=False, **options):
    trainer = Trainer(
        TrainConfig(output=str(folder), resume=resume, **{**OPTIONS, **options}), task=Counted(f"{folder}.scored")
    )
    return trainer.train()


def child(folder, resume, options):
    torch.set_num_threads(1)
    run(folder, resume, **options)


@pytest.fixture(scope="module")
def server():
    """Starts processes that have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers", "es_finetune.trainer", "transformers.models.llama.modeling_llama"])
    return context


CONFIGS = [
    {},
    {"dtype": "bfloat16", "master": "copy", "perturb_rounding": "stochastic", "snapshot_every": 1},
    {"dtype": "bfloat16", "master": "none", "noise_rank": 1, "members_at_once": 1},
    {
        "dtype": "bfloat16",
        "momentum": 0.5,
        "antithetic": True,
        "weight_decay": 0.1,
        "anchored": True,
        "noise_rank": 2,
        "snapshot_every": 2,
        "sigma_schedule": "cosine",
    },
    {"shaping": "per_prompt", "lr_schedule": "linear", "sigma_for": ["*norm*=0.02"]},
    {"noise_rank": 1, "members_at_once": 3, "master": "none", "antithetic": True},
    {"prompts": 12, "temperature": 0.7, "samples": 2, "objective": "best"},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_killed_at_random_moments_it_ends_as_if_never_interrupted(server, tmp_path, config):
    whole = run(tmp_path / "whole", **config)
    folder, kills, moments = tmp_path / "killed", 0, random.Random(str(config))

    def begun():
        return (folder / "run.log").exists() and (folder / "run.log").stat().st_size > 0

    def scored():
        return os.path.getsize(f"{folder}.scored") if os.path.exists(f"{folder}.scored") else 0

    while True:
        process = server.Process(target=child, args=(folder, begun(), config))
        process.start()
        enough = scored() + moments.randint(1, 150)
        while process.exitcode is None and scored() < enough:
            process.join(0.001)
        process.join(moments.uniform(0, 0.02))
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    assert process.exitcode == 0 and kills >= 3
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["fingerprint"] == whole["fingerprint"] and summary["live"] == whole["live"]
    assert read_log(folder / "run.log")[1] == read_log(tmp_path / "whole" / "run.log")[1]
    assert [row["generation"] for row in read_rows(folder / "metrics.jsonl")] == list(range(5))
    assert [row["generation"] for row in read_rows(folder / "evals.jsonl")] == [0, 2, 4, 5]
    # A kill costs at most what was being answered: one member or one eval.
    once = os.path.getsize(f"{tmp_path}/whole.scored")
    assert once <= scored() <= once + kills * 24


def stop_at(monkeypatch, generation, member):
    """The run breaks off where this member has been scored."""
    real = SealedLines.append

    def append(self, line):
        real(self, line)
        if line.get("generation") == generation and line.get("member", None) == member:
            raise KeyboardInterrupt

    monkeypatch.setattr(SealedLines, "append", append)


@pytest.fixture(scope="module")
def run_interrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2, 1)
        trainer = Trainer(TrainConfig(output=str(folder), **OPTIONS), task=Counted(f"{folder}.scored"))
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    return folder


@pytest.fixture
def interrupted(run_interrupted, tmp_path):
    """A run that was interrupted in its third generation, after two members."""
    return shutil.copytree(run_interrupted, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The summary of the run that was never interrupted."""
    return run(tmp_path_factory.mktemp("whole") / "run")


def test_scores_in_the_journal_are_used_and_not_computed_again(interrupted):
    """Proven by a journal in which a score was changed: the run takes it."""
    lines = [json.loads(line) for line in (interrupted / "journal").read_text().splitlines()]
    assert [(line["generation"], line["member"]) for line in lines] == [(2, 0), (2, 1)]
    (interrupted / "journal").unlink()
    journal = SealedLines(interrupted / "journal")
    for line in lines:
        line.pop("crc")
        journal.append({**line, "rewards": [5.0 + line["member"]] * 24})
    journal.close()
    run(interrupted, resume=True)
    assert read_rows(interrupted / "metrics.jsonl")[2]["reward_max"] == 6.0


def test_a_run_on_log_probabilities_goes_on_too(tmp_path, monkeypatch):
    data = [{"prompt": f"^{a},{b}:", "answer": f"{a}+{b}"} for a in range(9) for b in range(4)]

    def trainer(folder, **options):
        config = {"model": "embedded", "task": "custom", "max_new_tokens": 6, **OPTIONS, "generations": 3, **options}
        config = TrainConfig(output=str(folder), **config)
        return Trainer(config, data=data, reward="logprob")

    whole = trainer(tmp_path / "whole").train()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 1, 2)
        trainer(tmp_path / "run").train()
    kept = [json.loads(line)["rewards"] for line in (tmp_path / "run" / "journal").read_text().splitlines()]
    assert [len(rewards) for rewards in kept] == [24] * 3 and len(set(map(str, kept))) == 3
    for options, words in (
        ({"logprob_per_token": True}, "logprob_per_token"),
        ({"reward": right}, "the reward .* is not the one that the run .* began with"),
        ({"data": [row | {"answer": "7"} for row in data]}, "what the train items .* give the reward"),
    ):
        with pytest.raises(ValueError, match=words):
            Trainer.resume(tmp_path / "run", **{"data": data, **options})
    again = Trainer.resume(tmp_path / "run", data=data).train()
    assert (again["fingerprint"], again["final"]) == (whole["fingerprint"], whole["final"])
    assert read_log(tmp_path / "run" / "run.log") == read_log(tmp_path / "whole" / "run.log")
    rebuilt = rebuild(tmp_path / "run")
    assert f"{rebuilt.optimizer.fingerprint('theta'):016x}" == whole["fingerprint"]


def right(completion, item):
    return float(completion == item["answer"])


def test_a_snapshot_changes_no_bit_and_a_damaged_one_is_refused(tmp_path):
    whole = run(tmp_path / "run", snapshot_every=2)
    assert [path.name for path in (tmp_path / "run" / "snapshots").iterdir()] == ["theta-000004.safetensors"]
    trainer = Trainer(TrainConfig(output=str(tmp_path / "run"), resume=True, **OPTIONS))
    assert f"{trainer.workers.weights.optimizer.fingerprint():016x}" == whole["fingerprint"]
    trainer.close()
    snapshot = tmp_path / "run" / "snapshots" / "theta-000004.safetensors"
    data = bytearray(snapshot.read_bytes())
    data[-1] ^= 1
    snapshot.write_bytes(data)
    with pytest.raises(ValueError, match="theta-000004.safetensors is damaged"):
        Trainer(TrainConfig(output=str(tmp_path / "run"), resume=True, **OPTIONS))


def test_a_finished_run_can_be_extended(tmp_path):
    whole = run(tmp_path / "whole", generations=4)
    run(tmp_path / "parts", generations=2)
    parts = run(tmp_path / "parts", resume=True, generations=4)
    assert parts["fingerprint"] == whole["fingerprint"] and parts["generations"] == 4


def test_an_extended_run_that_was_interrupted_goes_on_to_the_end_it_was_given(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    run(folder, generations=2)
    with monkeypatch.context() as patch:
        stop_at(patch, 2, None)
        with pytest.raises(KeyboardInterrupt):
            run(folder, resume=True, generations=4)
    (folder / "config.json").unlink()  # which is for people
    trainer = Trainer.resume(folder, task=CountdownChar())
    assert (trainer.generation, trainer.config.generations) == (3, 4)
    assert trainer.train()["generations"] == 4
    assert sum("generations" in line for line in map(json.loads, (folder / "run.log").read_text().splitlines())) == 1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"sigma": 0.02}, "begun with sigma 0.01, not 0.02"),
        ({"population": 6}, "begun with population 4, not 6"),
        ({"seed": 7}, "begun with seed 0, not 7"),
        ({"task": "countdown"}, "begun with task 'countdown-char', not 'countdown'"),
        ({"on_reward_error": "stop", "shaping": "ranks"}, "begun with shaping 'zscore', not 'ranks'"),
        ({"generations": 9, "lr_schedule": "linear"}, "begun with generations 5|begun with lr_schedule"),
        ({"generations": 1}, "begun with generations 5, not 1"),
    ],
    ids=str,
)
def test_another_config_is_refused_by_name(interrupted, options, words):
    before = {path: path.read_bytes() for path in interrupted.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=words):
        Trainer(TrainConfig(output=str(interrupted), resume=True, **{**OPTIONS, "model": "embedded", **options}))
    assert {path: path.read_bytes() for path in interrupted.iterdir() if path.is_file()} == before


def test_another_model_and_other_items_are_refused(interrupted, build_model):
    other, tokenizer = (
        build_model("llama"),
        Trainer(TrainConfig(output=f"{interrupted}-x")).workers.replica.engine.tokenizer,
    )
    with pytest.raises(ValueError, match="is not the one the run began with"):
        Trainer(TrainConfig(output=str(interrupted), resume=True, **OPTIONS), model=other, tokenizer=tokenizer)
    task = CountdownChar()
    task.train = task.train[1:]
    with pytest.raises(ValueError, match="train items of task countdown-char are not those"):
        Trainer(TrainConfig(output=str(interrupted), resume=True, **OPTIONS), task=task)


def test_other_code_that_scores_is_refused(interrupted):
    class Other(CountdownChar):
        code_digest = "0123456789abcdef"

    before = contents(interrupted)
    with pytest.raises(ValueError, match="the reward given is not the one that the run in .* began with"):
        Trainer(TrainConfig(output=str(interrupted), resume=True, **OPTIONS), task=Other())
    assert contents(interrupted) == before


def test_a_moved_model_is_the_same_model(interrupted, tmp_path):
    shutil.copytree(EMBEDDED_MODEL, tmp_path / "copy")
    config = TrainConfig(
        output=str(interrupted),
        resume=True,
        **{
            **OPTIONS,
            "model": str(tmp_path / "copy"),
            "task": "countdown-char",
            "sigma": 0.01,
            "lr": 0.01,
            "batch_size": 128,
            "threads": 1,
        },
    )
    assert Trainer(config, task=CountdownChar()).generation == 2
    moved = Trainer.resume(interrupted, model=tmp_path / "copy")
    assert (moved.generation, moved.config.model) == (2, str(tmp_path / "copy"))


def test_the_log_alone_is_enough_to_go_on(interrupted, whole):
    for name in ("metrics.jsonl", "evals.jsonl", "config.json", "journal"):
        (interrupted / name).unlink()
    resumed = run(interrupted, resume=True)
    assert (resumed["fingerprint"], resumed["generations"], resumed["base"]) == (whole["fingerprint"], 5, None)
    assert report(interrupted).exists()
    (interrupted / "metrics.jsonl").unlink()
    assert run(interrupted, resume=True)["share_outside"] is None  # of a run that is finished


def test_time_of_members_scored_before_is_counted(interrupted):
    run(interrupted, resume=True)
    assert all(
        0 <= row["share_outside"] < 0.9 and row["seconds"] >= row["seconds_generate"]
        for row in read_rows(interrupted / "metrics.jsonl")
    )


def test_a_journal_damaged_by_a_power_failure_costs_its_scores_only(interrupted, whole):
    data = bytearray((interrupted / "journal").read_bytes())
    data[10] ^= 1
    (interrupted / "journal").write_bytes(data)
    assert run(interrupted, resume=True)["fingerprint"] == whole["fingerprint"]


@pytest.mark.parametrize("log", [b"", b'{"run": 2, "no'])
def test_a_folder_whose_log_was_never_begun_is_free(tmp_path, log):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.log").write_bytes(log)
    (tmp_path / "run" / "journal").write_text("{}")
    with pytest.raises(ValueError, match="holds no run to resume"):
        run(tmp_path / "run", resume=True)
    assert run(tmp_path / "run")["generations"] == 5


def test_a_tracker_that_refuses_leaves_the_old_run_as_it_was(interrupted, monkeypatch):
    class Refusing:
        def init(self, **options):
            raise RuntimeError("no login")

    (interrupted / "tensorboard").mkdir()
    (interrupted / "tensorboard" / "events").write_text("curves")
    before = {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    monkeypatch.setitem(sys.modules, "wandb", Refusing())
    with pytest.raises(ValueError, match="wandb could not be started: .*no login"):
        run(interrupted, overwrite=True, report_to=["wandb"])
    assert {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()} == before
    run(interrupted, resume=True)


@pytest.mark.parametrize("options", [{"overwrite": True}, {"resume": True}], ids=str)
def test_a_kill_while_trackers_start_leaves_the_curves_of_the_older_run(interrupted, options):
    """What it leaves: the older curves aside, and others in their place."""
    for name in ("tensorboard", f"tensorboard{ASIDE}"):
        (interrupted / name).mkdir()
        (interrupted / name / "events").write_text(name)

    class Killed(Callback):
        def on_end(self, trainer, summary):
            if trainer.config.overwrite:
                assert not (trainer.folder / "tensorboard").exists()
            else:
                assert (trainer.folder / "tensorboard" / "events").read_text() == f"tensorboard{ASIDE}"

    Trainer(TrainConfig(output=str(interrupted), **options, **OPTIONS), callbacks=[Killed()]).train()
    assert not list(interrupted.glob(f"*{ASIDE}"))


def test_a_truncated_snapshot_is_refused_too(tmp_path):
    run(tmp_path / "run", snapshot_every=2, generations=2)
    snapshot = tmp_path / "run" / "snapshots" / "theta-000002.safetensors"
    snapshot.write_bytes(snapshot.read_bytes()[:1000])
    with pytest.raises(ValueError, match="theta-000002.safetensors is damaged: remove it, and the log serves"):
        run(tmp_path / "run", resume=True, generations=3)
    snapshot.unlink()
    assert run(tmp_path / "run", resume=True, generations=3)["generations"] == 3


def test_a_row_without_generation_is_one_line_with_nothing_changed(interrupted):
    with open(interrupted / "evals.jsonl", "a") as file:
        file.write('{"reward": 1.0}\n')
    before = contents(interrupted)
    with pytest.raises(ValueError, match="evals.jsonl is damaged in row 3: it does not say of which generation it is"):
        run(interrupted, resume=True)
    with pytest.raises(ValueError, match="evals.jsonl is damaged in row 3"):
        report(interrupted)
    assert contents(interrupted) == before


def test_a_snapshot_of_another_name_is_one_line_and_is_never_removed(tmp_path):
    run(tmp_path / "run", snapshot_every=1, generations=2)
    (snapshot,) = (tmp_path / "run" / "snapshots").iterdir()
    best = snapshot.rename(snapshot.with_name("theta-best.safetensors"))
    with pytest.raises(
        ValueError,
        match="theta-best.safetensors does not say of which generation it is, as theta-000100.safetensors does",
    ):
        run(tmp_path / "run", resume=True, generations=3)
    kept = best.rename(best.with_name("best.safetensors"))
    run(tmp_path / "run", resume=True, snapshot_every=1, generations=3)
    assert kept.exists()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_overwrite_removes_nothing_before_the_new_run_is_proven(interrupted, monkeypatch):
    """What its first line would hold, and what its workers say of themselves, which a pool's do only when they are
    asked."""
    before = contents(interrupted)
    for bad, words in (
        (np.int64(3), "can only hold JSON"),
        (float("nan"), "can only hold JSON"),
        (ValueError("no such model"), "no such model"),
    ):
        with monkeypatch.context() as patch:
            answer = raised if isinstance(bad, Exception) else lambda bad: {"odd": bad}
            patch.setattr(Worker, "start", lambda self, bad=bad, answer=answer: answer(bad))
            with pytest.raises(ValueError, match=words):
                run(interrupted, overwrite=True)
            assert contents(interrupted) == before
            with pytest.raises(ValueError, match=words):
                run(interrupted.parent / "new")
    assert isinstance(bad, Exception) and not list((interrupted.parent / "new").glob("*.json*"))
    run(interrupted, resume=True)


def raised(error):
    raise error


def test_a_folder_is_never_taken_by_accident(interrupted, tmp_path):
    with pytest.raises(ValueError, match="holds a run: --resume continues it, --overwrite replaces it"):
        run(interrupted)
    with pytest.raises(ValueError, match="holds no run to resume"):
        run(tmp_path / "new", resume=True)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("years of work")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(ValueError, match="holds thesis.tex, which is no part of a run"):
            run(tmp_path / "work", **options)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["thesis.tex"]
    for name in ("model", "eval-0", "wandb"):  # names that a run uses, in a folder that is none
        (tmp_path / name / name).mkdir(parents=True)
        with pytest.raises(ValueError, match=f"holds {name}, which is no part of a run"):
            run(tmp_path / name, overwrite=True)
        assert (tmp_path / name / name).exists()
    shutil.copytree(EMBEDDED_MODEL, interrupted / "model")
    with pytest.raises(ValueError, match="--overwrite would remove .*model, which the run needs"):
        run(interrupted, overwrite=True, model=str(interrupted / "model"), task="countdown-char")
    assert (interrupted / "model" / "config.json").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        run(tmp_path / "file")


def test_overwrite_leaves_nothing_of_the_run_before(interrupted, tmp_path):
    (interrupted / "notes.txt").write_text("mine")
    (interrupted / "eval-2").mkdir()
    replaced = run(interrupted, overwrite=True)
    assert replaced["fingerprint"] == run(tmp_path / "fresh")["fingerprint"]
    assert {path.name for path in interrupted.iterdir()} - {path.name for path in (tmp_path / "fresh").iterdir()} == {
        "notes.txt"
    }
    run(interrupted, resume=True)  # and the log does not remember how it was begun


def test_two_processes_do_not_write_one_run(interrupted):
    """Neither at the same time, nor one from where the other has gone on meanwhile."""
    first, second = Trainer.resume(interrupted), Trainer.resume(interrupted)

    class Second(Callback):
        def on_generation(self, trainer, row):
            if row["generation"] == 2:
                with pytest.raises(ValueError, match="written by another process"):
                    second.train()

    first.callbacks.append(Second())
    third = Trainer.resume(interrupted)
    first.train()
    with pytest.raises(ValueError, match="another process has gone on with the run in .* meanwhile"):
        third.train()


@pytest.mark.parametrize("options", [{"overwrite": True}, {"resume": True}], ids=str)
def test_a_trainer_that_does_not_train_changes_nothing(interrupted, options):
    before = contents(interrupted)
    trainer = Trainer(TrainConfig(output=str(interrupted), **options, **OPTIONS), callbacks=[Callback()])
    trainer.close()
    assert contents(interrupted) == before
    folder = interrupted.parent / "new"
    Trainer(TrainConfig(output=str(folder), **OPTIONS)).close()
    assert not folder.exists()


def test_resume_needs_the_folder_alone(interrupted, whole):
    trainer = Trainer.resume(interrupted, batch_size=16, report_to=[])
    assert (trainer.generation, trainer.config.batch_size, trainer.config.population) == (2, 16, 4)
    assert trainer.train()["fingerprint"] == whole["fingerprint"]


def test_resume_refuses_what_would_make_it_another_run(interrupted, tmp_path):
    before = contents(interrupted)
    for changes, words in (
        ({"sigma": 0.02}, "begun with sigma 0.01, not 0.02"),
        ({"sigmas": 0.02}, "unknown option 'sigmas': did you mean sigma?"),
        ({"output": "elsewhere"}, "output is no option of a run that is resumed in its own folder"),
        ({"data": [{"prompt": "^1:"}]}, "data is for the task 'custom', and the config's task is 'countdown-char'"),
    ):
        with pytest.raises(ValueError, match=words):
            Trainer.resume(interrupted, **changes)
    with pytest.raises(ValueError, match="holds no run to resume: give the folder of a run"):
        Trainer.resume(tmp_path / "nowhere")
    assert contents(interrupted) == before and not (tmp_path / "nowhere").exists()


class Watcher(Callback):
    """Writes down what it is told; stops the run, or fails, at a hook."""

    def __init__(self, stop_at=None, fail_at=None):
        self.calls, self.stop_at, self.fail_at = [], stop_at, fail_at

    def told(self, trainer, *what):
        self.calls.append(what)
        if what == self.stop_at:
            trainer.stop()
        if what == self.fail_at:
            raise RuntimeError("the watcher fell")

    def on_start(self, trainer):
        self.told(trainer, "start", trainer.generation)

    def on_generation(self, trainer, row):
        assert trainer.rows[-1] is row and trainer.generation == row["generation"] + 1
        self.told(trainer, "generation", row["generation"])

    def on_eval(self, trainer, row):
        self.told(trainer, "eval", row["generation"])

    def on_end(self, trainer, summary):
        self.told(trainer, "end", summary and summary["generations"])


def watched(folder, watcher, resume=False, callbacks=()):
    config = TrainConfig(output=str(folder), resume=resume, **OPTIONS)
    return Trainer(config, callbacks=[watcher, *callbacks]).train()


def test_callbacks_are_told_what_happens_when_it_has(tmp_path):
    watcher = Watcher()
    watched(tmp_path / "run", watcher)
    told = ", ".join(f"{hook} {number}" for hook, number in watcher.calls)
    assert told == (
        "start 0, eval 0, generation 0, generation 1, eval 2, generation 2, generation 3, eval 4, generation 4, "
        "eval 5, end 5"
    )


def test_a_callback_stops_a_run_that_then_goes_on_as_if_it_had_not(whole, tmp_path):
    watcher = Watcher(stop_at=("generation", 2))
    summary = watched(tmp_path / "run", watcher)
    assert watcher.calls[-3:] == [("generation", 2), ("eval", 3), ("end", 3)]
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text()) and summary["generations"] == 3
    tuned = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert f"{es_kernels.fingerprint(tuned):016x}" == summary["live"]
    watcher = Watcher()
    assert watched(tmp_path / "run", watcher, resume=True)["fingerprint"] == whole["fingerprint"]
    assert watcher.calls[:2] == [("start", 3), ("generation", 3)]
    for hook in ("generation", 3), ("eval", 4):  # an eval begins no generation that would be in progress
        watcher = Watcher(stop_at=hook)
        assert watched(tmp_path / f"{hook}", watcher)["generations"] == 4
        assert watcher.calls[-3:] == [("generation", 3), ("eval", 4), ("end", 4)]
    at_once = watched(tmp_path / "none", Watcher(stop_at=("start", 0)))
    assert (at_once["generations"], at_once["base"]) == (0, at_once["final"])


@pytest.mark.parametrize("options", [{}, {"overwrite": True}], ids=str)
def test_a_trainer_trains_once(tmp_path, options):
    """A cell of a notebook that is run again takes nothing from the run that is there."""
    trainer = Trainer(TrainConfig(output=str(tmp_path / "run"), **options, **OPTIONS))
    trainer.train()
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match=r"this Trainer is closed: go on with Trainer.resume\('.*run'\)"):
        trainer.train()
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("hook", [("generation", 1), ("eval", 2)])
def test_an_error_of_a_callback_ends_the_run_which_can_be_resumed(whole, tmp_path, hook):
    watcher, other = Watcher(fail_at=hook), Watcher()
    with pytest.raises(RuntimeError, match="the watcher fell"):
        watched(tmp_path / "run", watcher, callbacks=[other])
    assert watcher.calls[-2:] == [hook, ("end", None)] and other.calls[-1] == ("end", None)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert watched(tmp_path / "run", Watcher(), resume=True)["fingerprint"] == whole["fingerprint"]


def test_a_callback_that_fails_at_the_start_leaves_the_older_run_as_it_was(interrupted):
    before, first = contents(interrupted), Watcher()
    trainer = Trainer(
        TrainConfig(output=str(interrupted), overwrite=True, **OPTIONS),
        callbacks=[first, Watcher(fail_at=("start", 0)), Watcher()],
    )
    with pytest.raises(RuntimeError, match="the watcher fell"):
        trainer.train()
    assert contents(interrupted) == before
    assert first.calls == [("start", 0), ("end", None)] and trainer.callbacks[2].calls == []


def test_an_error_at_the_end_hides_no_other(tmp_path, caplog):
    class Falling(Watcher):
        def on_end(self, trainer, summary):
            super().on_end(trainer, summary)
            raise ValueError("too late")

    last = Watcher()
    with pytest.raises(RuntimeError, match="the watcher fell"):
        watched(tmp_path / "run", Falling(fail_at=("generation", 0)), callbacks=[last])
    assert "Falling failed in on_end: too late" in caplog.messages and last.calls[-1] == ("end", None)
    last = Watcher()
    with pytest.raises(ValueError, match="too late"):
        watched(tmp_path / "run", Falling(), resume=True, callbacks=[last])
    assert last.calls[-1] == ("end", 5) and (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("at", [3, 8, 14])
def test_a_full_disk_loses_nothing_written(whole, tmp_path, monkeypatch, at):
    calls, real = [], os.write

    def write(file, data):
        if os.readlink(f"/proc/self/fd/{file}").endswith(("run.log", "journal")):
            calls.append(1)
            if len(calls) == at:
                real(file, data[:7])
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        trainer = Trainer(TrainConfig(output=str(tmp_path / "run"), **OPTIONS), task=Counted(f"{tmp_path}/run.scored"))
        with pytest.raises(OSError, match="No space left on device"):
            trainer.train()
    assert run(tmp_path / "run", resume=True)["fingerprint"] == whole["fingerprint"]
