"""The ways to look after a model's weights in one generation of ES, ours and theirs, behind one interface."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.common import baselines
from es_kernels import ParamTable, add_noise_

SIGMA = 1e-3
YARDSTICK = "es_kernels, base fp32"  # the default


class Way(NamedTuple):
    """member(): from one member's weights to the next one's; rivals perturb and restore, so a generation ends on
    unperturbed weights with either. update(seeds, coefs): the step, until live weights are ready."""

    member: Callable
    update: Callable
    member_bytes: Callable = baselines.Bytes()  # sizes of the tensors -> what it holds beside weights and bases
    update_bytes: Callable = baselines.Bytes()


HELD = baselines.Bytes(2 + 4 + 2)  # by ways(): live bf16 weights, our base in float32 and our base as a copy


def ways(live, wanted=None):
    """{name: Way} over {name: parameter}, of all (or those wanted) that run on the device. Ours bring their bases along
    (HELD)."""
    device = next(iter(live.values())).device.type
    found = {
        name: _theirs(live, rival)
        for name, rival in baselines.available(device).items()
        if wanted is None or name in wanted
    }
    return _ours(live) | found


def _ours(live):
    table = ParamTable(live)
    master, copy = (
        ParamTable({name: p.to(dtype or p.dtype, copy=True) for name, p in live.items()})
        for dtype in (torch.float32, None)
    )

    def update(theta, seeds, coefs, **rounding):
        add_noise_(theta, seeds, coefs, **rounding)
        add_noise_(table, [], [], theta)

    def swap():
        add_noise_(table, 1, -SIGMA)
        add_noise_(table, 2, SIGMA)

    return {
        YARDSTICK: Way(lambda: add_noise_(table, 1, SIGMA, master), lambda seeds, coefs: update(master, seeds, coefs)),
        "es_kernels, base copy": Way(
            lambda: add_noise_(table, 1, SIGMA, copy),
            lambda seeds, coefs: update(copy, seeds, coefs, rounding="stochastic", rounding_seed=7),
        ),
        "es_kernels, base None": Way(
            swap, lambda seeds, coefs: add_noise_(table, seeds, coefs, rounding="stochastic", rounding_seed=7)
        ),
    }


def _theirs(live, rival):
    def member():
        rival.perturb(live, 1, SIGMA)
        rival.restore(live, 1, SIGMA)

    return Way(member, lambda seeds, coefs: rival.update(live, seeds, coefs), rival.member_bytes, rival.update_bytes)


def coefficients(n):
    """(seeds, coefs) of an update of n members."""
    return list(range(1, n + 1)), [SIGMA / n * (-1) ** i for i in range(n)]
