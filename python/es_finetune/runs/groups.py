"""Which parameters are tuned, and with which sigma: by patterns of their names."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from es_finetune.errors import UserError
from es_kernels import NamedTensor


def param_groups(
    entries: Iterable[NamedTensor],
    sigma: float,
    *,
    tune: Sequence[str] = (),
    freeze: Sequence[str] = (),
    sigma_for: Sequence[tuple[str, float]] = (),
    shared: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """The parameters that require grad as groups for EvolutionStrategy, one for each sigma.

    A pattern is matched with the whole name, as a shell does it: * stands for anything. A parameter that a checkpoint
    holds as several tensors is matched by its own name in memory, or by the names of all of them.

    Args:
        entries: All parameters, as `checkpoint_names.named_segments` gives them.
        sigma: Of the parameters that no pattern of `sigma_for` fits.
        tune: Patterns of the parameters to tune; all, if there are none.
        freeze: Patterns of those to leave out.
        sigma_for: (pattern, another sigma); the first that fits counts.
        shared: Names of the parameters that members can differ in who share a batch (`models.members`), where they do:
            others are left out. None: there is no such limit.

    Returns:
        Groups with `params`, `sigma` and `initial_sigma`, from which `Schedules` takes its start.

    Raises:
        UserError: A pattern fits no parameter, or only some of the tensors that are one in memory; or no parameter is
            left to tune.
    """
    unused = {*tune, *freeze, *(pattern for pattern, _ in sigma_for)}
    groups: dict[float, list] = {}
    name = ""
    for entry in entries:
        if not entry.tensor.requires_grad:
            continue
        name, parts = entry.name, list(dict.fromkeys(segment.name for segment in entry.segments or ()))

        def fits(pattern: str, name: str = name, parts: list[str] = parts) -> bool:
            fitting = [part for part in parts if fnmatch.fnmatchcase(part, pattern)]
            whole = fnmatch.fnmatchcase(name, pattern)
            if fitting and len(fitting) < len(parts) and not whole:
                other = next(part for part in parts if part not in fitting)
                raise UserError(
                    f"the pattern {pattern!r} fits {fitting[0]!r} but not {other!r}, which are one parameter in "
                    f"memory, {name!r}: give a pattern that fits all of it"
                )
            if fitting or whole:
                unused.discard(pattern)
            return bool(fitting or whole)

        # Every pattern is tried, though the first that fits decides: one that fits nothing must be seen.
        tuning = [pattern for pattern in tune if fits(pattern)]
        freezing = [pattern for pattern in freeze if fits(pattern)]
        sigmas = [(pattern, own) for pattern, own in sigma_for if fits(pattern)]
        if (tuning or not tune) and not freezing:
            if shared is not None and name not in shared:
                asking = [*tuning, *(pattern for pattern, _ in sigmas)]
                if asking:
                    raise UserError(
                        f"the pattern {asking[0]!r} asks for {name!r}, in which members that share a batch cannot "
                        "differ: leave it out, or give --members_at_once 1"
                    )
                continue
            groups.setdefault(sigmas[0][1] if sigmas else sigma, []).append(entry)
    if unused:
        raise UserError(
            f"the pattern {sorted(unused)[0]!r} fits no parameter that requires grad; names are like {name!r}"
        )
    if not groups:
        raise UserError("tune and freeze leave no parameter to tune")
    return [{"params": params, "sigma": own, "initial_sigma": own} for own, params in groups.items()]
