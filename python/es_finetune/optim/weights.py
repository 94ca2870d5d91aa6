"""The weights of one param_group, as the kernels take them, and what of them was written by whom."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

import es_kernels
from es_finetune.errors import UserError
from es_finetune.optim import dtensor, host_memory
from es_kernels import NamedTensor


class Inside(NamedTuple):
    """What `perturb` added to live: coef * noise(seed).

    Attributes:
        seed: u64.
        coef: The group's sigma of then, with the member's sign.
        noise_rank: Of the noise.
    """

    seed: int
    coef: float
    noise_rank: int


class Step(NamedTuple):
    """What the last update added to theta: coefs[k] * noise(seeds[k]), after `decay`. Nothing, if it had no signal.

    Attributes:
        seeds: u64, of each noise term, oldest generation first.
        coefs: f32, one for each seed.
        decay: f32, lr * weight_decay of the group.
        noise_rank: Of the noise.
    """

    seeds: Sequence[int] = ()
    coefs: Sequence[float] = ()
    decay: float = 0.0
    noise_rank: int = 0


@dataclass
class GroupWeights:
    """One param_group as parameter tables over the same names, built once.

    Attributes:
        live: What the model computes with.
        theta: The exact weights. With master=None the same table as live.
        anchor: What decay pulls toward, in the storage dtype. None: zero.
        inside: The noise now in live, or None.
        step: What the last update added.
        proof: Fingerprint (u64) of nearest(theta), of this process's part. None while it is being changed.
        versions: How often torch has seen each tensor of live written, counted with a member in place. None while live
            is being written.
    """

    live: es_kernels.ParamTable
    theta: es_kernels.ParamTable
    anchor: es_kernels.ParamTable | None
    inside: Inside | None = None
    step: Step = Step()
    proof: int | None = None
    versions: list[int] | None = None

    @classmethod
    def of(cls, entries: list[NamedTensor], master: str | None, anchored: bool) -> GroupWeights:
        """The weights of a new param_group: live over the tensors' own memory, the rest copied from it.

        Args:
            entries: The parameters to tune, f32, bf16 or f16.
            master: As EvolutionStrategy takes it.
            anchored: Whether to keep a copy of them as the anchor.

        Raises:
            TypeError: A tensor is not f32, bf16 or f16.
            UserError: The kernels cannot work on these tensors.
            RunError: CUDA cannot pin the host memory of master="host".
            RuntimeError: No backend can compute the updates of master="host" on the CPU.
        """
        live = dtensor.live_table(entries)
        device = torch.device("cpu") if master == "host" else live.tensors[0].device
        if master == "host":
            # Which will compute the updates: if none can, say so before the first generation
            es_kernels.active_backend(device)

        def copy(memory: list[torch.Tensor]) -> es_kernels.ParamTable:
            copies = [to.copy_(t.detach()) for to, t in zip(memory, live.tensors, strict=True)]
            return es_kernels.ParamTable(list(map(NamedTensor, live.names, copies, live.layout.segments)))

        def empty(dtype: torch.dtype | None = None) -> list[torch.Tensor]:
            return [torch.empty_like(t, dtype=dtype or t.dtype, device=device) for t in live.tensors]

        if master is None:
            theta = live
        elif master == "host":
            theta = copy(
                host_memory.empty_like(
                    live.tensors, torch.float32, live.tensors[0].device if live.tensors[0].is_cuda else None
                )
            )
        else:
            theta = copy(empty(None if master == "copy" else torch.float32))
        weights = cls(live, theta, copy(empty()) if anchored else None)
        if master is not None:
            weights.prove()
        return weights

    def prove(self) -> None:
        """Remember the fingerprint of live, which is nearest(theta) now."""
        self.proof = es_kernels.fingerprint(self.live)

    def count_writes(self) -> None:
        """Remember how often each tensor of live was written, which holds a member's noise now."""
        self.versions = _versions(self.live)

    def changed(self) -> str | None:
        """Look for a tensor of live that others have written.

        At rest the contents tell. With a member in place, whose bits nobody has counted, the tensors' versions do,
        which do not count writes through `.data`.

        Returns:
            Its name, or None.

        Raises:
            RuntimeError: The memory of a tensor moved.
        """
        if self.inside is not None:
            if self.versions is None:
                return None
            return next(
                (
                    name
                    for name, then, now in zip(self.live.names, self.versions, _versions(self.live), strict=True)
                    if then != now
                ),
                None,
            )
        if self.proof is None:
            return None
        try:
            self.live.check_unmoved()
        except RuntimeError as error:
            moved = str(error).partition(":")[0]
            raise RuntimeError(
                f"{moved}: call adopt_live() to take the live weights, where they are now, as theta"
            ) from None
        if es_kernels.fingerprint(self.live) == self.proof:
            return None
        pairs = zip(self.live.names, self.theta.tensors, self.live.tensors, strict=True)
        return next((name for name, theta, live in pairs if not torch.equal(theta.to(live), live)), self.live.names[0])

    def refuse_unlike(self) -> None:
        """Check that theta can hold what is in live.

        Raises:
            UserError: A tensor has another shape, or a dtype that theta's cannot hold.
        """
        for name, theta, live in zip(self.live.names, self.theta.tensors, self.live.tensors, strict=True):
            if theta.shape != live.shape or theta.dtype not in (live.dtype, torch.float32):
                raise UserError(
                    f"{name!r} is {live.dtype} {tuple(live.shape)} now, which theta, {theta.dtype} "
                    f"{tuple(theta.shape)}, cannot hold: make a new EvolutionStrategy"
                )

    def names(self) -> set[str]:
        """The names of the tensors and of the segments in them."""
        return {
            *self.live.names,
            *(segment.name for segments in self.live.layout.segments for segment in segments or ()),
        }

    def wait_for_readers(self) -> None:
        """Return when no kernel of the device reads a theta in host memory any more.

        The CPU writes at once, not in the device's queue.
        """
        if self.live.tensors[0].is_cuda and not self.theta.tensors[0].is_cuda:
            torch.cuda.synchronize(self.live.tensors[0].device)


class KernelClock:
    """Sums wall-clock time on the CPU, and the device's own time on CUDA, where events leave the queue running."""

    def __init__(self):
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def on(self, table: es_kernels.ParamTable) -> Iterator[None]:
        if table.tensors and table.tensors[0].is_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            before = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - before

    def seconds(self) -> float:
        while self._events:
            begin, end = self._events.pop()
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        return self._seconds


def _versions(table: es_kernels.ParamTable) -> list[int]:
    """How often torch has seen each tensor written. Of an inference tensor it does not know."""
    return [0 if tensor.is_inference() else tensor._version for tensor in table.tensors]
