"""Contract under test: trackers.

Every number of a row arrives at its step under its path, nothing else does; a resumed run goes on in the same curves,
and what was logged after the update it resumes from is replaced. What is wrong before a run is one clear ValueError;
what goes wrong during it is one warning and never ends the run.
"""

import sys
import types
import warnings

import pytest

from es_finetune.monitor.trackers import Tracker, require, scalars

ROW = {
    "generation": 3, "reward_mean": 0.5, "exact_mean": None, "theta": "00ff", "failed_example": "x", "identical": 0,
    "health": {"drift": 0.25, "step_correlation": None, "correlation": {"a.weight": [0.8, 1.1]}, "correlation_min": ["a.weight", 0.8]},
    "warnings": ["raise sigma", "lower lr"],
}  # fmt: skip
NUMBERS = {
    "generation": 3,
    "reward_mean": 0.5,
    "identical": 0,
    "health/drift": 0.25,
    "health/correlation/a.weight/0": 0.8,
    "health/correlation/a.weight/1": 1.1,
    "health/correlation_min": 0.8,
}


class Fake(types.ModuleType):
    """A hosted tracker: keeps what it is given, and fails where asked."""

    def __init__(self, name):
        super().__init__(name)
        self.calls, self.broken = [], ()

    def _called(self, what, *content):
        self.calls.append((what, *content))
        if what in self.broken:
            raise ConnectionError(f"no {what}\nsecond line")

    def init(self, **options):
        self._called("init", options)

    def log(self, values, step=None):
        self._called("log", dict(values), step)

    def finish(self):
        self._called("finish")


@pytest.fixture(params=["wandb", "trackio"])
def hosted(request, monkeypatch):
    fake = Fake(request.param)
    monkeypatch.setitem(sys.modules, request.param, fake)
    monkeypatch.delenv(f"{request.param.upper()}_PROJECT", raising=False)
    return fake


def curves(folder):
    """tag -> [(step, value)] of the event files, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_scalars_are_the_numbers_of_a_row_by_path():
    assert dict(scalars(ROW, "train")) == {f"train/{name}": number for name, number in NUMBERS.items()}


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    tracker = Tracker(["tensorboard"], tmp_path, {"sigma": 0.01})
    tracker.log({"exact": 0.25, "items": 10}, 0, "held_out")
    tracker.log(ROW, 1)
    assert curves(tmp_path)["train/reward_mean"] == [(1, 0.5)]  # already on disk: a killed run keeps it
    tracker.log({**ROW, "reward_mean": 0.75}, 2)
    tracker.close()
    found = curves(tmp_path)
    assert found.keys() == {f"train/{name}" for name in NUMBERS} | {"held_out/exact", "held_out/items"}
    assert found["train/reward_mean"] == [(1, 0.5), (2, 0.75)] and found["held_out/exact"] == [(0, 0.25)]


def test_a_resumed_run_replaces_what_came_after_its_last_update(tmp_path):
    first = Tracker(["tensorboard"], tmp_path, {})
    for step in range(1, 6):
        first.log({"reward_mean": step}, step)
    first.close()
    second = Tracker(["tensorboard"], tmp_path, {}, done=3)  # the log had lost two generations
    for step in range(4, 7):
        second.log({"reward_mean": 10 * step}, step)
    second.close()
    assert curves(tmp_path)["train/reward_mean"] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]


def test_a_hosted_tracker_gets_project_name_config_and_numbers(hosted, tmp_path, monkeypatch):
    name, folder = hosted.__name__, tmp_path / "my-run"
    folder.mkdir()
    tracker = Tracker([name], folder, {"sigma": 0.01})
    tracker.log(ROW, 4)
    tracker.close()
    (_, options), log, finish = hosted.calls
    assert (
        options["project"] == "es-finetune"
        and options["name"] == "my-run"
        and options["config"] == {"sigma": 0.01}
        and options["resume"] == "never"
    )
    assert log == ("log", {f"train/{name}": number for name, number in NUMBERS.items()}, 4) and finish == ("finish",)
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "mine")
    Tracker([name], folder, {}, done=4)
    assert hosted.calls[-1][1]["project"] == "mine" and hosted.calls[-1][1]["resume"] == "allow"
    if name == "wandb":
        ids = [call[1]["id"] for call in hosted.calls if call[0] == "init"]
        assert ids[0] == ids[1]  # the resumed run is the same one
        Tracker([name], folder, {})
        assert hosted.calls[-1][1]["id"] != ids[0]  # the run done anew is another


def test_a_failure_during_the_run_is_one_warning(hosted, tmp_path):
    tracker = Tracker([hosted.__name__, "tensorboard"], tmp_path, {})
    hosted.broken = ("log", "finish")
    with pytest.warns(UserWarning, match=f"{hosted.__name__} failed, the run goes on without: no log$") as caught:
        for step in (1, 2, 3):
            tracker.log({"reward_mean": 0.5}, step)
        tracker.close()
    assert len(caught) == 1
    assert [call[0] for call in hosted.calls] == ["init", "log", "log", "log", "finish"]  # a network may come back
    assert len(curves(tmp_path)["train/reward_mean"]) == 3  # the others go on


def test_a_failure_before_the_run_is_an_error(hosted, tmp_path):
    hosted.broken = ("init",)
    with pytest.raises(ValueError, match=f"{hosted.__name__} could not be started: no init; take it out of report_to"):
        Tracker([hosted.__name__], tmp_path, {})


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_missing_package_is_named_with_its_remedy(name, tmp_path, monkeypatch):
    # Import raises
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    for ask in (lambda: require([name]), lambda: Tracker([name], tmp_path, {})):
        with pytest.raises(ValueError, match=f"{name}, which is not installed: pip install {name}"):
            ask()
    assert list(tmp_path.iterdir()) == []


def test_unknown_names_and_contradictions_are_refused():
    with pytest.raises(
        ValueError, match="unknown tracker 'tensorbord' in report_to; choose from: tensorboard, wandb, trackio, none"
    ):
        require(["tensorbord"])
    with pytest.raises(ValueError, match="none beside tensorboard"):
        require(["none", "tensorboard"])


@pytest.mark.parametrize("names", [[], ["none"]])
def test_none_is_nothing(names, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker = Tracker(names, tmp_path, {})
        tracker.log(ROW, 1)
        tracker.close()
    assert list(tmp_path.iterdir()) == []
