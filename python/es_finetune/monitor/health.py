"""How a run is doing: how much of the noise and of the step reaches the weights, how far they have moved, and what to
do about it.

Weights in bf16 swallow what is smaller than half of their last digit. How much that is depends on the tensor, so it is
measured on a sample of each: a contiguous chunk at a place that its name decides.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from statistics import median
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
        if tensor.is_contiguous():
            return tensor.view(-1)[part.first : part.first + part.cols]
        *row, first = np.unravel_index(part.first, tensor.shape)
        return tensor[tuple(row)][first : first + part.cols]


class Health:
    """Looks at an optimizer's weights, in this order: `measure_member` while a member is in place,
    `measure_before_update` and `measure_after_update` around `tell`. Changes nothing.

    Make it before the first update: drift is counted from the weights of then. It keeps a chunk of up to `samples`
    elements of each tensor, four times in f32. A look waits for a GPU once or twice.
    """

    def __init__(self, optimizer: EvolutionStrategy, samples: int = SAMPLES):
        self.optimizer = optimizer
        chunks = [
            _Chunk(group, number, *chunk)
            for group, tables in enumerate(optimizer.tables)
            for number, (name, tensor, segments) in enumerate(
                zip(tables.live.names, tables.live.tensors, tables.live.layout.segments)
            )
            for chunk in _sample(name, tensor, segments, samples)
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
        self._noise: dict[str, Any] = {}

    # --- three looks
    # ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure_member(self) -> dict[str, Any]:
        """Compare what the member now in place does to live with the noise that it should have, sigma * eps: the first
        three entries of what `measure_after_update` returns.

        Done to live means: against live without it, round-to-nearest(theta). With base=None there is no theta as long
        as a member is in it; then it is taken out of the sample in the way the optimizer will take it out of the
        weights.
        """
        inside = [tables.inside for tables in self.optimizer.tables]
        if None in inside:
            raise RuntimeError(
                "measure_member() was called without a member in the weights: call it in the closure of evaluate(), or "
                "in perturbed()"
            )
        live = self._read("live")
        if self.optimizer.base is None:
            self._scratch.copy_(live)
            for table, (seed, coef) in zip(self._tables, inside):
                es_kernels.add_noise_(table, [seed], [-coef])
        else:
            self._scratch.copy_(self._read("theta"))
        for chunk, view in zip(self.chunks, self._views(self._scratch)):
            view.copy_(view.to(chunk.of(self.optimizer.tables[chunk.group].live).dtype))
        live -= self._scratch
        self._scratch.zero_()
        for table, (seed, coef) in zip(self._tables, inside):
            es_kernels.add_noise_(table, [seed], [coef])
        n, sx, sy, xx, yy, xy = self._by_name(self._sums(live, self._scratch))
        large = n >= _LEAST
        if not large.any():
            self._noise = {"correlation": {}, "correlation_min": None, "rms_ratio_min": None}
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
        """What metrics.jsonl holds as a generation's health. Over all tuned weights, each tensor's chunk standing for
        the tensor:

        correlation         name -> [correlation of realised and intended noise, rms of realised / rms of intended
        noise], of
                            tensors with a correlation under 0.9
        correlation_min     [name, correlation] of the tensor with the lowest, rms_ratio_min [name, rms ratio] of the
        one with
                            the smallest; tensors of under 64 elements are left out, and these are None without any
                            others
        step_correlation    of the change of live by this update with the update before any rounding (made again in f32,
        decay
                            and momentum included); None if there was no update. With base "fp32" and "host" what live
                            does not show yet is kept in theta; with "copy" and None the rest is noise or lost.
        step_rms            of the change of live
        drift               rms of theta - theta at construction; drift_relative: divided by the rms of the latter
        """
        if self._before is None:
            raise RuntimeError("measure_after_update() was called without measure_before_update()")
        (live, theta), self._before = self._before, None
        self._scratch.copy_(theta)
        steps = [tables.step for tables in self.optimizer.tables]
        updated = any(step.seeds for step in steps)
        anchors = self._anchors() if any(step.decay for step in steps) else [None] * len(steps)
        for table, step, anchor in zip(self._tables, steps, anchors):
            if step.seeds:
                es_kernels.add_noise_(
                    table, step.seeds, step.coefs, decay=step.decay, anchor=anchor if step.decay else None
                )
        step = self._pooled(self._sums(self._read("live").sub_(live), self._scratch.sub_(theta)))
        moved = self._pooled(self._sums(self._read("theta").sub_(self._theta0), self._theta0))
        n = step[0]
        found = {
            **self._noise,
            "step_correlation": float(_correlation(*step)) if updated and n >= _LEAST else None,
            "step_rms": math.sqrt(step[3] / n),
            "drift": math.sqrt(moved[3] / n),
            "drift_relative": math.sqrt(moved[3] / moved[4]) if moved[4] else None,
        }
        self._noise = {}
        return found

    # --- the sample
    # ----------------------------------------------------------------------------------------------------

    def _views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The part of each chunk in a buffer of all."""
        parts = buffer.split([chunk.size for chunk in self.chunks])
        return [part.view(chunk.part.rows, chunk.part.cols) for chunk, part in zip(self.chunks, parts)]

    def _buffer(self) -> tuple[torch.Tensor, list[es_kernels.ParamTable]]:
        """Zeros, f32, for all chunks, and per group a table that draws the chunks' noise into them."""
        buffer = torch.zeros(sum(chunk.size for chunk in self.chunks), device=self._device)
        entries: list[list] = [[] for _ in self.optimizer.tables]
        for number, (chunk, view) in enumerate(zip(self.chunks, self._views(buffer))):
            part = chunk.part
            segment = es_kernels.Segment(
                part.name, part.rows, part.cols, first=part.first, index_stride=part.index_stride
            )
            entries[chunk.group].append((str(number), view, [segment]))
        return buffer, [es_kernels.ParamTable(of_group) for of_group in entries]

    def _read(self, kind: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """All chunks of "live", "theta" or "anchor", one after the other, in f32. Of a group without an anchor they
        stay as they are."""
        buffer = torch.empty(len(self._scratch), device=self._device) if into is None else into
        tables = [getattr(of_group, kind) for of_group in self.optimizer.tables]
        for chunk, view in zip(self.chunks, self._views(buffer)):
            if tables[chunk.group] is not None:
                view.copy_(chunk.of(tables[chunk.group]).view_as(view))
        return buffer

    def _anchors(self) -> list[es_kernels.ParamTable | None]:
        buffer, tables = self._buffer()
        self._read("anchor", into=buffer)
        return [None if of_group.anchor is None else table for of_group, table in zip(self.optimizer.tables, tables)]

    def _sums(self, x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
        """f64 [6, chunks]: n, sum x, sum y, sum xx, sum yy, sum xy."""
        found, start = [], 0
        for size, same in itertools.groupby(chunk.size for chunk in self.chunks):
            stop = start + size * sum(1 for _ in same)
            a, b = x[start:stop].view(-1, size), y[start:stop].view(-1, size)
            dot = torch.linalg.vecdot
            found.append(torch.stack([a.sum(1), b.sum(1), dot(a, a), dot(b, b), dot(a, b)]))
            start = stop
        return np.concatenate([self._sizes[None], torch.cat(found, dim=1).cpu().double().numpy()])

    def _by_name(self, sums: np.ndarray) -> np.ndarray:
        found = np.zeros((len(sums), len(self.names)))
        np.add.at(found, (slice(None), self._places), sums)
        return found

    def _pooled(self, sums: np.ndarray) -> np.ndarray:
        return sums @ self._weights


def _correlation(n, sx, sy, xx, yy, xy):
    """Pearson's, from sums; 0 where one side does not vary."""
    spread = np.sqrt(np.maximum(xx - sx * sx / n, 0) * np.maximum(yy - sy * sy / n, 0))
    return np.where(spread > 0, (xy - sx * sy / n) / np.where(spread > 0, spread, 1), 0.0)


def _sample(
    name: str, tensor: torch.Tensor, segments: Sequence[es_kernels.Segment] | None, samples: int
) -> Iterator[tuple[es_kernels.Segment, bool, int]]:
    """(part, whole, elements it stands for): one chunk of a tensor, or one of each of its segments, which share the
    samples."""
    if segments is None:
        if tensor.numel():
            run = tensor.numel() if tensor.is_contiguous() else tensor.shape[-1]  # elements in a row in memory
            size = min(samples, run)
            stream = stream_id(name)
            row = stream % (tensor.numel() // run)
            yield es_kernels.Segment(name, 1, size, first=row * run + stream % (run - size + 1)), True, tensor.numel()
        return
    samples = max(_LEAST, samples // len(segments))
    for part in segments:
        if not part.rows * part.cols:
            continue
        stream = stream_id(part.name)
        cols = min(samples, part.cols)
        rows = min(part.rows, samples // cols)
        row, col = stream % (part.rows - rows + 1), stream % (part.cols - cols + 1)
        offset, first = part.offset + row * part.row_stride + col, part.first + row * part.index_stride + col
        yield (
            es_kernels.Segment(part.name, rows, cols, offset, part.row_stride, first, part.index_stride),
            False,
            part.rows * part.cols,
        )


# --- in plain words
# ------------------------------------------------------------------------------------------------------

# The beginning of each warning, by which it is known again in the rows that follow.
_NO_SIGNAL = "every member scored the same"
_IDENTICAL = "members answer alike"
_COLLAPSE = "the reward has fallen"
_FAR = "members do far worse than the model they come from"
_SWALLOWED = "the noise does not fully arrive"
_FAILED = "scoring failed"
_OUTSIDE = "time goes elsewhere"

REPEAT = 50  # generations until a warning that still holds is said again
_MOST_ALIKE = 0.5  # share of members with the answers of another: beyond, most evaluations tell nothing new
_SMOOTH = 5  # generations to average for the best reward so far, against the luck of one draw of prompts
_NOW = 3  # and for the reward of now: a collapse shall not be found late
_DROP = 3  # times what is usual; the difference of two such averages has a standard deviation of about 0.5 of that
_OUTSIDE_SHARE = 0.1  # the kernels' share of a 7B model with answers of only 100 tokens is 0.04


# The module or weight of a norm by its name: input_layernorm.weight, q_norm.weight, ln_f.weight.
_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)", re.IGNORECASE)


def is_norm(name: str) -> bool:
    """Whether a tensor of this name belongs to a norm. Such weights are near 1, where bf16 knows no step smaller than
    0.004: of sigma 0.001 about a third arrives (correlation 0.36), in the run of the paper as in this one."""
    return any(_NORM.search(part) for part in name.split(".")[-2:])


def swallowed(row: dict[str, Any], norms: bool) -> dict[str, list[float]]:
    """The tensors whose noise a look found swallowed, norms or all others: name -> [correlation, rms realised /
    meant]."""
    return {
        name: found
        for name, found in (row.get("health") or {}).get("correlation", {}).items()
        if is_norm(name) == norms
    }


def norms_note(rows: Sequence[dict[str, Any]]) -> str | None:
    """What to say of norm weights after the last of `rows`: once in a run, and no warning."""
    found = swallowed(rows[-1], norms=True)
    if not found or any(swallowed(row, norms=True) for row in rows[:-1]):
        return None
    lowest = min(correlation for correlation, _ in found.values())
    return (
        f"part of the noise is lost in {len(found)} norm weight(s), which are near 1, where their dtype is too coarse "
        "for it (lowest correlation "
        f"{lowest:.2f}); so it is in the paper's run, and nothing needs to be done"
    )


def warnings_of(rows: Sequence[dict[str, Any]], config: Any, look: dict[str, Any] | None = None) -> list[str]:
    """What a user should know after the last of `rows` (of metrics.jsonl, from the first generation on), one sentence
    each.

    `config`: what was asked for (`sigma` and `population` are read). `look`: the latest row of evals.jsonl, where there
    is one. A kind of warning that was given within the last 50 generations is not given again.
    """
    row = rows[-1]
    recent = [warning for earlier in rows[-REPEAT:-1] for warning in earlier.get("warnings", ())]
    return [
        f"{kind}{text}"
        for kind, text in _findings(rows, row, config, look)
        if not any(warning.startswith(kind) for warning in recent)
    ]


def _findings(rows, row, config, look) -> Iterator[tuple[str, str]]:
    sigma, alike = f"sigma (now {row['sigma']:g})", row["identical"]
    if row["reward_min"] == row["reward_max"]:
        if alike > _MOST_ALIKE:
            yield _NO_SIGNAL, f", and {alike:.0%} of them with the same answers, so nothing was learned: raise {sigma}"
        else:
            remedy = "use more prompts, easier ones, or a reward that also pays for a part"
            yield _NO_SIGNAL, f", with different answers, so nothing was learned: {remedy}"
    elif alike > _MOST_ALIKE:
        yield _IDENTICAL, f": {alike:.0%} of them give the very answers of another: raise {sigma}"
    if (fallen := _collapse([row["reward_mean"] for row in rows], [row["reward_std"] for row in rows])) is not None:
        yield (
            _COLLAPSE,
            f" from {fallen[0]:.3g} to {fallen[1]:.3g} (it began at {rows[0]['reward_mean']:.3g}): lower lr (now "
            f"{row['lr']:g}) or {sigma}",
        )
    if look is not None and _far_below(row, look):
        here, there = (
            f"{of[mean]:.3g} ({of['reward_low']:.3g} to {of['reward_high']:.3g})"
            for of, mean in ((row, "reward_mean"), (look, "reward"))
        )
        yield (
            _FAR,
            f": reward {here} on the training prompts, {there} without noise on the held-out ones: lower {sigma}",
        )
    lost = sorted(swallowed(row, norms=False).items(), key=lambda item: item[1])
    if lost:
        named = "; ".join(f"{name} {correlation:.2f}, {ratio:.2f}" for name, (correlation, ratio) in lost[:3])
        named += "; ..." if len(lost) > 3 else ""
        remedy = "give them a larger sigma with --sigma_for, or float32 with --dtype, or --freeze them"
        yield (
            _SWALLOWED,
            f" in {len(lost)} tensor(s), being too small for their dtype (correlation, rms realised / meant: {named}): "
            f"{remedy}",
        )
    if row["failed"]:
        yield (
            _FAILED,
            f" for {row['failed']} answers, {row['failed'] / config.population:.3g} of each member; the first: "
            f"{row['failed_example']}",
        )
    outside = [earlier["share_outside"] for earlier in rows[-_NOW:]]
    if len(outside) == _NOW and min(outside) > _OUTSIDE_SHARE:
        yield (
            _OUTSIDE,
            f": {row['share_outside']:.0%} of it is spent outside of generating and scoring; with more prompts per "
            "member that is less",
        )


def _collapse(means: Sequence[float], stds: Sequence[float]) -> tuple[float, float] | None:
    """(best, present) reward, if the present one has lost half of what the best had gained, or more, and fallen far
    from it.

    Far is _DROP times the members' median spread, or the median change from one generation to the next if that is more:
    at a small sigma, prompts drawn anew move the mean by six times the spread. Not a share of the best: rewards may be
    negative.
    """
    if len(means) < _SMOOTH + _NOW:
        return None
    now = math.fsum(means[-_NOW:]) / _NOW
    earlier = means[:-_NOW]
    best = max(math.fsum(earlier[i : i + _SMOOTH]) / _SMOOTH for i in range(len(earlier) - _SMOOTH + 1))
    usual = max(median(stds), median(abs(b - a) for a, b in itertools.pairwise(means)))
    return (best, now) if now < (means[0] + best) / 2 and best - now > _DROP * usual else None


def _far_below(row: dict[str, Any], look: dict[str, Any]) -> bool:
    """Whether the noise costs more than half of the reward, more than three times what sets members apart, and more
    than the choice of questions can explain: members answer training prompts and theta held-out ones, so that their 95
    % intervals must be disjoint.

    On the embedded model sigma 0.03 is such a one: after 30 generations 68 % are right, where 0.01 comes to 86 %.
    """
    drop, high, low = look["reward"] - row["reward_mean"], row.get("reward_high"), look.get("reward_low")
    return None not in (high, low) and high < low and drop > 0.5 * abs(look["reward"]) and drop > 3 * row["reward_std"]
