"""Contract under test: torchrun with any number of ranks makes the run of one process.

1, 2 and 4 ranks end with one fingerprint, whoever scored what. A rank that is killed at any moment loses no generation
and no finished member, and the run ends as if it had lived. Ranks that hold other weights, or are on another run, are
refused by name.
"""

import os
import random
import signal
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from es_finetune import TrainConfig
from es_finetune.errors import WorkersDiffer
from es_finetune.runs.log import SealedLines, read_journals, read_log
from es_finetune.workers import torchrun
from es_finetune.workers.setup import make_ranks

KILLS = 10


@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_ranks_is_the_run_of_one(run, alone, count):
    several = run()
    assert several(ranks=count)["fingerprint"] == alone.summary["fingerprint"]
    assert sorted(several.scored) == sorted(alone.scored) == [(g, m) for g in range(20) for m in range(8)]
    (_, logs), (_, expected) = (read_log(which.folder / "run.log") for which in (several, alone))
    assert logs == expected
    if count == 2:
        took_part = {
            rank for rank in range(2) if (several.folder / ("journal-1" if rank else "journal")).stat().st_size
        }
        assert took_part == {0, 1}


def test_two_ranks_are_one_with_noise_of_low_rank_too(run, alone):
    one, two = (run(name, generations=3, noise_rank=1) for name in ("one", "two"))
    assert two(ranks=2)["fingerprint"] == one()["fingerprint"] != alone.summary["fingerprint"]


def test_a_killed_rank_loses_nothing(run, alone):
    killed = run()
    draws, process, kills = random.Random(0), killed.start(ranks=2, restarts=KILLS + 1), 0
    while kills < KILLS:
        before, started = len(killed.scored), 2 * (kills + 1)
        if not killed.wait_until(
            lambda before=before, started=started: len(killed.pids) >= started and len(killed.scored) > before,
            process=process,
        ):
            break
        after = before + draws.randrange(1, 14)
        killed.wait_until(lambda after=after: len(killed.scored) >= after, process=process)
        os.kill(draws.choice(killed.pids[-2:])[0], signal.SIGKILL)
        kills += 1
    assert killed.finish(process) == 0, killed.output
    assert kills == KILLS
    assert killed.summary["fingerprint"] == alone.summary["fingerprint"]
    killed.assert_none_scored_twice(alone)
    assert read_log(killed.folder / "run.log")[1] == read_log(alone.folder / "run.log")[1]


def test_a_rank_that_is_ahead_keeps_its_members_until_they_are_logged(run, alone):
    """The first rank dies after the update and before its line of the log; the other one is in the next generation by
    then."""
    killed = run()
    process = killed.start(ranks=2, restarts=1, environment={"SLOW_LOG": "3"})
    assert killed.wait_until(lambda: len(killed.scored) == 4 * 8, process=process)
    time.sleep(1)
    os.kill(next(pid for pid, rank in killed.pids if rank == 0), signal.SIGKILL)
    assert killed.finish(process) == 0, killed.output
    assert killed.summary["fingerprint"] == alone.summary["fingerprint"]
    assert sorted(killed.scored) == sorted(alone.scored)  # each member once


def test_a_run_goes_on_with_fewer_ranks_and_is_replaced_with_more(run, alone):
    """What ranks have scored that are there no more counts too."""
    several = run()
    process = several.start(ranks=3)
    several.wait_until(
        lambda: len(several.scored) > 20 and (several.folder / "journal-2").exists() and len(several.scored) % 8 > 4,
        process=process,
    )
    os.killpg(process.pid, signal.SIGKILL)
    for pid, _ in several.pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()
    several.options["resume"] = True
    assert several()["fingerprint"] == alone.summary["fingerprint"]
    several.assert_none_scored_twice(alone)
    several.options |= {"resume": False, "overwrite": True}
    assert (
        several(ranks=2)["fingerprint"] == alone.summary["fingerprint"] and not (several.folder / "journal-2").exists()
    )


def test_a_run_that_a_callback_stops_ends_on_every_rank_and_goes_on(run, alone):
    stopped = run()
    process = stopped.start(ranks=2, environment={"STOP_AFTER": "3"})
    assert stopped.finish(process) == 0, stopped.output
    assert stopped.summary["generations"] == 3
    process = stopped.start(ranks=2, environment={"BY_FOLDER": ""})
    assert stopped.finish(process) == 0, stopped.output
    assert stopped.summary["fingerprint"] == alone.summary["fingerprint"]
    assert sorted(stopped.scored) == sorted(alone.scored)


def test_a_journal_of_another_run_is_not_taken_for_this_one(run, alone, tmp_path):
    """Its machine has a folder of its own, in which a run that the first rank knows nothing of was broken off."""
    (tmp_path / "elsewhere").mkdir()
    journal = SealedLines(tmp_path / "elsewhere" / "journal-1")
    for line in read_journals(alone.folder):
        journal.append({**line, "generation": 0, "rewards": [5.0 + line["member"]] * len(line["rewards"])})
    journal.close()
    several = run()
    process = several.start(ranks=2, environment={"ELSEWHERE": str(tmp_path / "elsewhere")})
    assert several.finish(process) == 0, several.output
    assert several.summary["fingerprint"] == alone.summary["fingerprint"]
    assert sorted(several.scored) == sorted(alone.scored)


def disagree(rank, folder, kind, result):
    """One of two ranks, of which the second is not on the first one's run."""
    os.environ |= {
        "MASTER_ADDR": "localhost",
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": "2",
    }
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": "0", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    config = TrainConfig(
        output=folder, population=4, prompts=4, eval_items=4, lr=0.02 if rank and kind == "lr" else 0.01
    )
    several = make_ranks(config)
    worker = several.worker
    with torch.no_grad():
        if rank and kind == "model":
            worker.weights.optimizer.tables[0].live.tensors[3][0] += 1
        if rank and kind == "noise":
            start = worker.weights.start
            worker.weights.start = lambda: {**start(), "noise_version": 2}
        try:
            several.start()
            several.fast_forward([])
            if rank and kind == "later":
                worker.weights.optimizer.tables[0].live.tensors[3][0] += 1
                worker.weights.optimizer.adopt_live()
            lines, _ = several.evaluate(0, {}, lambda line: None)
            update, _ = several.plan.update(0, lines)
            several.update(update)
            result[rank] = "no difference was seen"
        except WorkersDiffer as error:
            result[rank] = str(error)
    dist.barrier()


@pytest.mark.parametrize(
    "kind, words",
    [
        ("model", "rank 1 on {host} is not on the same run as the others: its base_fingerprint is"),
        ("noise", "rank 1 on {host} is not on the same run as the others: its noise_version is 2, not 1"),
        ("lr", "rank 1 on {host} is not on the same run as the others: its option lr is 0.02, not 0.01"),
        ("later", "after generation 1 the weights of the workers differ: rank 1 on {host} has theta"),
    ],
)
def test_a_rank_that_differs_is_named(tmp_path, monkeypatch, kind, words):
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    with torch.multiprocessing.Manager() as manager:
        result = manager.dict()
        torch.multiprocessing.spawn(disagree, (str(tmp_path / "run"), kind, result), nprocs=2)
        for rank in range(2):  # both say it, so that each machine's output does
            assert words.format(host=socket.gethostname()) in result[rank] or kind == "later" and "rank" in result[rank]


def test_what_cannot_be_shared_is_refused(tmp_path, monkeypatch):
    for name, value in {
        "TORCHELASTIC_RUN_ID": "x",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "LOCAL_RANK": "0",
        "RANK": "0",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="master 'none' rounds the weights at every member"):
        torchrun.for_this_rank(TrainConfig(output=str(tmp_path / "run"), master="none"))
    (tmp_path / "run").mkdir()
    config = TrainConfig(output=str(tmp_path / "run"), overwrite=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert torchrun.for_this_rank(config).overwrite  # nothing had begun


def test_a_restart_goes_on_even_where_the_first_start_replaced_a_run(tmp_path, monkeypatch, alone):
    for name, value in {
        "TORCHELASTIC_RUN_ID": "x",
        "TORCHELASTIC_RESTART_COUNT": "1",
        "LOCAL_RANK": "0",
        "RANK": "0",
    }.items():
        monkeypatch.setenv(name, value)
    config = TrainConfig(output=str(alone.folder), overwrite=True)
    placed = torchrun.for_this_rank(config)
    assert placed.resume and not placed.overwrite and config.overwrite
