"""Contract under test: `es-finetune export` writes the tuned model, and replaces an older model and nothing else."""

import pytest

from es_finetune import TrainConfig, Trainer, export
from es_finetune.errors import UserError
from es_finetune.runs.log import read_log

SMALL = {"generations": 2, "population": 4, "prompts": 16, "eval_items": 32, "report_to": ["none"], "save_model": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    Trainer(TrainConfig(output=folder, **SMALL)).train()
    return folder


def test_export_replaces_a_model_and_nothing_else(run, tmp_path):
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep" / "precious").write_text("")
    for output in (tmp_path / "keep", run, tmp_path):
        with pytest.raises(UserError, match="is no folder of a model alone"):
            export(run, output=output, overwrite=True)
    (tmp_path / "keep" / "precious").rename(tmp_path / "keep" / "config.json")
    with pytest.raises(UserError, match="is no folder of a model alone"):
        export(run, output=tmp_path / "keep", overwrite=True)
    assert (tmp_path / "keep" / "config.json").exists() and (run / "run.log").exists()
    for _ in range(2):
        exported = export(run, overwrite=True)
    assert exported.folder == run / "model" and (run / "model" / "config.json").exists()
    with pytest.raises(UserError, match="is there already: give another --output, or --overwrite to replace it"):
        export(run)


def test_what_was_exported_is_named(run, tmp_path):
    _, generations = read_log(run / "run.log")
    for generation in (1, 2):
        exported = export(run, output=tmp_path / f"{generation}", generation=generation)
        live = f"{generations[generation - 1].live:016x}"
        assert exported == (tmp_path / f"{generation}", generation, live)


def test_export_never_replaces_the_base_model_or_what_lies_beside(tmp_path, save_tiny):
    model = save_tiny(tmp_path / "base")
    Trainer(TrainConfig(output=tmp_path / "run", model=model, task="countdown-char", **SMALL)).train()
    (tmp_path / "out.tmp").mkdir()
    with pytest.raises(UserError, match="is the base model"):
        export(tmp_path / "run", output=model, overwrite=True)
    export(tmp_path / "run", output=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "out.tmp", "run"]
