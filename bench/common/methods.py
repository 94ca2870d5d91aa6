"""The methods to look after a model's weights in one generation of ES, ours and the baselines, behind one interface."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.common import baselines
from es_kernels import ParamTable, add_noise_

SIGMA = 1e-3
YARDSTICK = "es_kernels, master fp32"  # the default


class Method(NamedTuple):
    """member(): from one member's weights to the next one's; baselines perturb and restore, so a generation ends on
    unperturbed weights with either. update(seeds, coefs): the step, until live weights are ready."""

    member: Callable
    update: Callable
    member_bytes: Callable = baselines.Bytes()  # sizes of the tensors -> what it holds beside weights and masters
    update_bytes: Callable = baselines.Bytes()
    empties_cache: bool = False  # on a GPU whoever allocates next to it pays for that


HELD = baselines.Bytes(2 + 4 + 2)  # by make_methods(): live bf16 weights, our master in float32 and as a copy


def make_methods(live, names=None):
    """{name: Method} over {name: parameter}: ours, which bring their masters along (HELD), and the baselines that run
    on the device, all of them or those of `names`."""
    device = next(iter(live.values())).device.type
    return _ours(live) | {
        name: _theirs(live, baseline)
        for name, baseline in baselines.available(device).items()
        if names is None or name in names
    }


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
        YARDSTICK: Method(
            lambda: add_noise_(table, 1, SIGMA, master),
            lambda seeds, coefs: update(master, seeds, coefs),
        ),
        "es_kernels, master copy": Method(
            lambda: add_noise_(table, 1, SIGMA, copy),
            lambda seeds, coefs: update(copy, seeds, coefs, rounding="stochastic", rounding_seed=7),
        ),
        "es_kernels, master None": Method(
            swap,
            lambda seeds, coefs: add_noise_(table, seeds, coefs, rounding="stochastic", rounding_seed=7),
        ),
    }


def _theirs(live, baseline):
    def member():
        baseline.perturb(live, 1, SIGMA)
        baseline.restore(live, 1, SIGMA)

    def update(seeds, coefs):
        baseline.update(live, seeds, coefs)

    return Method(member, update, baseline.member_bytes, baseline.update_bytes, baseline.empties_cache)


def coefficients(n):
    """(seeds, coefs) of an update of n members."""
    return list(range(1, n + 1)), [SIGMA / n * (-1) ** i for i in range(n)]
