"""Contract under test: what a pool does with actors that are late.

Without Ray: a cluster that is played, by a clock that goes on only while the pool waits. tests/distributed has a real
one.
"""

import sys
from types import SimpleNamespace

import pytest

from es_finetune.errors import WorkersDiffer
from es_finetune.optim.update import Update
from es_finetune.workers import ray_pool
from es_finetune.workers.plan import Plan
from es_finetune.workers.ray_pool import PoolOptions, RayPool


class Played:
    """A module ray whose actors answer at once, the last one first, but for the calls in `late`, (actor, method,
    generation): these come when they are taken out of it."""

    def __init__(self):
        self.now, self.actors, self.late, self.exceptions = 0.0, 0, set(), SimpleNamespace()
        self.exceptions.RayTaskError = self.exceptions.RayError = RuntimeError
        self.weights = {}  # another fingerprint of an actor's

    def is_initialized(self):
        return True

    def cluster_resources(self):
        return {"CPU": 8}

    def kill(self, actor):
        pass

    def remote(self, _):
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self.actor))

    def actor(self, _):
        number = self.actors
        self.actors += 1

        def method(name, answer):
            def call(*arguments):
                generation = arguments[0].generation if name == "update" else None
                return SimpleNamespace(key=(number, name, generation), value=answer(*arguments))

            return SimpleNamespace(remote=lambda *arguments: Reference(call(*arguments)))

        def update(update, with_health):
            theta = update.generation + 100 + self.weights.get(number, 0)
            return {"theta": theta, "live": theta, "lr": [0.1], "sigma": [0.1], "seconds_kernels": 0.0}

        started = {"start": {"base_fingerprint": "0"}, "host": "here", "backend": "cpu", "parameters": 1, "machine": {}}
        return SimpleNamespace(
            start=method("start", lambda: started),
            update=method("update", update),
            fast_forward=method("fast_forward", lambda *_: None),
        )

    def wait(self, references, num_returns, timeout):
        ready = [reference for reference in references if reference.call.key not in self.late]
        if not ready:
            self.now += timeout + 1e-6
        return ready[-1:], []

    def get(self, reference):
        return reference.call.value


class Reference:
    def __init__(self, call):
        self.call = call


@pytest.fixture
def played(monkeypatch):
    played = Played()
    monkeypatch.setitem(sys.modules, "ray", played)
    monkeypatch.setattr(ray_pool, "time", SimpleNamespace(monotonic=lambda: played.now))
    return played


@pytest.fixture
def pool(played):
    """Two actors that have started, and a straggler limit of 10 s."""
    plan = Plan(None, 4, 0, 0, 0, "zscore", False, False, False)
    pool = RayPool(plan, None, PoolOptions(workers=2, gpus=0, straggler_limit=10.0))
    pool.start()
    pool.fast_forward([])
    return pool


def update(generation):
    return Update(generation, (0.0,) * 4, 4, 0.0)


def test_an_update_that_comes_in_the_next_generation_is_compared_with_its_own(pool, played):
    played.late.add((1, "update", 0))
    assert pool.update(update(0))["theta"] == 100  # by the other one
    played.late.clear()
    assert pool.update(update(1))["theta"] == 101
    assert [slot.generation for slot in pool.slots] == [2, 2]


def test_and_refused_where_it_differs(pool, played):
    played.late.add((1, "update", 0))
    played.weights[1] = 7
    pool.update(update(0))
    played.late.clear()
    with pytest.raises(
        WorkersDiffer, match="after generation 1 the weights of worker 1 on here are not those of the log"
    ):
        pool.update(update(1))


def test_an_actor_that_hangs_is_replaced_and_the_new_one_catches_up(pool, played):
    played.late.add((1, "update", 0))
    pool.update(update(0))
    played.now += 30.0
    pool.update(update(1))
    assert played.actors == 3 and [slot.generation for slot in pool.slots] == [2, 2]
