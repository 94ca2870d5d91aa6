"""Contract: bench/common/timing.py measures what a GPU needs, not what it takes to ask for it, and says where it
could not: on a GPU that is played here, with a queue, a host that takes its time for every request, and events."""

import pytest

from bench.common import timing


def measured(run, **options):
    (timed,) = timing.interleave({"it": timing.Variant(run, **options)}, "cuda", rounds=3).values()
    return timed


@pytest.mark.parametrize("host_seconds", [1e-6, 2e-3])
def test_a_calls_host_time_is_hidden(gpu, host_seconds):
    """2 ms of Python for 0.46 ms of the GPU: a table of 300 tensors before its weights."""
    sample = measured(lambda k: gpu.launch(0.46e-3, host_seconds), capture=False)
    assert (
        sample.queued
        and sample.median == pytest.approx(0.46e-3, rel=0.01)
        and sample.host_seconds == pytest.approx(host_seconds)
    )


def test_a_graph_of_many_nodes_is_hidden_too(gpu, monkeypatch):
    monkeypatch.setattr(timing, "prepared", lambda variant, device: lambda: gpu.launch(1000 * 2e-6, 6e-3))
    sample = measured(None, copies=1000)
    assert sample.queued and sample.median == pytest.approx(2e-6, rel=0.01) and sample.host_seconds is None


def test_what_waits_for_the_gpu_is_not_queued(gpu):
    """Its gaps count, and the row says so."""

    def run(k):
        gpu.launch(1e-3, 1e-3)
        gpu.synchronize()
        gpu.launch(1e-3, 1e-3)

    sample = measured(run, capture=False)
    assert not sample.queued and sample.median > 2.5e-3


def test_one_sample_that_was_late_shows(gpu):
    calls = iter(range(1000))
    late = measured(lambda k: gpu.launch(2e-3, 1e-3 if next(calls) != 3 else 10e-3), capture=False)
    assert not late.queued and late.median == pytest.approx(2e-3, rel=0.01)
