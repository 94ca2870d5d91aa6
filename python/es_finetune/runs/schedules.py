"""From a model and a config to its optimizer: which parameters are tuned, with which sigma, and how sigma and lr
fall."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable

from es_finetune.config import TrainConfig, optimizer_options, own_sigmas
from es_finetune.errors import UserError
from es_finetune.optim.evolution_strategy import EvolutionStrategy


def make_optimizer(entries: Iterable[tuple], config: TrainConfig) -> EvolutionStrategy:
    """The optimizer of this config over the parameters that require grad, one group for each sigma. `entries`: of all
    parameters, as segments.named_segments gives them.

    A pattern is matched with the whole name, as a shell does it: * stands for anything. A parameter that a checkpoint
    holds as several tensors is matched by its own name in memory, or by the names of all of them. ValueError for a
    pattern that fits no parameter, or some of these tensors only.
    """
    own_sigma = own_sigmas(config)
    unused = {*config.tune, *config.freeze, *(pattern for pattern, _ in own_sigma)}
    groups: dict[float, list] = {}
    for entry in entries:
        if not entry[1].requires_grad:
            continue
        name, parts = entry[0], list(dict.fromkeys(segment.name for segment in (entry[2] if len(entry) == 3 else ())))

        def fits(pattern: str) -> bool:
            found = [part for part in parts if fnmatch.fnmatchcase(part, pattern)]
            whole = fnmatch.fnmatchcase(name, pattern)
            if found and len(found) < len(parts) and not whole:
                other = next(part for part in parts if part not in found)
                raise UserError(
                    f"the pattern {pattern!r} fits {found[0]!r} but not {other!r}, which are one parameter in memory, "
                    f"{name!r}: "
                    "give a pattern that fits all of it"
                )
            if found or whole:
                unused.discard(pattern)
            return bool(found or whole)

        # Lists, not generators: every pattern shall be seen to fit, though the first decides.
        tuned = any([fits(pattern) for pattern in config.tune]) or not config.tune
        frozen = any([fits(pattern) for pattern in config.freeze])
        sigmas = [sigma for pattern, sigma in own_sigma if fits(pattern)]
        if tuned and not frozen:
            groups.setdefault(sigmas[0] if sigmas else config.sigma, []).append(entry)
    if unused:
        raise UserError(
            f"the pattern {sorted(unused)[0]!r} fits no parameter that requires grad; names are like {name!r}"
        )
    if not groups:
        raise UserError("tune and freeze leave no parameter to tune")
    return EvolutionStrategy(
        [{"params": entries, "sigma": sigma, "initial_sigma": sigma} for sigma, entries in groups.items()],
        **optimizer_options(config),
    )


def set_schedules(optimizer: EvolutionStrategy, config: TrainConfig) -> None:
    """Set lr and sigma of each group for the optimizer's present generation. A function of its number alone, so that a
    resumed run needs no state for it."""
    lr_scale = scale(config.lr_schedule, optimizer.generation, config.generations, config.final_scale)
    sigma_scale = scale(config.sigma_schedule, optimizer.generation, config.generations, config.final_scale)
    for group in optimizer.param_groups:
        group["lr"] = config.lr * lr_scale
        group["sigma"] = group["initial_sigma"] * sigma_scale


def scale(schedule: str, generation: int, generations: int, final: float) -> float:
    """1 in the first generation, `final` in the last; in between on a line, on half a cosine, or 1 all along."""
    if schedule == "constant" or generations == 1:
        return 1.0
    progress = min(generation / (generations - 1), 1.0)
    if schedule == "linear":
        return 1 + (final - 1) * progress
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
