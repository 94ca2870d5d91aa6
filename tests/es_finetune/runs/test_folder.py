"""Contract under test: which folder a run may use, and which run may go on. tests/es_finetune/test_resume.py has the
rest, with runs."""

import pytest

from es_finetune.config import TrainConfig, recorded_options
from es_finetune.runs.folder import check_folder, inherit, require_resumable
from es_finetune.runs.log import FORMAT, SealedLines


def begun(folder, **header):
    """The folder, with the log of a run that has only begun."""
    log = SealedLines(folder / "run.log")
    log.append({"run": FORMAT, "es_finetune": "0.1", "config": recorded_options(TrainConfig()), **header})
    log.close()
    return folder


def test_a_run_of_an_older_format_is_refused_in_a_line_and_may_be_replaced(tmp_path):
    begun(tmp_path, run=1)
    before = (tmp_path / "run.log").read_bytes()
    resumed = TrainConfig(output=str(tmp_path), resume=True)
    with pytest.raises(
        ValueError, match="run.log was written by an older version, es_finetune 0.1, .* with that version"
    ):
        check_folder(tmp_path, resumed)
    resumed.prompts = None
    with pytest.raises(ValueError, match="run.log was written by an older version"):
        inherit(resumed)
    check_folder(tmp_path, TrainConfig(output=str(tmp_path), overwrite=True))
    assert (tmp_path / "run.log").read_bytes() == before


def test_an_option_that_this_version_does_not_know_is_one_line(tmp_path):
    begun(tmp_path, config={**recorded_options(TrainConfig()), "warmth": 3})
    with pytest.raises(ValueError, match="was written by es_finetune 0.1, whose configs differ: .*'warmth'"):
        check_folder(tmp_path, TrainConfig(output=str(tmp_path), resume=True))


def test_a_resumable_option_may_differ_and_another_is_named():
    was = TrainConfig()
    require_resumable(TrainConfig(batch_size=7, eval_every=3, generations=40), was, done=30)
    for change, done in (({"sigma": 0.5}, 0), ({"generations": 20}, 21), ({"lr_schedule": "cosine"}, 0)):
        (name,) = change
        with pytest.raises(ValueError, match=f"the run was begun with {name} .*: resume it with that"):
            require_resumable(TrainConfig(**change), was, done)


def test_the_engine_may_differ_unless_it_decides_what_is_tuned():
    require_resumable(TrainConfig(engine="vllm"), TrainConfig(), done=0)
    with pytest.raises(ValueError, match="the run was begun with engine 'hf', not 'vllm'"):
        require_resumable(TrainConfig(engine="vllm", noise_rank=1), TrainConfig(noise_rank=1), done=0)
    alone = {"noise_rank": 1, "members_at_once": 1}
    require_resumable(TrainConfig(**alone, engine="vllm"), TrainConfig(**alone), done=0)
