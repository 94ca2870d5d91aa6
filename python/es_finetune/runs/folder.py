"""The folder of a run: whose it is, and what may be removed from it. docs/reference/files.md says what each file is
for."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path

from es_finetune.config import RESUMABLE, TrainConfig
from es_finetune.errors import UserError
from es_finetune.runs.log import is_begun, read_log
from es_finetune.runs.replay import config_of

# All that a run may leave in its folder. Another name in it means that the folder is somebody else's.
FILES = (
    "config.json",
    "run.log",
    "journal",
    "metrics.jsonl",
    "evals.jsonl",
    "summary.json",
    "reward.png",
    "report.html",
)
FOLDERS = ("answers", "snapshots", "model")
CURVES = ("tensorboard", "wandb", "wandb-id")  # of trackers
ASIDE = ".aside"  # behind their names, while the trackers of a run that replaces this one are started


def check_folder(folder: Path, config: TrainConfig) -> None:
    """Prove that a run may use the folder. Changes nothing.

    Args:
        folder: It may be missing.
        config: Of the run. It says whether an older run is continued or replaced.

    Raises:
        UserError: The folder is a file, or holds what is no part of a run; or a run that the config neither continues
            nor replaces, that another config began, or whose log is damaged or of an older format.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file: give a folder")
    if is_begun(folder / "run.log"):
        if not (config.resume or config.overwrite):
            raise UserError(
                f"output {folder} holds a run: --resume continues it, --overwrite replaces it, --output gives another "
                "folder"
            )
        inside = [
            path
            for path in (config.model, config.data, config.test_data)
            if path and folder.resolve() in Path(path).resolve().parents
        ]
        if config.overwrite and inside:
            raise UserError(f"--overwrite would remove {inside[0]}, which the run needs: give another --output")
        if config.resume:
            header, generations = read_log(folder / "run.log")
            require_resumable(config, config_of(header, folder), len(generations))
    elif config.resume:
        raise UserError(f"output {folder} holds no run to resume: leave out --resume, or give the folder of a run")
    else:
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        # Names alone do not make a run: only the log that it had begun to write excuses what else is there.
        log = folder / "run.log"
        torn = log.is_file() and log.read_bytes()[:8] in (b"", b'{"run": ')
        foreign = [name for name in names if not (torn and is_ours(name))]
        if foreign:
            raise UserError(f"output {folder} holds {foreign[0]}, which is no part of a run: give another folder")


def inherit(config: TrainConfig) -> None:
    """Fill in, where a run is resumed, the number of prompts that was left open: the one that the run began with.

    Raises:
        UserError: The log is damaged or of an older format.
    """
    log = Path(config.output) / "run.log"
    if config.resume and config.prompts is None and is_begun(log):
        config.prompts = read_log(log)[0]["config"]["prompts"]


def require_resumable(config: TrainConfig, begun: TrainConfig, done: int) -> None:
    """Prove that a resumed run is the run that was begun.

    Args:
        config: How it goes on.
        begun: How it began.
        done: Generations that it has done.

    Raises:
        UserError: An option that is not resumable differs. The number of generations may, where schedules are constant.
    """
    # Where members share a batch, the engine decides which parameters are tuned
    resumable = RESUMABLE if begun.members_at_once == 1 else RESUMABLE - {"engine"}
    for option in dataclasses.fields(TrainConfig):
        name, was, now = option.name, getattr(begun, option.name), getattr(config, option.name)
        if name in resumable or was == now:
            continue
        if name == "generations" and now >= done and "constant" == config.lr_schedule == config.sigma_schedule:
            continue  # only then does the number of generations decide nothing before its end
        if name == "members_at_once" and 1 not in (was, now):
            continue  # whether members share a batch decides which parameters are tuned; how many do decides nothing
        raise UserError(
            f"the run was begun with {name} {was!r}, not {now!r}: resume it with that, or begin another run in another "
            "folder"
        )


def is_ours(name: str) -> bool:
    """Whether a run, or `es-finetune eval`, leaves something of this name in its folder."""
    stem = name.removesuffix(".tmp").removesuffix(ASIDE)
    return stem in FILES + FOLDERS + CURVES or stem.startswith(("eval-", ".model-", "journal-"))


def remove(paths: Iterable[Path]) -> None:
    """Files and whole folders, where they are there."""
    for path in list(paths):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
