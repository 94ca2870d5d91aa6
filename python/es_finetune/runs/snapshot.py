"""Snapshots of the exact weights, so that a long run resumes without repeating every update. The log alone is
enough."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from es_finetune.errors import UserError
from es_finetune.optim.evolution_strategy import EvolutionStrategy
from es_finetune.runs.files import replacing
from es_finetune.runs.log import Generation

_NAME = re.compile(r"theta-([0-9]+)\.safetensors")


def save_snapshot(folder: Path, optimizer: EvolutionStrategy) -> Path:
    """Write theta as FOLDER/theta-GENERATION.safetensors, and then remove older snapshots.

    Raises:
        OSError: It could not be written. The folder is as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    path = folder / f"theta-{optimizer.generation:06d}.safetensors"
    older = _snapshots(folder)
    try:
        with replacing(path) as part:
            save_file(optimizer.state_dict()["es"]["theta"], part)
    except (OSError, SafetensorError) as error:  # the second where the disk is full
        raise OSError(f"the snapshot {path} could not be written: {error}") from error
    for _, old in older:
        if old != path:
            old.unlink()
    return path


def load_snapshot(folder: Path, optimizer: EvolutionStrategy, generations: Sequence[Generation]) -> int:
    """Put the newest snapshot of a logged generation into the optimizer, if there is one.

    Args:
        folder: Of snapshots; it may be missing.
        optimizer: At its start.
        generations: Of the log, from the first. What momentum remembers comes of them.

    Returns:
        How many updates the optimizer has done now; 0 without a snapshot.

    Raises:
        UserError: A snapshot is damaged: its fingerprints are not those of the log; or a file has no generation in its
            name.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for path in folder.glob("theta-*.safetensors"):
        if not _NAME.fullmatch(path.name):
            raise UserError(
                f"{path} does not say of which generation it is, as theta-000100.safetensors does: rename it, or move "
                "it away"
            )
    for done, path in reversed(_snapshots(folder)):
        if not 0 < done <= len(generations):
            continue
        state = optimizer.state_dict()
        remembered = generations[max(0, done - optimizer.momentum_window) : done] if optimizer.momentum else ()
        history = [json.dumps(g.update.to_json()) for g in remembered if g.update.z is not None]
        damaged = f"{path} is damaged: remove it, and the log serves"
        try:
            theta = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{damaged} ({error})") from error
        state["es"] = {**state["es"], "theta": theta, "generation": done, "history": history}
        optimizer.load_state_dict(state)
        if (optimizer.fingerprint("theta"), optimizer.fingerprint("live")) != (
            generations[done - 1].theta,
            generations[done - 1].live,
        ):
            raise UserError(f"{damaged} (its fingerprint is not that of generation {done - 1} in the log)")
        return done
    return 0


def _snapshots(folder: Path) -> list[tuple[int, Path]]:
    """(updates done, file) of each snapshot, the oldest first."""
    named = ((_NAME.fullmatch(path.name), path) for path in folder.glob("theta-*.safetensors"))
    return sorted((int(name[1]), path) for name, path in named if name)
