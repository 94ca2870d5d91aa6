"""What the tests start: one run of the embedded model, `python run.py CONFIG.json` under torchrun or alone. Beside its
folder it writes down, one line each, which member a worker has finished (FOLDER.scored) and, process by process, who
works (FOLDER.pids). SLOW_LOG=G: the first start takes a minute to log generation G. ELSEWHERE=FOLDER: where the ranks
behind the first have the run's folder, as on a machine that does not share it. STOP_AFTER=G: a callback stops the run
after so many generations. BY_FOLDER: the run is resumed by its folder alone."""

import json
import os
import sys
import time

from es_finetune import Callback, TrainConfig, Trainer
from es_finetune.runs.log import SealedLines
from es_finetune.trainer import follow
from es_finetune.workers import torchrun

options = json.load(open(sys.argv[1]))
notes = options["output"]
if not torchrun.is_first_rank():
    options["output"] = os.environ.get("ELSEWHERE", options["output"])
config = TrainConfig(**options)
append = SealedLines.append


def audited(self, line):
    if (
        "theta" in line
        and "run" not in line
        and str(line["generation"]) == os.environ.get("SLOW_LOG")
        and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    ):
        time.sleep(60)
    append(self, line)
    if "member" in line:
        with open(f"{notes}.scored", "a") as file:
            file.write(f"{line['generation']} {line['member']}\n")


class Stopping(Callback):
    def on_generation(self, trainer, row):
        if str(trainer.generation) == os.environ.get("STOP_AFTER"):
            trainer.stop()


SealedLines.append = audited
with open(f"{notes}.pids", "a") as file:
    file.write(f"{os.getpid()} {os.environ.get('RANK', 0)}\n")
if "BY_FOLDER" in os.environ:
    if torchrun.is_first_rank():
        Trainer.resume(config.output).train()
    else:
        follow(config.output)
elif torchrun.is_first_rank():
    if not torchrun.under_torchrun() and os.path.exists(os.path.join(config.output, "run.log")):
        config.resume = True
    Trainer(config, callbacks=[Stopping()]).train()
else:
    follow(config)
