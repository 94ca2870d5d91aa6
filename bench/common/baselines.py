"""What people do today instead of the fused operation: noise by torch's generators, tensor by tensor. Each is written
from its description.

Every baseline is three functions over {name: parameter}: `perturb(params, seed, sigma)`, `restore(params, seed, sigma)`
(what undoes it: the same noise once more, subtracted) and `update(params, seeds, coefs)` (params += sum_i coefs[i] *
noise(seeds[i])). They draw other noise than es_kernels and than each other; what they share is the work.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


class Bytes(NamedTuple):
    """What is held at the most beside bf16 weights on a GPU."""

    a_value: int = 0  # of the whole model
    of_largest: int = 0  # a value of its largest tensor

    def __call__(self, sizes):
        """Of a model with tensors of these sizes."""
        return self.a_value * sum(sizes) + self.of_largest * max(sizes)


class Baseline(NamedTuple):
    perturb: Callable
    restore: Callable
    update: Callable
    member_bytes: Bytes
    update_bytes: Bytes
    only_on: str | None = None  # "cuda": needs a GPU
    empties_cache: bool = False


def _generator(params, seed):
    return torch.Generator(device=next(iter(params.values())).device).manual_seed(seed)


# ---- es-at-scale's worker: for every tensor a generator and a temporary; the cache emptied; updates summed in f32 ----


def _at_scale_add(params, seed, scale):
    for p in params.values():
        noise = torch.randn(
            p.shape, dtype=p.dtype, device=p.device, generator=torch.Generator(device=p.device).manual_seed(seed)
        )
        p.add_(scale * noise)
        del noise
    if p.is_cuda:
        torch.cuda.synchronize(p.device)
        torch.cuda.empty_cache()


def _at_scale_update(params, seeds, coefs):
    for p in params.values():
        total = torch.zeros_like(p, dtype=torch.float32)
        for seed, coef in zip(seeds, coefs, strict=True):
            noise = torch.randn(
                p.shape, dtype=p.dtype, device=p.device, generator=torch.Generator(device=p.device).manual_seed(seed)
            )
            total.add_(noise, alpha=coef)
            del noise
        p.add_(total.to(p.dtype))
        del total
    if p.is_cuda:
        torch.cuda.synchronize(p.device)
        torch.cuda.empty_cache()


# ---- the same without its waste: one generator a member, one scratch tensor of the largest size, no waiting ----


def _scratch(params, dtype=None):
    largest = max(params.values(), key=torch.Tensor.numel)
    return torch.empty(largest.numel(), dtype=dtype or largest.dtype, device=largest.device)


def _plain_add(params, seed, scale):
    generator, scratch = _generator(params, seed), _scratch(params)
    for p in params.values():
        p.add_(scratch[: p.numel()].view(p.shape).normal_(generator=generator), alpha=scale)


def _plain_update(params, seeds, coefs):
    """Each seed's generator goes on from tensor to tensor, so that one accumulator of the largest size serves all."""
    generators = [_generator(params, seed) for seed in seeds]
    scratch, totals = _scratch(params), _scratch(params, torch.float32)
    for p in params.values():
        noise, total = scratch[: p.numel()].view(p.shape), totals[: p.numel()].view(p.shape).zero_()
        for generator, coef in zip(generators, coefs, strict=True):
            total.add_(noise.normal_(generator=generator), alpha=coef)
        p.add_(total)


# ---- torch._foreach: the noise of the whole model at once, added by few launches ----


def _foreach_noise(params, seed):
    generator = _generator(params, seed)
    return [torch.empty_like(p).normal_(generator=generator) for p in params.values()]


def _foreach_add(params, seed, scale):
    torch._foreach_add_(list(params.values()), _foreach_noise(params, seed), alpha=scale)


def _foreach_update(params, seeds, coefs):
    total = [torch.zeros_like(p, dtype=torch.float32) for p in params.values()]
    for seed, coef in zip(seeds, coefs, strict=True):
        torch._foreach_add_(total, _foreach_noise(params, seed), alpha=coef)
    torch._foreach_add_(list(params.values()), total)


# ---- torch.compile of the expression: Inductor makes the noise inside the fused kernel, on a GPU by its Philox ----


def _add_one(p, scale):
    p.add_(scale * torch.randn_like(p))


def _accumulate(total, like, coef):
    total.add_(coef * torch.randn_like(like))


@functools.cache
def _compiled(function):
    """Compiled when it is first used: as decorators, torch.compile would load the compiler (2 s) with this module."""
    return torch.compile(function, dynamic=True)


def _compiled_add(params, seed, scale):
    torch.manual_seed(seed)
    scale = torch.tensor(scale)  # a number would be compiled in: one more compilation for every sigma
    for p in params.values():
        _compiled(_add_one)(p.view(-1), scale)  # flat: one compilation for all shapes


def _compiled_update(params, seeds, coefs):
    """Accumulates the whole model: a global generator gives a tensor its noise only after that of all tensors before
    it."""
    totals = [torch.zeros_like(p, dtype=torch.float32) for p in params.values()]
    for seed, coef in zip(seeds, coefs, strict=True):
        torch.manual_seed(seed)
        coef = torch.tensor(coef)
        for p, total in zip(params.values(), totals, strict=True):
            _compiled(_accumulate)(total.view(-1), p.view(-1), coef)
    torch._foreach_add_(list(params.values()), totals)


# ---- Triton's tl.randn: what one would write in an afternoon; one launch a tensor, noise by the element's index ----

if triton:

    @triton.jit(do_not_specialize=["tensor"])
    def _randn_add(p, n, tensor, seeds, coefs, n_seeds, BLOCK: tl.constexpr):
        # Int32: with 64 bits tl.randn would turn to the slower Philox4x64
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(p + at, mask=at < n).to(tl.float32)
        for i in range(n_seeds):
            x += tl.load(coefs + i) * tl.randn(tl.load(seeds + i) + tensor, at)
        tl.store(p + at, x.to(p.dtype.element_ty), mask=at < n)


def _randn_update(params, seeds, coefs):
    device = next(iter(params.values())).device
    seeds, coefs = torch.tensor(seeds, device=device), torch.tensor(coefs, device=device)
    for k, p in enumerate(params.values()):
        _randn_add[(triton.cdiv(p.numel(), 1024),)](p, p.numel(), k, seeds, coefs, len(seeds), BLOCK=1024)


# ---- MeZO's loop: torch's global generator seeded once, torch.normal for every tensor, out of place ----


def _mezo_add(params, seed, scale):
    torch.manual_seed(seed)
    for p in params.values():
        z = torch.normal(mean=0, std=1, size=p.shape, device=p.device, dtype=p.dtype)
        p.copy_(p + z * scale)


def _mezo_update(params, seeds, coefs):
    for seed, coef in zip(seeds, coefs, strict=True):
        _mezo_add(params, seed, coef)


def _baseline(add, update, *temporaries, **options):
    return Baseline(add, lambda params, seed, sigma: add(params, seed, -sigma), update, *temporaries, **options)


# Beside each what it holds: a temporary in bf16 is 2 bytes, a sum in f32 is 4.
BASELINES = {
    "es-at-scale": _baseline(_at_scale_add, _at_scale_update, Bytes(0, 4), Bytes(0, 6), empties_cache=True),
    "es-at-scale, without waste": _baseline(_plain_add, _plain_update, Bytes(0, 2), Bytes(0, 6)),
    "torch._foreach": _baseline(_foreach_add, _foreach_update, Bytes(2), Bytes(6)),
    "torch.compile": _baseline(_compiled_add, _compiled_update, Bytes(), Bytes(4)),
    "MeZO": _baseline(_mezo_add, _mezo_update, Bytes(0, 6), Bytes(0, 6)),
    "Triton tl.randn": _baseline(
        lambda params, seed, scale: _randn_update(params, [seed], [scale]),
        _randn_update,
        Bytes(),
        Bytes(),
        only_on="cuda",
    ),
}


def available(device):
    """The baselines that run on a device type."""
    return {
        name: baseline
        for name, baseline in BASELINES.items()
        if baseline.only_on in (None, device) and (triton or "Triton" not in name)
    }
