"""The calls that are timed, what each moves and makes, and the gate before them: a kernel whose bits are not the
reference's gets no row."""

from typing import NamedTuple

import numpy as np
import torch

import es_kernels
from es_kernels import ParamTable, Segment, add_noise_

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SEEDS = (2, 8, 30, 128)
_SIZE = {"f32": 4, "bf16": 2, "f16": 2}
_SLICE = 1000  # values: the reference takes 100 ns for each and seed


class Operation(NamedTuple):
    """One way to call the operation; dtypes by the names of DTYPES."""

    what: str  # perturb (1 seed), swap (2), update (any number), restore (none, from a base), fingerprint
    out: str
    base: str | None = None  # None: in place
    seeds: int = 1
    stochastic: bool = False
    noise_rank: int = 0

    @property
    def label(self):
        seeds = f", {self.seeds} seeds" if self.what == "update" else ""
        where = "" if self.what == "fingerprint" else " in place" if self.base is None else f" <- {self.base}"
        rank = f", rank {self.noise_rank}" if self.noise_rank else ""
        return f"{self.what} {self.out}{where}{seeds}{' stochastic' * self.stochastic}{rank}"

    @property
    def kernel(self):
        """The row of static_analysis.py that does this."""
        if self.what == "fingerprint":
            return f"fingerprint {'f32' if self.out == 'f32' else 'bf16'}"
        if self.what == "update" or (self.stochastic and self.seeds != 1):
            return "update" + " stochastic" * self.stochastic
        return f"{self.what}{' stochastic' * self.stochastic} {self.out} <- {self.base or self.out}"

    @property
    def bytes_per_value(self):
        """Read and written, of memory."""
        return _SIZE[self.out] if self.what == "fingerprint" else _SIZE[self.out] + _SIZE[self.base or self.out]

    def on(self, out, base, device):
        """The call on two ParamTables, ready to run again and again. The Triton backend uploads seeds given as numbers,
        which cannot be captured in a graph: it gets tensors."""
        if self.what == "fingerprint":
            tensors, layout = out.tensors, out.layout.key
            # Without the public function's wait for the number
            return lambda: torch.ops.es_kernels.fingerprint(tensors, layout)
        seeds, coefs = list(range(1, self.seeds + 1)), [1e-3 * (-1) ** i for i in range(self.seeds)]
        rounding = {"rounding": "stochastic", "rounding_seed": 7} if self.stochastic else {}
        if es_kernels.active_backend(device) == "triton":
            seeds, coefs = (
                torch.tensor(seeds, dtype=torch.int64, device=device),
                torch.tensor(coefs, dtype=torch.float32, device=device),
            )
            if rounding:
                rounding["rounding_seed"] = torch.tensor(7, device=device)
        base = None if self.base is None else base
        return lambda: add_noise_(out, seeds, coefs, base, noise_rank=self.noise_rank, **rounding)


def operations(dtype):
    """All that is timed for weights of one dtype."""
    roundings = [False] if dtype == "f32" else [False, True]
    listed = [Operation("perturb", dtype, base, 1, stochastic) for base in (None, "f32") for stochastic in roundings]
    listed += [
        Operation("swap" if n == 2 else "update", dtype, None, n, stochastic) for n in SEEDS for stochastic in roundings
    ]
    return listed + [Operation("restore", dtype, "f32", 0), Operation("fingerprint", dtype)]


def right(operation, device, backend):
    """The gate, on a small matrix: lengths that fill no block or tile, an unaligned start, NaNs and infinities; against
    the reference's bits."""
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, 65519.0, 3.3895e38])
    values = torch.cat([torch.randn(10_003, generator=torch.Generator().manual_seed(0)), special]).view(110, 91)
    outcomes = []
    for name, where in ((backend, device), ("reference", "cpu")):
        out = values.to(where, DTYPES[operation.out], copy=True)
        base = None if operation.base is None else values.flip(0, 1).to(where, DTYPES[operation.base], copy=True)
        table = ParamTable({"all": out, "part": out.clone()[3:]})
        bases = None if base is None else ParamTable({"all": base, "part": base.clone()[3:]})
        with es_kernels.backend(name):
            result = operation.on(table, bases, where)()
        outcomes.append([result] if operation.what == "fingerprint" else table.tensors)
    return all(same_bits(a, b) for a, b in zip(*outcomes, strict=True))


def right_at_size(operation, out, base, device, backend):
    """The gate, on the very tensors that are timed, contiguous ones named "w": their first, middle and last values,
    which sizes past 2^31 would tell."""
    if operation.what == "fingerprint":
        return True
    n = out.numel()
    starts = sorted({0, max(0, n // 2 - _SLICE // 2), max(0, n - _SLICE)})
    parts = [slice(start, min(n, start + _SLICE)) for start in starts]
    values, width = out.view(-1), out.shape[1] if out.dim() == 2 else None
    before = [values[part].cpu().clone() for part in parts]
    bases = None if base is None else ParamTable({"w": base})
    with es_kernels.backend(backend):
        operation.on(ParamTable({"w": out}), bases, device)()
    for part, expected in zip(parts, before, strict=True):
        segment = [Segment("w", 1, len(expected), first=part.start, width=width)]
        base_part = None if base is None else ParamTable([("part", base.view(-1)[part].cpu().clone(), segment)])
        with es_kernels.backend("reference"):
            operation.on(ParamTable([("part", expected, segment)]), base_part, "cpu")()
        if not same_bits(values[part], expected):
            return False
    return True


def same_bits(a, b):
    return np.array_equal(*(t.reshape(-1).view(torch.uint8).cpu().numpy() for t in (a, b)))
