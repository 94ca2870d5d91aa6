"""How a run is doing: how much of the noise and of the step reaches the weights, and how far they have moved.

Weights in bf16 swallow what is smaller than half of their last digit. How much that is depends on the tensor, so it is
measured on a sample of each: a contiguous chunk at a place that its name decides. Where the noise is of low rank it is
a block of rows and columns: the elements of a row share a factor, so that at rank 1 the correlation of a row of 4096
was off by 0.28 (rms), and that of a block of 64 x 64 by 0.02.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

import es_kernels
from es_finetune.optim.evolution_strategy import EvolutionStrategy
from es_kernels.noise import stream_id

# Elements of a chunk. An unrelated chunk of 4096 has |correlation| < 0.05, drift is off by 1 %; 16384 cost four times
# as much.
SAMPLES = 4096
_LEAST = 64  # with fewer elements a correlation is a matter of chance
FAITHFUL = 0.9  # correlation under which a tensor is named: a fifth of what moves it is then rounding (1 - 0.9^2)


class _Chunk(NamedTuple):
    """A sample of one tensor of a checkpoint."""

    group: int
    tensor: int  # its place in the group's tables
    part: es_kernels.Segment
    whole: bool  # the tensor in memory is the checkpoint's: then part.first says where, and part.offset nothing
    elements: int  # how many it stands for

    @property
    def size(self) -> int:
        return self.part.rows * self.part.cols

    def of(self, table: es_kernels.ParamTable) -> torch.Tensor:
        """Its elements in that table: a view of rows * cols elements."""
        tensor, part = table.tensors[self.tensor].detach(), self.part
        if not self.whole:
            return tensor.as_strided(
                (part.rows, part.cols), (part.row_stride, 1), tensor.storage_offset() + part.offset
            )
        if part.rows > 1:
            top, left = divmod(part.first, tensor.shape[1])
            return tensor[top : top + part.rows, left : left + part.cols]
        if tensor.is_contiguous():
            return tensor.view(-1)[part.first : part.first + part.cols]
        *row, first = np.unravel_index(part.first, tensor.shape)
        return tensor[tuple(row)][first : first + part.cols]


_NOT_MEASURED: dict[str, Any] = {"correlation": {}, "correlation_min": None, "rms_ratio_min": None}


class Health:
    """Looks at an optimizer's weights, in this order: `measure_member` while a member is in place,
    `measure_before_update` and `measure_after_update` around `tell`. Changes nothing.

    Make it before the first update: drift is counted from the weights of then. It keeps a chunk of up to `samples`
    elements of each tensor, four times in f32. A measurement waits for a GPU once or twice.
    """

    def __init__(self, optimizer: EvolutionStrategy, samples: int = SAMPLES):
        self.optimizer = optimizer
        chunks = [
            _Chunk(group, number, *chunk)
            for group, tables in enumerate(optimizer.tables)
            for number, (name, tensor, segments) in enumerate(
                zip(tables.live.names, tables.live.tensors, tables.live.layout.segments, strict=True)
            )
            for chunk in _sample(name, tensor, segments, samples, optimizer.param_groups[group]["noise_rank"] > 0)
        ]
        # Those of one size make one matrix, to be summed in one go
        self.chunks = sorted(chunks, key=lambda chunk: chunk.size)
        self.names = list(dict.fromkeys(chunk.part.name for chunk in self.chunks))
        places = {name: place for place, name in enumerate(self.names)}
        self._places = [places[chunk.part.name] for chunk in self.chunks]
        self._sizes = np.array([chunk.size for chunk in self.chunks], float)
        self._weights = np.array([chunk.elements for chunk in self.chunks]) / self._sizes
        self._device = optimizer.tables[0].live.tensors[0].device
        self._scratch, self._tables = self._buffer()
        self._theta0 = self._read("theta")
        self._before: tuple[torch.Tensor, torch.Tensor] | None = None
        self._noise = _NOT_MEASURED

    # --- three measurements -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure_member(self) -> dict[str, Any]:
        """Compare what the member now in place does to live with the noise that it should have, sigma * eps: the first
        three entries of what `measure_after_update` returns.

        Done to live means: against live without it, round-to-nearest(theta). With master=None there is no theta as long
        as a member is in it; then it is taken out of the sample in the way the optimizer will take it out of the
        weights.
        """
        inside = [tables.inside for tables in self.optimizer.tables if tables.inside is not None]
        if len(inside) < len(self.optimizer.tables):
            raise RuntimeError(
                "measure_member() was called without a member in the weights: call it in the closure of evaluate(), or "
                "in perturbed()"
            )
        live = self._read("live")
        if self.optimizer.master is None:
            self._scratch.copy_(live)
            for table, noise in zip(self._tables, inside, strict=True):
                es_kernels.add_noise_(table, [noise.seed], [-noise.coef], noise_rank=noise.noise_rank)
        else:
            self._scratch.copy_(self._read("theta"))
        for chunk, view in zip(self.chunks, self._views(self._scratch), strict=True):
            view.copy_(view.to(chunk.of(self.optimizer.tables[chunk.group].live).dtype))
        live -= self._scratch
        self._scratch.zero_()
        for table, noise in zip(self._tables, inside, strict=True):
            es_kernels.add_noise_(table, [noise.seed], [noise.coef], noise_rank=noise.noise_rank)
        n, sx, sy, xx, yy, xy = self._by_name(self._sums(live, self._scratch))
        large = n >= _LEAST
        if not large.any():
            self._noise = _NOT_MEASURED
            return self._noise
        correlation = _correlation(n, sx, sy, xx, yy, xy)
        ratio = np.sqrt(xx / yy)
        lowest, weakest = (int(np.where(large, values, np.inf).argmin()) for values in (correlation, ratio))
        self._noise = {
            "correlation": {
                self.names[i]: [float(correlation[i]), float(ratio[i])]
                for i in np.flatnonzero(large & (correlation < FAITHFUL))
            },
            "correlation_min": [self.names[lowest], float(correlation[lowest])],
            "rms_ratio_min": [self.names[weakest], float(ratio[weakest])],
        }
        return self._noise

    @torch.no_grad()
    def measure_before_update(self) -> None:
        self._before = self._read("live"), self._read("theta")

    @torch.no_grad()
    def measure_after_update(self) -> dict[str, Any]:
        """What metrics.jsonl holds as a generation's health (rows.Health), each tensor's chunk standing for the tensor.

        `step_correlation` is that of live's change with the update made again in f32, decay and momentum included. With
        master "fp32" and "host" what live does not show yet is kept in theta; with "copy" and None the rest is noise or
        lost. Tensors of under 64 elements have no correlation.

        Raises:
            RuntimeError: Nothing was measured before the update.
        """
        if self._before is None:
            raise RuntimeError("measure_after_update() was called without measure_before_update()")
        (live, theta), self._before = self._before, None
        self._scratch.copy_(theta)
        steps = [tables.step for tables in self.optimizer.tables]
        updated = any(step.seeds for step in steps)
        anchors = self._anchors() if any(step.decay for step in steps) else [None] * len(steps)
        for table, step, anchor in zip(self._tables, steps, anchors, strict=True):
            if step.seeds:
                es_kernels.add_noise_(
                    table,
                    step.seeds,
                    step.coefs,
                    decay=step.decay,
                    anchor=anchor if step.decay else None,
                    noise_rank=step.noise_rank,
                )
        change = self._pooled(self._sums(self._read("live").sub_(live), self._scratch.sub_(theta)))
        moved = self._pooled(self._sums(self._read("theta").sub_(self._theta0), self._theta0))
        n = change[0]
        result = {
            **self._noise,
            "step_correlation": float(_correlation(*change)) if updated and n >= _LEAST else None,
            "step_rms": math.sqrt(change[3] / n),
            "drift": math.sqrt(moved[3] / n),
            "drift_relative": math.sqrt(moved[3] / moved[4]) if moved[4] else None,
        }
        self._noise = _NOT_MEASURED
        return result

    # --- the sample ---------------------------------------------------------------------------------------------------

    def _views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The part of each chunk in a buffer of all."""
        parts = buffer.split([chunk.size for chunk in self.chunks])
        return [part.view(chunk.part.rows, chunk.part.cols) for chunk, part in zip(self.chunks, parts, strict=True)]

    def _buffer(self) -> tuple[torch.Tensor, list[es_kernels.ParamTable]]:
        """Zeros, f32, for all chunks, and per group a table that draws the chunks' noise into them."""
        buffer = torch.zeros(sum(chunk.size for chunk in self.chunks), device=self._device)
        entries: list[list] = [[] for _ in self.optimizer.tables]
        for number, (chunk, view) in enumerate(zip(self.chunks, self._views(buffer), strict=True)):
            part = chunk.part
            segment = es_kernels.Segment(
                part.name, part.rows, part.cols, first=part.first, index_stride=part.index_stride, width=part.width
            )
            entries[chunk.group].append((str(number), view, [segment]))
        return buffer, [es_kernels.ParamTable(of_group) for of_group in entries]

    def _read(self, kind: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """All chunks of "live", "theta" or "anchor", one after the other, in f32. Of a group without an anchor they
        stay as they are."""
        buffer = torch.empty(len(self._scratch), device=self._device) if into is None else into
        tables = [getattr(of_group, kind) for of_group in self.optimizer.tables]
        for chunk, view in zip(self.chunks, self._views(buffer), strict=True):
            if tables[chunk.group] is not None:
                view.copy_(chunk.of(tables[chunk.group]).view_as(view))
        return buffer

    def _anchors(self) -> list[es_kernels.ParamTable | None]:
        buffer, tables = self._buffer()
        self._read("anchor", into=buffer)
        return [
            None if of_group.anchor is None else table
            for of_group, table in zip(self.optimizer.tables, tables, strict=True)
        ]

    def _sums(self, x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
        """f64 [6, chunks]: n, sum x, sum y, sum xx, sum yy, sum xy."""
        sums, start = [], 0
        for size, same in itertools.groupby(chunk.size for chunk in self.chunks):
            stop = start + size * sum(1 for _ in same)
            a, b = x[start:stop].view(-1, size), y[start:stop].view(-1, size)
            dot = torch.linalg.vecdot
            sums.append(torch.stack([a.sum(1), b.sum(1), dot(a, a), dot(b, b), dot(a, b)]))
            start = stop
        return np.concatenate([self._sizes[None], torch.cat(sums, dim=1).cpu().double().numpy()])

    def _by_name(self, sums: np.ndarray) -> np.ndarray:
        by_name = np.zeros((len(sums), len(self.names)))
        np.add.at(by_name.T, self._places, sums.T)
        return by_name

    def _pooled(self, sums: np.ndarray) -> np.ndarray:
        return sums @ self._weights


def _correlation(n, sx, sy, xx, yy, xy):
    """Pearson's, from sums; 0 where one side does not vary."""
    spread = np.sqrt(np.maximum(xx - sx * sx / n, 0) * np.maximum(yy - sy * sy / n, 0))
    return np.where(spread > 0, (xy - sx * sy / n) / np.where(spread > 0, spread, 1), 0.0)


def _sample(
    name: str, tensor: torch.Tensor, segments: Sequence[es_kernels.Segment] | None, samples: int, low_rank: bool
) -> Iterator[tuple[es_kernels.Segment, bool, int]]:
    """(part, whole, elements it stands for): one chunk of a tensor, or one of each of its segments, which share the
    samples."""
    whole = segments is None
    if segments is None:
        if not tensor.numel():
            return
        if not (low_rank and tensor.ndim == 2):
            run = tensor.numel() if tensor.is_contiguous() else tensor.shape[-1]  # elements in a row in memory
            size = min(samples, run)
            stream = stream_id(name)
            row = stream % (tensor.numel() // run)
            width = tensor.shape[1] if tensor.ndim == 2 else None
            first = row * run + stream % (run - size + 1)
            yield es_kernels.Segment(name, 1, size, first=first, width=width), True, tensor.numel()
            return
        rows, cols = tensor.shape
        segments = [es_kernels.Segment(name, rows, cols, width=cols)]
    samples = max(_LEAST, samples // len(segments))
    for segment in segments:
        if not segment.rows * segment.cols:
            continue
        part = segment
        if low_rank and part.width:
            part = _whole_rows(part, part.width)
            cols = min(part.cols, samples // min(part.rows, math.isqrt(samples)))
        else:
            cols = min(samples, part.cols)
        rows = min(part.rows, samples // cols)
        stream = stream_id(part.name)
        row, col = stream % (part.rows - rows + 1), stream % (part.cols - cols + 1)
        offset, first = part.offset + row * part.row_stride + col, part.first + row * part.index_stride + col
        yield (
            es_kernels.Segment(part.name, rows, cols, offset, part.row_stride, first, part.index_stride, part.width),
            whole,
            segment.rows * segment.cols,
        )


def _whole_rows(part: es_kernels.Segment, width: int) -> es_kernels.Segment:
    """The whole rows of the matrix in a run of its elements, if there are several; else the part as it is."""
    elements, skip = part.rows * part.cols, -part.first % width
    rows = (elements - skip) // width
    if rows < 2 or not (part.rows == 1 or part.cols == part.row_stride == part.index_stride):
        return part
    return es_kernels.Segment(part.name, rows, width, part.offset + skip, width, part.first + skip, width, width)
