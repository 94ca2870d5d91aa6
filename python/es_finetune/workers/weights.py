"""A model's weights, by the few things that a run does to them: what a worker calls, here or over a wire."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from es_finetune.models.members import MemberNoise
from es_finetune.monitor.health import Health
from es_finetune.optim.evolution_strategy import EvolutionStrategy
from es_finetune.optim.update import Update
from es_finetune.runs.log import Generation
from es_finetune.runs.replay import fast_forward, start_of
from es_finetune.runs.schedules import Schedules
from es_finetune.runs.snapshot import save_snapshot
from es_kernels import NamedTensor


class Weights:
    """The optimizer of a run over the parameters of one model. Arguments and results are plain numbers, texts, lists
    and dicts, so that all of it can be called in another process, where an engine keeps the model.

    Args:
        entries: All parameters, as `checkpoint_names.named_segments` gives them.
        optimizer: Over those that are tuned.
        schedules: lr and sigma of each generation.
        with_health: Whether health will be measured: of the changes since now, for which it keeps samples.
        in_place: Whether members are put in place one by one, and not answered for in one batch.
    """

    def __init__(
        self,
        entries: Sequence[NamedTensor],
        optimizer: EvolutionStrategy,
        schedules: Schedules,
        with_health: bool = False,
        in_place: bool = True,
    ):
        self.in_place = in_place
        self.entries, self.optimizer, self.schedules = entries, optimizer, schedules
        self.health = Health(optimizer) if with_health else None
        self._kernels = 0.0
        device = self._device()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # of an earlier run of this process

    def start(self) -> dict[str, Any]:
        """What the log's header says of the weights (`replay.start_of`). Ask before the first update."""
        return start_of(self.entries, self.optimizer)

    def fast_forward(self, generations: Sequence[dict[str, Any]], snapshots: str | None = None) -> None:
        """Repeat logged updates from where these weights are.

        Args:
            generations: Lines of the log; the first is the next generation to be done.
            snapshots: A folder of snapshots, from which weights at their start go faster.

        Raises:
            UserError: The weights after a generation have other fingerprints than the log says.
        """
        fast_forward(
            self.optimizer,
            [Generation.from_json(line) for line in generations],
            snapshots=None if snapshots is None else Path(snapshots),
            in_place=self.in_place,
        )

    def perturb(self, member: int) -> None:
        """Put this member of the present generation in place."""
        self.schedules.set(self.optimizer)
        self.optimizer.perturb(member)

    def noise(self, members: Sequence[int]) -> list[MemberNoise]:
        """What these members of the present generation add to theta, which stays in place. For an engine in this
        process."""
        self.schedules.set(self.optimizer)
        return self.optimizer.noise(members)

    def restore(self) -> None:
        """Put theta in place."""
        self.optimizer.restore()

    def measure_member(self) -> None:
        """Measure the member in place: a part of the health that the next `apply` returns."""
        self._health().measure_member()

    def apply(self, update: dict[str, Any], with_health: bool = False) -> dict[str, Any]:
        """Do an update of the present generation.

        Args:
            update: As `Update.to_json` gives it.
            with_health: Measure what it does to the weights.

        Returns:
            `theta` and `live`, the fingerprints after it; `lr` and `sigma`, one number for each param_group;
            `seconds_kernels` since the update before; `peak_memory_bytes`; and with_health `health`
            (`Health.measure_after_update`).
        """
        self.schedules.set(self.optimizer)
        groups = self.optimizer.param_groups
        lr, sigma = ([group[key] for group in groups] for key in ("lr", "sigma"))
        if with_health:
            self._health().measure_before_update()
        self.optimizer.apply(Update.from_json(update))
        result: dict[str, Any] = {
            "theta": self.optimizer.fingerprint("theta"),
            "live": self.optimizer.fingerprint("live"),
            "lr": lr,
            "sigma": sigma,
        }
        before, self._kernels = self._kernels, self.optimizer.kernel_seconds
        result |= {"seconds_kernels": self._kernels - before, "peak_memory_bytes": self._peak_memory()}
        return result | ({"health": self._health().measure_after_update()} if with_health else {})

    def save_snapshot(self, folder: str) -> None:
        """Write theta into a folder of snapshots, and remove older ones."""
        save_snapshot(Path(folder), self.optimizer)

    def _health(self) -> Health:
        if self.health is None:
            raise RuntimeError("health is measured of weights that were made with_health")
        return self.health

    def _peak_memory(self) -> int:
        """Bytes: of the GPU's allocator, or of the whole process."""
        device = self._device()
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _device(self) -> torch.device:
        return self.optimizer.tables[0].live.tensors[0].device
