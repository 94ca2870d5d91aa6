"""Contract under test: a pool of Ray actors makes the run of one process.

Actors that are killed at any moment are replaced, and the new ones come to the same weights; a driver that is killed
leaves a run that goes on. No generation is lost, no finished member scored again, and the end is that of a run that
nothing disturbed. A straggler's member is given to another worker, or dropped and recorded. A cluster that cannot be
reached or has no room is refused, as are actors with other weights.
"""

import os
import pathlib
import random
import signal
import time

import pytest

from es_finetune import TrainConfig, Trainer
from es_finetune.errors import WorkersDiffer
from es_finetune.runs.files import read_rows
from es_finetune.runs.log import read_log
from es_finetune.workers.ray_pool import Actor
from es_finetune.workers.setup import make_pool

ray = pytest.importorskip("ray")
ACTOR_KILLS, DRIVER_KILLS = 8, 2
POOL = {"workers": "ray", "ray_workers": 2}


def processes(name, of=None):
    """Those whose command line begins so; children of `of`, if it is given, at any distance."""
    running = {}
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            command, status = (path / "cmdline").read_bytes(), (path / "stat").read_text()
        except OSError:
            continue
        running[int(path.name)] = command.startswith(name.encode()), int(status.rpartition(")")[2].split()[1])

    def descends(pid):
        return pid == of or (pid in running and pid > 1 and descends(running[pid][1]))

    return sorted(pid for pid, (fits, _) in running.items() if fits and (of is None or descends(pid)))


def test_two_actors_make_the_run_of_one(run, alone):
    pool = run(**POOL)
    assert pool()["fingerprint"] == alone.summary["fingerprint"]
    assert sorted(pool.scored) == sorted(alone.scored)
    (_, log), (_, expected) = (read_log(which.folder / "run.log") for which in (pool, alone))
    assert log == expected
    rows = read_rows(pool.folder / "metrics.jsonl")
    assert {row["workers"] for row in rows} == {2} and "health" in rows[0] and "health" in rows[10]


def test_killed_actors_and_drivers_lose_nothing(run, alone):
    killed = run(**POOL)
    draws, actors, drivers = random.Random(1), 0, 0
    process = killed.start()
    while actors < ACTOR_KILLS or drivers < DRIVER_KILLS:
        after = len(killed.scored) + draws.randrange(1, 12)
        if not killed.wait_until(lambda after=after: len(killed.scored) >= after, process=process):
            break
        time.sleep(draws.random() / 10)
        if drivers < DRIVER_KILLS and actors >= ACTOR_KILLS * (drivers + 1) // (DRIVER_KILLS + 1):
            process.kill()
            process.wait()
            drivers += 1
            process = killed.start()
        else:
            victims = processes("ray::Actor", of=process.pid)
            if victims:
                os.kill(draws.choice(victims), signal.SIGKILL)
                actors += 1
    assert killed.finish(process) == 0, killed.output
    assert (actors, drivers) == (ACTOR_KILLS, DRIVER_KILLS)
    assert killed.summary["fingerprint"] == alone.summary["fingerprint"]
    killed.assert_none_scored_twice(alone)
    assert read_log(killed.folder / "run.log")[1] == read_log(alone.folder / "run.log")[1]


# --- in this process: one cluster for what follows --------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


SMALL = {
    "generations": 3,
    "population": 6,
    "prompts": 8,
    "eval_items": 8,
    "noise_rank": 1,
    "eval_every": 0,
    "report_to": ["none"],
    "save_model": False,
    **POOL,
}


def config(folder, **options):
    return TrainConfig(output=str(folder), **{**SMALL, **options})


class Stopped:
    """An actor's worker of this pool that sleeps, as one whose machine hangs."""

    def __init__(self, pool, number):
        self.pid = ray.get(pool.slots[number].actor.__ray_call__.remote(lambda actor: os.getpid()))

    def __enter__(self):
        os.kill(self.pid, signal.SIGSTOP)

    def __exit__(self, *_):
        try:
            os.kill(self.pid, signal.SIGCONT)
        except ProcessLookupError:
            pass


def test_a_stragglers_member_is_given_to_another(cluster, tmp_path, run):
    expected = Trainer(config(tmp_path / "expected", workers="alone", ray_workers=0)).train()
    trainer = Trainer(config(tmp_path / "run", straggler_limit=1.0))
    pool = trainer.workers
    with Stopped(pool, 1):
        result = trainer.train()
    assert result["fingerprint"] == expected["fingerprint"]
    assert all(not g.update.dropped for g in read_log(tmp_path / "run/run.log")[1])


@pytest.mark.parametrize("at_once", (1, 2))
def test_or_dropped_and_recorded(cluster, tmp_path, at_once):
    """With all members that it was given together."""
    options = {
        "straggler_limit": 1.0,
        "on_straggler": "drop",
        "generations": 2,
        "members_at_once": at_once,
        "sigma": 0.05,
    }
    trainer = Trainer(config(tmp_path / "run", **options))
    pool = trainer.workers
    evaluate, stopped = pool.evaluate, Stopped(pool, 0)

    def stopping(generation, *arguments):
        if generation:
            return evaluate(generation, *arguments)
        with stopped:
            return evaluate(generation, *arguments)

    pool.evaluate = stopping
    trainer.train()
    generations = read_log(tmp_path / "run/run.log")[1]
    first, second = (generation.update for generation in generations)
    assert len(first.dropped) == at_once and first.scored == 6 - at_once
    assert all(first.z[member] == 0 for member in first.dropped)
    assert second.dropped == () and second.scored == 6
    row = read_rows(tmp_path / "run/metrics.jsonl")[0]
    assert tuple(row["dropped"]) == first.dropped
    from es_finetune.runs.replay import rebuild

    assert rebuild(tmp_path / "run").optimizer.fingerprint() == generations[-1].theta


def test_an_actor_with_other_weights_is_named(cluster, tmp_path, monkeypatch):
    pool = make_pool(config(tmp_path / "run"))
    try:
        pool.start()

        def change(actor):
            optimizer = actor.worker.weights.optimizer
            optimizer.tables[0].live.tensors[3].data[0].add_(1)
            optimizer.adopt_live()

        ray.get(pool.slots[1].actor.__ray_call__.remote(change))
        pool.fast_forward([])
        lines, _ = pool.evaluate(0, {}, lambda line: None)
        with pytest.raises(WorkersDiffer, match=r"after generation 1 the weights of the workers differ: worker \d on "):
            pool.update(pool.plan.update(0, lines)[0])
    finally:
        pool.close()


def test_and_one_that_starts_with_them(cluster, tmp_path):
    pool = make_pool(config(tmp_path / "run"))
    try:
        pool.start()
        pool._start = {**pool._start, "base_fingerprint": "0" * 16}
        pool.fast_forward([])
        ray.kill(pool.slots[0].actor)
        with pytest.raises(
            WorkersDiffer, match="worker 0 on .* is not on the same run as the others: its base_fingerprint is"
        ):
            for _ in range(100):  # until the new actor has started
                pool.evaluate(0, {}, lambda line: time.sleep(0.1))
    finally:
        pool.close()


def test_an_actor_that_always_dies_ends_the_run(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(Actor, "members", lambda self, *_: os._exit(1))
    trainer = Trainer(config(tmp_path / "run"))
    with pytest.raises(RuntimeError, match="worker . on .* died 4 times without a result in between"):
        trainer.train()


def test_errors_of_a_worker_are_said_as_here(cluster, tmp_path):
    with pytest.raises(ValueError, match="the model.s folder .*nowhere does not exist"):
        Trainer(config(tmp_path / "run", model=str(tmp_path / "nowhere"), task="countdown-char"))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"ray_workers": 0}, "the Ray cluster has no GPU: say with --ray_workers"),
        ({"ray_workers": 9}, "9 workers need 9 CPUs, and the Ray cluster has 3: lower --ray_workers"),
        ({"master": "none"}, "master 'none' rounds the weights at every member"),
    ],
)
def test_what_a_cluster_cannot_do_is_refused(cluster, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        Trainer(config(tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_a_cluster_that_cannot_be_reached_is_named(run):
    unreachable = run(**POOL)
    process = unreachable.start(environment={"RAY_ADDRESS": "127.0.0.1:1"})
    assert unreachable.finish(process) != 0
    assert "the Ray cluster 127.0.0.1:1 cannot be reached" in unreachable.output
