"""`EvolutionStrategy`: the ES of arXiv:2509.24372 as a torch optimizer. It decides what to add; es_kernels adds it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

import es_kernels
from es_kernels.noise import MEMBER_NOISE, MEMBER_ROUNDING, UPDATE_ROUNDING, member_seed

BASES = ("fp32", "copy", None)
ROUNDINGS = ("nearest", "stochastic")


class Update(NamedTuple):
    """What one generation did; with lr and weight decay it is all that a replay of the update needs."""

    generation: int  # counted from 0
    mean: float  # of the rewards of the members not dropped
    scored: int  # how many members that is
    z: tuple[float, ...] | None  # f32 values, 0 for dropped members; None: all rewards were equal, nothing was changed


class EvolutionStrategy(torch.optim.Optimizer):
    """Evolution strategies on named parameters, with forward passes only.

        optimizer = EvolutionStrategy(model.named_parameters(), sigma=1e-3, lr=5e-4, population=30, seed=0)
        for _ in range(generations):
            mean_reward = optimizer.step(lambda: reward_of(model))       # reward_of is called 30 times

    A generation, for member i = 0 .. N - 1 with noise eps_i ~ N(0, I) from its own seed:

        R_i = reward(theta + sigma * eps_i)
        Z_i = (R_i - mean R) / std R                                        (std with ddof 0)
        theta <- theta - decay * (theta - anchor) + lr / N * sum_i Z_i * eps_i,   decay = lr * weight_decay

    theta is kept apart from the live weights that the model computes with (`base`), so that undoing a perturbation is exact.
    live == round-to-nearest(theta) after construction, `step`, `tell`, `load_state_dict` and on leaving `perturbed`, by
    exception too. Equal rewards give equal bits of theta on every device and backend.

    params:      `model.named_parameters()`, an iterable of (name, tensor), or of dicts {"params": such an iterable,
                 "sigma": ..., "lr": ..., "weight_decay": ..., "anchored": ...}. A name decides its tensor's noise, so
                 unnamed parameters are refused. Those that do not require grad are left out; of tied ones the first name
                 counts. f32, bf16 and f16 may be mixed.
    sigma, lr:   scale of the noise and of the step, per group. The paper: 1e-3 and sigma / 2.
    weight_decay, anchored:  decay toward zero, or with anchored=True toward the weights at construction (of which it keeps
                 a copy in storage precision); per group.
    population:  members per generation, at least 2; even with antithetic.
    seed:        of the whole run, any u64. Generation and member number are the only other sources of the noise.
    base:        where theta lives. "fp32": an f32 copy, 4 bytes a parameter, the update loses nothing. "copy": a copy in the
                 storage dtype. None: the live weights themselves, nothing extra; bf16 and f16 weights then drift by
                 rounding, as in the paper's code (one generation of 30 members leaves 48% of bf16 weights changed).
    antithetic:  members 2k and 2k + 1 use the same noise with opposite signs.
    perturb_rounding, update_rounding:  "nearest" or "stochastic", for writing theta + sigma * eps into live and the update
                 into theta. The update rounds stochastically by default where theta is a "copy", since bf16 would lose
                 most small steps (N = 30, weights of scale 0.1: 53%), else to nearest.

    Momentum or gradients do not exist here; `step` and the closure run without autograd.
    """

    def __init__(
        self,
        params,
        *,
        sigma: float = 1e-3,
        lr: float = 5e-4,
        weight_decay: float = 0.0,
        anchored: bool = False,
        population: int = 30,
        seed: int = 0,
        base: str | None = "fp32",
        antithetic: bool = False,
        perturb_rounding: str = "nearest",
        update_rounding: str | None = None,
    ):
        if base not in BASES:
            raise ValueError(f'base must be "fp32", "copy" or None, not {base!r}')
        if update_rounding is None:
            update_rounding = "stochastic" if base == "copy" else "nearest"
        for option, rounding in (("perturb_rounding", perturb_rounding), ("update_rounding", update_rounding)):
            if rounding not in ROUNDINGS:
                raise ValueError(f'{option} must be "nearest" or "stochastic", not {rounding!r}')
        if base is None and perturb_rounding != "nearest":
            raise ValueError('perturb_rounding="stochastic" needs a base to return to: choose base="fp32" or "copy"')
        if population < 2:
            raise ValueError(f"population must be at least 2, not {population}: one reward alone has no direction")
        if antithetic and population % 2:
            raise ValueError(f"antithetic members come in pairs: population must be even, not {population}")
        self.base = base
        self.population = population
        self.seed = seed
        self.antithetic = antithetic
        self.perturb_rounding = perturb_rounding
        self.update_rounding = update_rounding
        self.generation = 0
        self._weights: list[_Weights] = []
        self._clock = _KernelClock()
        super().__init__(params, {"sigma": sigma, "lr": lr, "weight_decay": weight_decay, "anchored": anchored})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, named as in the constructor; group options left out take the constructor's values."""
        group = {**self.defaults, **param_group}
        if not (group["sigma"] > 0 and math.isfinite(group["sigma"])):
            raise ValueError(f"sigma must be a positive number, not {group['sigma']}")
        for option in ("lr", "weight_decay"):
            if not (group[option] >= 0 and math.isfinite(group[option])):
                raise ValueError(f"{option} must be a number >= 0, not {group[option]}")
        named = self._select(group["params"])
        weights = _Weights.of(named, self.base, group["anchored"])
        super().add_param_group({**group, "params": list(named.items())})
        self._weights.append(weights)

    def _select(self, params) -> dict[str, torch.Tensor]:
        """The parameters to perturb, by name: no frozen ones, no second name of a tied one."""
        if isinstance(params, torch.Tensor):
            params = [params]
        taken = {name for weights in self._weights for name in weights.live.names}
        seen = {id(p) for group in self.param_groups for p in group["params"]}
        named: dict[str, torch.Tensor] = {}
        for entry in params:
            if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], torch.Tensor)):
                raise ValueError("EvolutionStrategy makes a tensor's noise from its name: pass model.named_parameters(), not unnamed parameters")
            name, parameter = entry
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            if name in named or name in taken:
                raise ValueError(f"two different parameters are named {name!r}; they would get the same noise")
            named[name] = parameter
            seen.add(id(parameter))
        if not named:
            raise ValueError("no parameter to tune in this group: each is frozen (requires_grad=False) or already in another group")
        return named

    # --- one generation ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float]) -> float:
        """Run one generation: call `closure` once per member, with that member's weights in place, then update.

        closure() returns the member's reward, higher is better. Returns the mean reward. If closure raises, or returns
        something that is no finite number, theta is unchanged and live is theta again.
        """
        self._refuse_if_perturbed("step()")
        rewards: list[float] = []
        try:
            for member in self.ask():
                self._move_to(member)
                rewards.append(_finite(closure(), member))
            return self._update(rewards).mean
        except BaseException:
            self._move_to(None)
            raise

    def ask(self) -> range:
        """The members of this generation. Evaluate each inside `perturbed(member)`, in any order, then `tell`."""
        return range(self.population)

    @contextmanager
    def perturbed(self, member: int) -> Iterator[None]:
        """Within the `with` block the model computes with theta + sigma * eps of this member of this generation."""
        self._refuse_if_perturbed("perturbed()")
        if member not in self.ask():
            raise ValueError(f"member must be in 0..{self.population - 1}, not {member}")
        try:
            self._move_to(member)
            yield
        finally:
            self._move_to(None)

    def tell(self, fitness: Sequence[float], dropped: Collection[int] = ()) -> Update:
        """Update theta from the reward of every member, in member order, and begin the next generation.

        A missing (None) or non-finite reward is refused with ValueError and nothing changed, unless its member is named in
        `dropped`: then mean, std and N are over the rest. With antithetic, a dropped member's partner goes too.
        """
        self._refuse_if_perturbed("tell()")
        if len(fitness) != self.population:
            raise ValueError(f"tell() needs {self.population} rewards, one per member, and got {len(fitness)}")
        out = set(dropped)
        if not out <= set(self.ask()):
            raise ValueError(f"dropped members must be in 0..{self.population - 1}, not {sorted(out - set(self.ask()))}")
        if self.antithetic:
            out |= {member ^ 1 for member in out}
        rewards = [None if member in out else _finite(reward, member) for member, reward in enumerate(fitness)]
        if len(out) == self.population:
            raise ValueError("every member was dropped: there is nothing to learn from")
        update = self._update(rewards)
        self._opt_called = True  # as LR schedulers mark a call of step()
        return update

    def _update(self, rewards: Sequence[float | None]) -> Update:
        scored = [reward for reward in rewards if reward is not None]
        z = z_scores(rewards)
        # All numbers before any weight: one that is no number is refused here, with nothing changed.
        seeds = [self._noise_seed(m) for m in self.ask()[:: 2 if self.antithetic else 1]]
        coefs = [self._coefs(z, len(scored), group["lr"]) for group in self.param_groups]
        if self.base is None:
            self._move_to(None)
        for group, coefs_of_group, weights in zip(self.param_groups, coefs, self._weights):
            if z is not None:
                decay = float(np.float32(group["lr"] * group["weight_decay"]))
                pull = {"decay": decay, "anchor": weights.anchor} if decay else {}
                self._add(weights.theta, seeds, coefs_of_group, **pull, **self._rounding(self.update_rounding, 0, UPDATE_ROUNDING))
            if self.base is not None:
                self._add(weights.live, [], [], base=weights.theta)
                weights.inside = None
        update = Update(self.generation, math.fsum(scored) / len(scored), len(scored), z)
        self.generation += 1
        return update

    def _coefs(self, z: tuple[float, ...] | None, scored: int, lr: float) -> list[float]:
        """Coefficient of each noise seed, f32: lr / N * Z in f64, from the f32 Z, cast once."""
        if z is None:
            return []
        if not math.isfinite(lr):
            raise ValueError(f"lr must be a number, not {lr}")
        if self.antithetic:
            z = [plus - minus for plus, minus in zip(z[::2], z[1::2])]
        return [float(np.float32(lr / scored * value)) for value in z]

    def _move_to(self, member: int | None) -> None:
        """Make live the weights of this member, or with None theta itself."""
        for group, weights in zip(self.param_groups, self._weights):
            if member is None and weights.inside is None:
                continue
            sign = -1.0 if self.antithetic and member is not None and member % 2 else 1.0
            target = None if member is None else (self._noise_seed(member), sign * group["sigma"])
            if self.base is None:
                # One pass takes the old member out and puts the new one in.
                terms = [] if weights.inside is None else [(weights.inside[0], -weights.inside[1])]
                terms += [] if target is None else [target]
                self._add(weights.live, *zip(*terms))
                weights.inside = target
            elif target is None:
                self._add(weights.live, [], [], base=weights.theta)
                weights.inside = None
            else:
                weights.inside = target  # before the write: if it is interrupted, live must be written again
                rounding = self._rounding(self.perturb_rounding, member, MEMBER_ROUNDING)
                self._add(weights.live, [target[0]], [target[1]], base=weights.theta, **rounding)

    def _add(self, out: es_kernels.ParamTable, seeds, coefs, **options) -> None:
        with torch.no_grad(), self._clock.on(out):
            es_kernels.add_noise_(out, seeds, coefs, **options)

    def _rounding(self, rounding: str, member: int, purpose: int) -> dict[str, Any]:
        return {"rounding": rounding, "rounding_seed": self._seed(member, purpose)} if rounding == "stochastic" else {}

    def _seed(self, member: int, purpose: int) -> int:
        return member_seed(self.seed, self.generation, member, purpose)

    def _noise_seed(self, member: int) -> int:
        return self._seed(member // 2 if self.antithetic else member, MEMBER_NOISE)

    def _refuse_if_perturbed(self, what: str) -> None:
        if any(weights.inside is not None for weights in self._weights):
            raise RuntimeError(f"{what} was called while a member's noise is in the weights: leave perturbed() or step() first")

    # --- looking at it, saving it ------------------------------------------------------------------------------------

    @property
    def kernel_seconds(self) -> float:
        """Seconds spent in es_kernels so far; waits for the device if there is one."""
        return self._clock.seconds()

    def fingerprint(self, of: str = "theta") -> int:
        """64-bit fingerprint of "theta" or "live" over all groups: equal weights, equal number, on every machine."""
        with torch.no_grad():
            return sum(es_kernels.fingerprint(getattr(weights, of)) for weights in self._weights) % 2**64

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim, plus "es" with theta (references, not copies), generation and the run's settings.

        With the same model built again, `load_state_dict` of it continues to the same bits.
        """
        self._refuse_if_perturbed("state_dict()")
        state = super().state_dict()
        state["es"] = {
            "noise_version": es_kernels.noise.VERSION,
            "base": self.base,
            **{key: getattr(self, key) for key in _SETTINGS},
            "theta": _tensors(weights.theta for weights in self._weights),
            "anchor": _tensors(weights.anchor for weights in self._weights if weights.anchor is not None),
        }
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict()`: theta, live, generation, seed, population, group options. ValueError, with nothing
        changed, where the state is of another noise version, another base, or other tensors."""
        self._refuse_if_perturbed("load_state_dict()")
        saved = state_dict.get("es")
        if saved is None:
            raise ValueError("this is no state of an EvolutionStrategy: it has no entry 'es'")
        for key, here in (("noise_version", es_kernels.noise.VERSION), ("base", self.base)):
            if saved[key] != here:
                raise ValueError(f"the saved state has {key} {saved[key]!r}, this optimizer {here!r}")
        mine = self.state_dict()["es"]
        for kind in ("theta", "anchor"):
            described = [{name: (t.dtype, tuple(t.shape)) for name, t in es[kind].items()} for es in (saved, mine)]
            if described[0] != described[1]:
                different = sorted(name for name in described[0].keys() | described[1].keys() if described[0].get(name) != described[1].get(name))
                raise ValueError(f"the saved {kind} and this optimizer's differ in {len(different)} tensor(s), e.g. {different[0]!r}")
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for kind in ("theta", "anchor"):
            for name, tensor in mine[kind].items():
                tensor.copy_(saved[kind][name])
        for key in _SETTINGS:
            setattr(self, key, saved[key])
        if self.base is not None:
            for weights in self._weights:
                self._add(weights.live, [], [], base=weights.theta)


_SETTINGS = ("generation", "seed", "population", "antithetic", "perturb_rounding", "update_rounding")


def z_scores(rewards: Sequence[float | None]) -> tuple[float, ...] | None:
    """(R - mean) / std in f64 (fsum, ddof 0), cast to f32 once; 0 for a dropped member (None).

    None if all rewards are equal. That is asked of the rewards and not of std: thirty times 0.015 has std 1.7e-18.
    """
    scored = [reward for reward in rewards if reward is not None]
    if max(scored) == min(scored):
        return None
    mean = math.fsum(scored) / len(scored)
    std = math.sqrt(math.fsum((reward - mean) ** 2 for reward in scored) / len(scored))
    if std == 0:  # the squares underflowed: a spread below 1e-162
        return None
    return tuple(0.0 if reward is None else float(np.float32((reward - mean) / std)) for reward in rewards)


@dataclass
class _Weights:
    """One param_group as parameter tables over the same names, built once."""

    live: es_kernels.ParamTable  # what the model computes with
    theta: es_kernels.ParamTable  # the exact weights; the same table as live where base=None
    anchor: es_kernels.ParamTable | None
    inside: tuple[int, float] | None = None  # seed and coefficient of the noise now in live

    @classmethod
    def of(cls, named: dict[str, torch.Tensor], base: str | None, anchored: bool) -> _Weights:
        live = es_kernels.ParamTable(named)

        def copy(dtype: torch.dtype | None) -> es_kernels.ParamTable:
            return es_kernels.ParamTable({n: t.detach().to(dtype or t.dtype, copy=True) for n, t in zip(live.names, live.tensors)})

        theta = live if base is None else copy(torch.float32 if base == "fp32" else None)
        return cls(live, theta, copy(None) if anchored else None)


class _KernelClock:
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
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin

    def seconds(self) -> float:
        while self._events:
            begin, end = self._events.pop()
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        return self._seconds


def _finite(reward: Any, member: int) -> float:
    try:
        value = float(reward)
    except (TypeError, ValueError):
        raise ValueError(f"the reward of member {member} must be one number, not {reward!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"the reward of member {member} is {value}; a member that failed must be declared dropped")
    return value


def _tensors(tables) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for table in tables for name, tensor in zip(table.names, table.tensors)}
