"""The factors of noise of low rank, L and R of E = L R^T / sqrt(rank), as one call makes them of many matrices."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import ClassVar, TypeAlias

import numpy as np
import torch

from . import noise, streams

MAX_RANK = 64

Matrices: TypeAlias = tuple[tuple[str, int, int], ...]  # (name, rows, columns)

# EsFactor of csrc/es_kernels.h.
FACTOR = np.dtype([("offset", "i8"), ("count", "i8"), ("stream", "u8"), ("domain", "i8"), ("unit_end", "i8")])


class FactorLayout:
    """Where the factors of a list of matrices lie in one tensor: for each of N seeds L and R of the first matrix, then
    of the next. Interned, as Layout is.

    Attributes:
        key: 56 bits.
        elements: Of one seed, with those that keep each factor's first address a multiple of 16 bytes.
        table: Array of FACTOR.
    """

    _known: ClassVar[dict[int, FactorLayout]] = {}

    def __init__(self, key: int, matrices: Matrices, rank: int) -> None:
        self.key = key
        spans = list(_spans(matrices, rank))
        streams_of = [noise.stream_id(name) for name, _, _ in matrices for _ in range(2)]
        domains = itertools.cycle((noise.DOMAIN_LEFT, noise.DOMAIN_RIGHT))
        ends = itertools.accumulate(-(-count // 8) for _, count in spans)
        factors = zip(spans, streams_of, domains, ends, strict=False)
        self.table = np.array([(*span, stream, domain, end) for span, stream, domain, end in factors], FACTOR)
        self.elements = _padded(sum(spans[-1])) if spans else 0
        self._on_device: dict[torch.device, torch.Tensor] = {}

    @classmethod
    def intern(cls, matrices: Matrices, rank: int) -> FactorLayout:
        """The FactorLayout of these matrices. Raises ValueError for a size that none can have."""
        for name, rows, cols in matrices:
            if not (0 <= rows <= 1 << 58 and 0 <= cols <= 1 << 58):
                raise ValueError(f"{name!r}: {rows} x {cols} is no size of a matrix")
        digest = hashlib.blake2b(repr((matrices, rank)).encode(), digest_size=7).digest()
        key = int.from_bytes(digest, "little")
        if key not in cls._known:
            cls._known[key] = cls(key, matrices, rank)
        return cls._known[key]

    @classmethod
    def find(cls, key: int) -> FactorLayout:
        """The FactorLayout with this key. Raises RuntimeError if this process made none."""
        try:
            return cls._known[key]
        except KeyError:
            raise RuntimeError(
                "this process does not know the matrices of a graph that another one compiled: call factors once first"
            ) from None

    @property
    def units(self) -> int:
        """Noise blocks of one seed."""
        return int(self.table["unit_end"][-1]) if len(self.table) else 0

    def on_device(self, device: torch.device) -> torch.Tensor:
        """The table as int64 words on `device`, uploaded at the first use and kept. Raises RuntimeError if that use
        would be a part of a CUDA graph."""
        if device not in self._on_device:
            if streams.current(device)[1]:
                raise RuntimeError(
                    "make one call with these matrices before capturing a CUDA graph: it uploads a table"
                )
            self._on_device[device] = torch.from_numpy(self.table.view(np.int64).copy()).to(device)
        return self._on_device[device]


def views(
    flat: torch.Tensor, matrices: Matrices, rank: int, n_seeds: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name -> (L [N, m, rank], R [N, n, rank]) of the tensor that FactorLayout lays out."""
    spans = _spans(matrices, rank)
    parts = [flat[n_seeds * at :][: n_seeds * n].view(n_seeds, n // rank, rank) for at, n in spans]
    return {name: (parts[2 * i], parts[2 * i + 1]) for i, (name, _, _) in enumerate(matrices)}


def _spans(matrices: Matrices, rank: int) -> Iterator[tuple[int, int]]:
    """(offset, count) of each factor: with N seeds it has N * count elements from N * offset on."""
    at = 0
    for _, rows, cols in matrices:
        for n in (rows, cols):
            yield at, n * rank
            at = _padded(at + n * rank)


def _padded(elements: int) -> int:
    return -(-elements // 8) * 8
