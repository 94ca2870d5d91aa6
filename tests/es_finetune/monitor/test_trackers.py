"""Contract under test: trackers.

Every number of a row arrives at its step under its path, nothing else does; a resumed run goes on in the same curves,
and what was logged after the update it resumes from is replaced. What is wrong before a run is one clear ValueError;
what goes wrong during it is one warning and never ends the run.
"""

import logging
import sys
import types
from types import SimpleNamespace

import pytest
from accelerate import PartialState
from accelerate.tracking import TensorBoardTracker

from es_finetune import TrainConfig
from es_finetune.config import recorded_options
from es_finetune.monitor.callbacks import Callback
from es_finetune.monitor.trackers import as_callback, scalars, trackers_named

ROW = {
    "generation": 3, "reward_mean": 0.5, "exact_mean": None, "theta": "00ff", "failed_example": "x", "identical": 0,
    "health": {
        "drift": 0.25, "step_correlation": None,
        "correlation": {"a.weight": [0.8, 1.1]}, "correlation_min": ["a.weight", 0.8],
    },
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


class Run:
    """What the trackers see of a Trainer: `log` and `eval` tell them of a row after so many updates."""

    def __init__(self, folder, *trackers, done=0):
        self.folder, self.config, self.generation, self.trackers = folder, TrainConfig(), done, trackers
        for tracker in trackers:
            tracker.on_start(self)

    def log(self, row, step):
        self.generation = step
        for tracker in self.trackers:
            tracker.on_generation(self, row)

    def eval(self, row, step):
        self.generation = step
        for tracker in self.trackers:
            tracker.on_eval(self, row)

    def end(self):
        for tracker in self.trackers:
            tracker.on_end(self, None)


def curves(folder):
    """tag -> [(step, value)] of the event files, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_scalars_are_the_numbers_of_a_row_by_path():
    assert dict(scalars(ROW, "train")) == {f"train/{name}": number for name, number in NUMBERS.items()}


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    run = Run(tmp_path, *trackers_named(["tensorboard"]))
    run.eval({"exact": 0.25, "items": 10}, 0)
    run.log(ROW, 1)
    assert curves(tmp_path)["train/reward_mean"] == [(1, 0.5)]  # already on disk: a killed run keeps it
    run.log({**ROW, "reward_mean": 0.75}, 2)
    run.end()
    result = curves(tmp_path)
    assert result.keys() == {f"train/{name}" for name in NUMBERS} | {"held_out/exact", "held_out/items"}
    assert result["train/reward_mean"] == [(1, 0.5), (2, 0.75)] and result["held_out/exact"] == [(0, 0.25)]


def test_a_resumed_run_replaces_what_came_after_its_last_update(tmp_path):
    first = Run(tmp_path, *trackers_named(["tensorboard"]))
    for step in range(1, 6):
        first.log({"reward_mean": step}, step)
    first.end()
    second = Run(tmp_path, *trackers_named(["tensorboard"]), done=3)  # the log had lost two generations
    for step in range(4, 7):
        second.log({"reward_mean": 10 * step}, step)
    second.end()
    assert curves(tmp_path)["train/reward_mean"] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]


def test_a_hosted_tracker_gets_project_name_config_and_numbers(hosted, tmp_path, monkeypatch):
    name, folder = hosted.__name__, tmp_path / "my-run"
    folder.mkdir()
    run = Run(folder, *trackers_named([name]))
    run.log(ROW, 4)
    run.end()
    (_, options), log, finish = hosted.calls
    assert options["project"] == "es-finetune" and options["name"] == "my-run" and options["resume"] == "never"
    assert options["config"] == recorded_options(run.config)
    assert log == ("log", {f"train/{name}": number for name, number in NUMBERS.items()}, 4) and finish == ("finish",)
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "mine")
    Run(folder, *trackers_named([name]), done=4)
    assert hosted.calls[-1][1]["project"] == "mine" and hosted.calls[-1][1]["resume"] == "allow"
    if name == "wandb":
        ids = [call[1]["id"] for call in hosted.calls if call[0] == "init"]
        assert ids[0] == ids[1]  # the resumed run is the same one
        Run(folder, *trackers_named([name]))
        assert hosted.calls[-1][1]["id"] != ids[0]  # a run that overwrites it is another


def test_a_failure_during_the_run_is_one_warning(hosted, tmp_path, caplog):
    run = Run(tmp_path, *trackers_named([hosted.__name__, "tensorboard"]))
    hosted.broken = ("log", "finish")
    for step in (1, 2, 3):
        run.log({"reward_mean": 0.5}, step)
    run.end()
    (warning,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    assert warning.getMessage() == f"{hosted.__name__} failed, the run goes on without: no log"
    assert [call[0] for call in hosted.calls] == ["init", "log", "log", "log", "finish"]  # a network may come back
    assert len(curves(tmp_path)["train/reward_mean"]) == 3  # the others go on


def test_a_failure_before_the_run_is_an_error(hosted, tmp_path):
    hosted.broken = ("init",)
    with pytest.raises(ValueError, match=f"{hosted.__name__} could not be started: no init; take it out of report_to"):
        Run(tmp_path, *trackers_named([hosted.__name__]))


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_missing_package_is_named_with_its_remedy(name, monkeypatch):
    # Import raises
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(ValueError, match=f"{name}, which is not installed: pip install {name}"):
        trackers_named([name])


def test_unknown_names_and_contradictions_are_refused():
    with pytest.raises(
        ValueError, match="unknown tracker 'tensorbord' in report_to; choose from: tensorboard, wandb, trackio, none"
    ):
        trackers_named(["tensorbord"])
    with pytest.raises(ValueError, match="none beside tensorboard"):
        trackers_named(["none", "tensorboard"])


@pytest.mark.parametrize("names", [[], ["none"]])
def test_none_is_nothing(names):
    assert trackers_named(names) == []


def test_a_tracker_of_accelerate_gets_config_and_numbers(tmp_path):
    """The real one, as a user makes it: TensorBoard knows no lists, of which the config has some."""
    PartialState()  # accelerate's own messages ask for it
    run = Run(tmp_path, as_callback(TensorBoardTracker("tensorboard", logging_dir=tmp_path)))
    run.log(ROW, 1)
    run.eval({"exact": 0.25}, 1)
    run.end()
    result = curves(tmp_path)
    assert result["train/reward_mean"] == [(1, 0.5)] and result["held_out/exact"] == [(1, 0.25)]
    assert list(tmp_path.rglob("hparams.yml"))


def test_anything_with_a_trackers_methods_is_one_and_fails_as_the_others(caplog, tmp_path):
    def broken(*arguments, **options):
        raise ConnectionError("no network\nsecond line")

    def nothing(*arguments, **options):
        pass

    tracker = SimpleNamespace(name="mine", store_init_configuration=nothing, log=broken, finish=nothing)
    run = Run(tmp_path, as_callback(tracker))
    run.log(ROW, 1)
    run.log(ROW, 2)
    assert [record.getMessage() for record in caplog.records] == ["mine failed, the run goes on without: no network"]
    tracker.store_init_configuration = broken
    with pytest.raises(ValueError, match="mine could not be started: no network; take it out of callbacks"):
        Run(tmp_path, as_callback(tracker))


def test_what_is_no_callback_is_refused():
    callback = Callback()
    assert as_callback(callback) is callback
    for other, words in (
        ("wandb", "holds str, which is no Callback"),
        (Callback, "holds Callback, which is no object"),
    ):
        with pytest.raises(ValueError, match=words):
            as_callback(other)
