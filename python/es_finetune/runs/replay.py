"""From base model and log to the tuned model, bit for bit, on any backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import es_kernels
from es_finetune.config import TrainConfig, model_options
from es_finetune.errors import UserError
from es_finetune.models.checkpoint_names import has_plain_memory, named_segments
from es_finetune.models.load import load_model, pick_device
from es_finetune.optim.evolution_strategy import EvolutionStrategy
from es_finetune.runs.log import Generation, read_log
from es_finetune.runs.setup import make_members, make_optimizer
from es_finetune.runs.snapshot import load_snapshot
from es_kernels.segment import DTYPES


@dataclass
class Rebuilt:
    """What a run came to after `optimizer.generation` updates; `model` computes with its live weights."""

    config: TrainConfig
    header: dict[str, Any]
    generations: list[Generation]
    model: torch.nn.Module
    tokenizer: Any
    optimizer: EvolutionStrategy


def rebuild(
    run: str | Path,
    *,
    model: str | None = None,
    device: str = "auto",
    generation: int | None = None,
    on_generation: Callable[[int], None] | None = None,
) -> Rebuilt:
    """A run's model, made again from its base model and its log alone. Every update is proven by its fingerprints.

    Args:
        run: Folder of the run.
        model: Where the base model is now; as in the log, if not given.
        device: Where to compute: "cpu", "cuda", "cuda:1", ...; "auto": cuda, if there is one.
        generation: Stop after so many updates; None: do all.
        on_generation: Called after each with the number of updates done.

    Raises:
        UserError: The log is damaged or of an older format, the base model is another one, the noise is of another
            version, or a fingerprint differs.
    """
    header, generations = read_log(Path(run) / "run.log")
    if generation is not None and generation > len(generations):
        raise UserError(f"{run} has {len(generations)} generations, not {generation}")
    config = config_of(header, run)
    loaded, tokenizer, entries = _load_start(header, model or config.model, device, config)
    members = make_members(loaded, entries, config)
    optimizer = make_optimizer(entries, config, None if members is None else members.names)
    check_start(header, start_of(entries, optimizer), model or config.model)
    fast_forward(optimizer, generations[:generation], on_generation, in_place=config.members_at_once == 1)
    return Rebuilt(config, header, generations, loaded, tokenizer, optimizer)


def _load_start(
    header: dict[str, Any], name: str, device: str, config: TrainConfig
) -> tuple[torch.nn.Module, Any, list[es_kernels.NamedTensor]]:
    """(model, tokenizer, its parameters). Weights of several dtypes in memory, which a run was given, may be in files
    that do not say so."""
    for mixed in (False, True):
        loaded, tokenizer, _ = load_model(name, device=pick_device(device), **model_options(config), mixed=mixed)
        entries = list(named_segments(loaded))
        if header["model"].get("dtype") != "mixed" or base_fingerprint(entries) == header["base_fingerprint"]:
            break
    return loaded, tokenizer, entries


def config_of(header: dict[str, Any], run: str | Path) -> TrainConfig:
    """The config in the header of the log of `run`. UserError where this version has no such options."""
    try:
        return TrainConfig(**header["config"])
    except TypeError as error:
        raise UserError(
            f"{run} was written by es_finetune {header.get('es_finetune')}, whose configs differ: {error}"
        ) from None


def start_of(entries: Sequence[es_kernels.NamedTensor], optimizer: EvolutionStrategy) -> dict[str, Any]:
    """What the log's header says of the weights before the first update.

    Args:
        entries: All parameters, as `checkpoint_names.named_segments` gives them.
        optimizer: Over those that are tuned.

    Returns:
        `noise_version`, and as 16 hex digits each `base_fingerprint` (`base_fingerprint`), `theta` and `live`.
    """
    return {
        "noise_version": es_kernels.noise.VERSION,
        "base_fingerprint": base_fingerprint(entries),
        "theta": f"{optimizer.fingerprint('theta'):016x}",
        "live": f"{optimizer.fingerprint('live'):016x}",
    }


def base_fingerprint(entries: Sequence[es_kernels.NamedTensor]) -> str:
    """Of all parameters that the kernels can read, frozen ones too; quantised ones under an adapter they cannot."""
    read = [entry for entry in entries if entry.tensor.dtype in DTYPES and has_plain_memory(entry.tensor)]
    return f"{es_kernels.fingerprint(es_kernels.ParamTable(read)):016x}"


def check_start(header: dict[str, Any], start: dict[str, Any], name: str) -> None:
    """Prove that the log's first update was made on weights that start as these do, with this noise.

    Args:
        header: Of the log.
        start: What `start_of` says of the weights at hand.
        name: Of their model, for the error.

    Raises:
        UserError: They are others.
    """
    if header["noise_version"] != start["noise_version"]:
        raise UserError(
            f"the run was made with noise version {header['noise_version']}, this es_kernels has version "
            f"{start['noise_version']}"
        )
    if header["base_fingerprint"] != start["base_fingerprint"]:
        raise UserError(
            f"model {name} is not the one the run began with: its fingerprint is {start['base_fingerprint']}, the log "
            f"says {header['base_fingerprint']}"
        )
    if header["theta"] != start["theta"]:
        raise UserError(
            f"the parameters to tune are not those of the run: their fingerprint is {start['theta']}, the log says "
            f"{header['theta']}"
        )


def fast_forward(
    optimizer: EvolutionStrategy,
    generations: Sequence[Generation],
    on_generation: Callable[[int], None] | None = None,
    snapshots: Path | None = None,
    in_place: bool = True,
) -> None:
    """Repeat logged generations.

    Args:
        optimizer: At its start, or where the generation before the first of these has left it.
        generations: Of the log.
        on_generation: Called after each with the number of updates done.
        snapshots: Of an optimizer at its start: a folder from which to take the newest snapshot that fits the log.
        in_place: Whether the members were put in place one by one, and not in one batch.

    Raises:
        UserError: The weights after a generation have other fingerprints than the log says.
    """
    done = load_snapshot(snapshots, optimizer, generations) if snapshots is not None else 0
    for generation in generations[done:]:
        for group, lr, sigma in zip(optimizer.param_groups, generation.lr, generation.sigma, strict=True):
            group["lr"], group["sigma"] = lr, sigma
        (optimizer.replay if in_place else optimizer.apply)(generation.update)
        result = (optimizer.fingerprint("theta"), optimizer.fingerprint("live"))
        if result != (generation.theta, generation.live):
            raise UserError(
                f"generation {generation.update.generation}: theta and live have the fingerprints {result[0]:016x} and "
                f"{result[1]:016x}, the log says {generation.theta:016x} and {generation.live:016x}"
            )
        if on_generation is not None:
            on_generation(generation.update.generation + 1)
