"""Contract under test: `train` says how to go on with the run that it began, and of no other."""

import pytest

from es_finetune import Callback
from es_finetune.commands.train import train
from es_finetune.errors import RunStopped

SMALL = {"generations": 1, "population": 4, "prompts": 4, "eval_items": 4, "save_model": False, "report_to": ["none"]}


class Interrupting(Callback):
    """Ctrl-C, as while a tracker logs in."""

    def on_start(self, trainer):
        raise KeyboardInterrupt


def test_a_run_that_never_began_is_not_the_older_one_in_its_folder(tmp_path):
    options = {"output": str(tmp_path / "run"), **SMALL}
    assert train(options).summary["generations"] == 1
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(KeyboardInterrupt):
        train({**options, "overwrite": True}, callbacks=[Interrupting()])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(RunStopped, match="stopped. 1 generation .* continue with: es-finetune train --resume"):
        train({"output": options["output"], "resume": True}, callbacks=[Interrupting()])
