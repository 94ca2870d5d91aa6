"""`EvolutionStrategy`: the ES of arXiv:2509.24372 as a torch optimizer. It decides what to add; es_kernels adds it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

import es_kernels
from es_finetune.errors import UserError
from es_finetune.models.checkpoint_names import has_plain_memory
from es_finetune.models.members import MemberNoise
from es_finetune.optim import dtensor
from es_finetune.optim.options import as_f32, check_group, check_options
from es_finetune.optim.update import Update, checked_reward, make_update
from es_finetune.optim.weights import GroupWeights, Inside, KernelClock, Step
from es_kernels import NamedTensor
from es_kernels.noise import MEMBER_NOISE, MEMBER_ROUNDING, UPDATE_ROUNDING, member_seed, member_seeds

_Result = TypeVar("_Result")


class EvolutionStrategy(torch.optim.Optimizer):
    """Evolution strategies on named parameters, with forward passes only.

        optimizer = EvolutionStrategy(model.named_parameters(), sigma=1e-3, lr=5e-4, population=30, seed=0)
        for _ in range(generations):
            mean_reward = optimizer.step(lambda: reward_of(model))       # reward_of is called 30 times

    A generation, for member i = 0 .. N - 1 with noise eps_i ~ N(0, I) from its own seed:

        R_i = reward(theta + sigma * eps_i)
        Z_i = (R_i - mean R) / std R                                        (std with ddof 0; see shaping)
        theta <- theta - decay * (theta - anchor) + lr / N * sum_i Z_i * eps_i,   decay = lr * weight_decay

    theta is kept apart from the live weights that the model computes with (`master`), so that undoing a perturbation is
    exact. live == round-to-nearest(theta) after construction, `step`, `tell`, `evaluate`, `restore`, `apply`, `replay`,
    `load_state_dict` and on leaving `perturbed`, by exception too. Equal rewards give equal bits of theta on every
    device and backend.

    If others write the weights between two of these calls (another optimizer, the model's load_state_dict, a merge),
    call `adopt_live` before the next one. Until then each of them raises RuntimeError, since it would undo that write.
    To notice it they compare the fingerprint of live: a read of live once a generation in `step` and `evaluate`, once a
    member in `perturbed`. With master=None live is theta, whoever writes it.

    There are no gradients here. `step`, `evaluate` and their closures run without autograd.

    Args:
        params: `model.named_parameters()`, an iterable of (name, tensor), or of dicts {"params": such an iterable,
            "sigma": ..., "lr": ..., "weight_decay": ..., "anchored": ..., "noise_rank": ...}. Tensors of any shape;
            f32, bf16 and f16 may be mixed. A name decides its tensor's noise, so unnamed parameters are refused. A
            tensor that a checkpoint holds as several is (name, tensor, [es_kernels.Segment, ...]): its noise is then
            that of the segments' names. Parameters that do not require grad are left out. Of tied ones the first name
            counts. A DTensor is perturbed where it lies, with the noise of its place in the whole tensor
            (es_finetune.optim.dtensor).
        sigma: Scale of the noise, in units of the weights, positive; per group. Read in every generation. The paper:
            1e-3.
        lr: Scale of the step, in units of the weights; per group. Read in every generation. The paper: sigma / 2.
        weight_decay: Decay toward zero by lr * weight_decay a generation; per group.
        anchored: Decay toward the weights at construction instead, of which a copy in the storage dtype is kept; per
            group.
        noise_rank: 0: every element of eps is drawn by itself. 1 to 64: the noise of a matrix is of this rank, L R^T /
            sqrt(noise_rank), which is much faster to add, above all in the update; its elements still have mean 0 and
            variance 1, so that sigma and lr keep their meaning. A matrix is a parameter of two dimensions, or what its
            Segments' width says; all others draw as with 0. Per group; for the whole run, since momentum makes the
            noise of past generations again with the present rank.
        population: Members per generation, at least 2; even with antithetic.
        seed: Of the whole run, an int of 64 bits. Generation and member number are the only other sources of the noise.
        master: Where theta lives.

            - "fp32": an f32 copy, 4 bytes a parameter. The update loses nothing.
            - "copy": a copy in the storage dtype.
            - "host": the bits of "fp32", in host memory. If the weights are on a GPU, it is pinned; the GPU reads it
              over the bus for every member, and the CPU computes the update.
            - None: the live weights themselves, nothing extra. Each member is subtracted again, and bf16 and f16
              weights drift by rounding. At the paper's setting a generation of 30 members that learns nothing changes
              24% of bf16 weights, by half a step (rms).
        antithetic: Members 2k and 2k + 1 use the same noise with opposite signs.
        shaping: How rewards become Z. "zscore"; "ranks": only their order counts; "per_prompt": a member's reward is a
            sequence, one number per prompt, and each prompt counts the same. Z has mean 0 and std 1 with all three, so
            lr keeps its meaning (es_finetune.optim.shaping).
        momentum: Heavy ball, 0 <= momentum < 1, as in torch's SGD without dampening, over the last `momentum_window`
            generations. No state tensor: the update makes the noise of each of them again, oldest first, with
            coefficient lr / N * momentum^age * Z, at the present lr and the N and Z of that generation. A generation
            without signal changes nothing and is not part of any sum, but the others age by it.
        momentum_window: How many generations count for momentum, the present one included.
        perturb_rounding: "nearest" or "stochastic", for writing theta + sigma * eps into live.
        update_rounding: "nearest" or "stochastic", for writing the update into theta. None: "stochastic" where theta is
            kept in the storage dtype ("copy" and None), since bf16 would lose most small steps (N = 30, weights of
            scale 0.1: 53%); else "nearest".

    Attributes:
        generation: Number of the present generation, from 0. `step`, `tell`, `apply` and `replay` add 1.
        param_groups: As in any torch optimizer. Set a group's sigma, lr and weight_decay between generations; LR
            schedulers do.
        master, population, seed, antithetic, shaping, momentum, momentum_window, perturb_rounding, update_rounding: As
            passed, or the default.

    Raises:
        UserError: An option has a value that it cannot have, or not together with another; a parameter is unnamed or
            quantised; two have one name; or a group has none that requires grad.
        TypeError, ValueError: The kernels cannot work on a tensor, as `es_kernels.ParamTable` says.
        RunError: CUDA cannot pin the host memory of master="host".
    """

    def __init__(
        self,
        params,
        *,
        sigma: float = 1e-3,
        lr: float = 5e-4,
        weight_decay: float = 0.0,
        anchored: bool = False,
        noise_rank: int = 0,
        population: int = 30,
        seed: int = 0,
        master: str | None = "fp32",
        antithetic: bool = False,
        shaping: str = "zscore",
        momentum: float = 0.0,
        momentum_window: int = 8,
        perturb_rounding: str = "nearest",
        update_rounding: str | None = None,
    ):
        options = check_options(
            population=population,
            seed=seed,
            master=master,
            antithetic=antithetic,
            shaping=shaping,
            momentum=momentum,
            momentum_window=momentum_window,
            perturb_rounding=perturb_rounding,
            update_rounding=update_rounding,
        )
        self.master: str | None = master
        self.population: int = options["population"]
        self.seed: int = options["seed"]
        self.antithetic: bool = antithetic
        self.shaping: str = shaping
        self.momentum: float = options["momentum"]
        self.momentum_window: int = options["momentum_window"]
        self.perturb_rounding: str = perturb_rounding
        self.update_rounding: str = options["update_rounding"]
        self.generation = 0
        self._history: list[Update] = []  # with momentum: those with signal that the next update may need
        self._weights: list[GroupWeights] = []
        self._clock = KernelClock()
        super().__init__(
            params,
            {"sigma": sigma, "lr": lr, "weight_decay": weight_decay, "anchored": anchored, "noise_rank": noise_rank},
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, named as in the constructor.

        Args:
            param_group: {"params": ..., and any of "sigma", "lr", "weight_decay", "anchored", "noise_rank"}. Options
                left out take the constructor's values.

        Raises:
            UserError: As the constructor. Nothing was added.
        """
        group = {**self.defaults, **param_group}
        group |= check_group(**{name: group[name] for name in ("sigma", "lr", "weight_decay", "noise_rank")})
        entries = self._select(group["params"])
        weights = GroupWeights.of(entries, self.master, group["anchored"])
        super().add_param_group({**group, "params": [(entry.name, entry.tensor) for entry in entries]})
        self._weights.append(weights)

    def _select(self, params) -> list[NamedTensor]:
        """The parameters to perturb: no frozen ones, no second name of a tied one."""
        if isinstance(params, torch.Tensor):
            params = [params]
        taken = {name for weights in self._weights for name in weights.names()}
        seen = {id(p) for group in self.param_groups for p in group["params"]}
        entries: list[NamedTensor] = []
        for entry in params:
            if not _is_named(entry):
                raise UserError(
                    "EvolutionStrategy makes a tensor's noise from its name: pass model.named_parameters(), not "
                    "unnamed parameters (an entry is (name, tensor) or (name, tensor, [es_kernels.Segment, ...]))"
                )
            name, parameter, segments = NamedTensor(*entry)
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            if not has_plain_memory(parameter):
                kind = type(parameter).__name__
                raise UserError(
                    f"{name!r} is a {kind}, whose values are not in its memory as they are: give the unquantised "
                    "weights"
                )
            clash = {name, *(segment.name for segment in segments or ())} & taken  # within a group es_kernels looks
            if clash:
                raise UserError(f"two different parameters are named {min(clash)!r}; they would get the same noise")
            entries.append(NamedTensor(name, parameter, segments))
            seen.add(id(parameter))
        if not entries:
            raise UserError(
                "no parameter to tune in this group: each is frozen (requires_grad=False) or already in another group"
            )
        return entries

    # --- one generation ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(  # type: ignore[override]  # there is nothing to do without rewards
        self, closure: Callable[[], float | Sequence[float]]
    ) -> float:
        """Run one generation: call `closure` once per member, with that member's weights in place, then update.

        If closure raises or a reward is refused, theta is unchanged and live is theta again.

        Args:
            closure: Returns the member's reward, higher is better: a finite number of at most 1e100 in size. With
                shaping="per_prompt" a sequence of them, one per prompt.

        Returns:
            The mean reward of the members.

        Raises:
            UserError: A reward is something else, or float32 does not hold the step that lr makes.
            RuntimeError: A member is in place, or others wrote the weights.
        """
        self._refuse_if_perturbed("step()")
        try:
            rewards = []
            for member in self.ask():
                self.perturb(member)
                rewards.append(checked_reward(closure(), member, self.shaping))
            self._refuse_changed()
            return self._apply(self._shaped(rewards)).reward  # writes live, so that restoring it first would be in vain
        except BaseException:
            self._put_back()
            raise

    @torch.no_grad()
    def evaluate(self, closure: Callable[[int], _Result]) -> list[_Result]:
        """Call `closure(member)` once per member of this generation, in order, with that member's weights in place.

        Nothing is updated. live is theta afterwards, by exception too.

        Args:
            closure: Takes the member's number, 0 .. N - 1, and returns anything.

        Returns:
            What closure returned, in member order: for `tell`, or for anything else.

        Raises:
            RuntimeError: A member is in place, or others wrote the weights.
        """
        self._refuse_if_perturbed("evaluate()")
        results = []
        with self._restored():
            for member in self.ask():
                self.perturb(member)
                results.append(closure(member))
        return results

    def ask(self) -> range:
        """The members of this generation: evaluate each inside `perturbed(member)`, in any order, then `tell`.

        Returns:
            Their numbers, 0 .. N - 1.
        """
        return range(self.population)

    @contextmanager
    def perturbed(self, member: int) -> Iterator[None]:
        """Within the `with` block the model computes with theta + sigma * eps of this member of this generation.

        Args:
            member: Its number, 0 .. N - 1.

        Raises:
            UserError: There is no such member.
            RuntimeError: A member is in place, or others wrote the weights.
        """
        self._refuse_if_perturbed("perturbed()")
        with self._restored():
            self.perturb(member)
            yield

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """`restore` at the end; after an exception without its check, which would hide that one."""
        try:
            yield
        except BaseException:
            self._put_back()
            raise
        self.restore()

    def tell(self, fitness: Sequence[float] | Sequence[Sequence[float]], dropped: Collection[int] = ()) -> Update:
        """Update theta from the reward of every member, in member order, and begin the next generation.

        Args:
            fitness: N rewards. With shaping="per_prompt" a sequence for each member, one number per prompt.
            dropped: Members whose reward is left out, missing (None) or not finite as it may be: mean, std and N are
                then over the rest. With antithetic, a dropped member's partner goes too.

        Returns:
            The update, as `replay` and a log take it.

        Raises:
            UserError: The reward of a member that is not in `dropped` is missing, not finite or beyond 1e100 in size,
                all members were dropped, or float32 does not hold the step that lr makes. Nothing was changed.
            RuntimeError: A member is in place, or others wrote the weights. Nothing was changed.
        """
        self._refuse_if_perturbed("tell()")
        self._refuse_changed()
        return self._apply(self._shaped(fitness, dropped))

    def replay(self, update: Update) -> Update:
        """Do again what a recorded `update` of this generation did, from its z and scored, without evaluating anything.

        The bits are those of the original run if the options of the param_groups are the same as then, and the
        generations before were replayed too. With master=None each member leaves its rounding. All members are
        therefore repeated, in the order of `step` and `evaluate`; what `perturbed` did cannot be repeated.

        Args:
            update: Of this generation and population.

        Returns:
            The same update.

        Raises:
            UserError: The update is of another generation or population, or float32 does not hold the step that lr
                makes. Nothing was changed.
            RuntimeError: A member is in place, or others wrote the weights. Nothing was changed.
        """
        self._refuse_if_perturbed("replay()")
        self._refuse_changed()
        self._refuse_other(update)
        if self.master is None:
            self.evaluate(lambda member: None)
        return self._apply(update)

    @torch.no_grad()
    def apply(self, update: Update) -> Update:
        """Do this `update` of this generation, and begin the next one: as `tell`, with rewards that are already shaped.

        Args:
            update: Of this generation and population, as `make_update` gives it.

        Returns:
            The same update.

        Raises:
            UserError: The update is of another generation or population, or float32 does not hold the step that lr
                makes. Nothing was changed.
            RuntimeError: A member is in place, or others wrote the weights. Nothing was changed.
        """
        self._refuse_if_perturbed("apply()")
        self._refuse_changed()
        self._refuse_other(update)
        return self._apply(update)

    def _refuse_other(self, update: Update) -> None:
        if update.generation != self.generation:
            raise UserError(
                f"the update is of generation {update.generation}, but this optimizer is at {self.generation}: replay "
                "in order"
            )
        if update.z is not None and len(update.z) != self.population:
            raise UserError(f"the update has {len(update.z)} values of z, but the population is {self.population}")

    def _shaped(self, fitness, dropped=()) -> Update:
        return make_update(
            self.generation,
            fitness,
            dropped,
            population=self.population,
            shaping=self.shaping,
            antithetic=self.antithetic,
        )

    def _apply(self, update: Update) -> Update:
        """Change theta by this update and those before it that momentum still carries, and begin the next
        generation."""
        history = [past for past in self._history if self.generation - past.generation < self.momentum_window]
        terms = [] if update.z is None else [*history, update]  # oldest first
        # All numbers before any weight: one that is no number is refused here, with nothing changed.
        seeds = [seed for term in terms for seed in self._noise_seeds(term)]
        coefs = [[coef for term in terms for coef in self._coefs(term, group["lr"])] for group in self.param_groups]
        decays = [as_f32(group["lr"] * group["weight_decay"]) for group in self.param_groups]
        for group, coefs_of_group, decay in zip(self.param_groups, coefs, decays, strict=True):
            if not all(map(math.isfinite, [*coefs_of_group, decay])):
                raise UserError(
                    f"lr {group['lr']} with weight_decay {group['weight_decay']} makes a step that float32 does not "
                    "hold: lower it"
                )
        if self.master is None:
            self._put_back()
        for group, coefs_of_group, decay, weights in zip(self.param_groups, coefs, decays, self._weights, strict=True):
            weights.step = Step()
            if terms:
                weights.proof = None  # until live is written too: an interrupt in between is nobody's change
                pull = {"decay": decay, "anchor": weights.anchor} if decay else {}
                weights.wait_for_readers()
                self._add(
                    weights.theta,
                    seeds,
                    coefs_of_group,
                    noise_rank=group["noise_rank"],
                    **pull,
                    **self._rounding(self.update_rounding, 0, UPDATE_ROUNDING),
                )
                weights.step = Step(seeds, coefs_of_group, decay, group["noise_rank"])
            if self.master is not None:
                self._restore(weights)
                if terms:
                    weights.prove()
        self._history = (terms or history) if self.momentum else []
        self.generation += 1
        self._opt_called = True  # as LR schedulers mark a call of step()
        return update

    def _noise_seeds(self, update: Update) -> list[int]:
        """Of the members of that generation, or of its antithetic pairs."""
        members = range(0, len(update.z or ()), 2 if self.antithetic else 1)
        return self._seeds_of(update.generation, members)

    def _coefs(self, update: Update, lr: float) -> list[float]:
        """Coefficient of each noise seed, f32: lr / N * momentum^age * Z in f64, from the f32 Z, cast once."""
        # The power as a product, because pow() is not exactly rounded and differs among machines.
        scale = lr / update.scored * math.prod([self.momentum] * (self.generation - update.generation))
        z: Sequence[float] = update.z or ()
        if self.antithetic:
            z = [plus - minus for plus, minus in zip(z[::2], z[1::2], strict=True)]
        return [as_f32(scale * value) for value in z]

    @torch.no_grad()
    def perturb(self, member: int) -> None:
        """Make the model compute with theta + sigma * eps of this member, whichever was in place before.

        `restore` ends it. `perturbed` and `evaluate` do so by themselves.

        Args:
            member: Its number, 0 .. N - 1.

        Raises:
            UserError: There is no such member, or float32 does not hold a group's sigma.
            RuntimeError: Others wrote the weights.
        """
        (wanted,) = self._noise_of([member])
        self._refuse_changed()
        if wanted == [weights.inside for weights in self._weights]:
            return
        if self.master is None:
            self._put_back()
        for weights, noise in zip(self._weights, wanted, strict=True):
            weights.inside = noise  # before the write: if it is interrupted, live must be written again
            source = (
                {}
                if self.master is None
                else {"base": weights.theta, **self._rounding(self.perturb_rounding, member, MEMBER_ROUNDING)}
            )
            self._write_live(weights, [noise.seed], [noise.coef], noise_rank=noise.noise_rank, **source)
        for weights in self._weights:
            weights.count_writes()

    def noise(self, members: Sequence[int]) -> list[MemberNoise]:
        """What these members would add to theta, for an engine that answers for all of them in one batch. No weight is
        changed; `tell` and `apply` update from their rewards as from any.

        Args:
            members: Their numbers, 0 .. N - 1.

        Returns:
            Of each param_group, in order.

        Raises:
            UserError: There is no such member, a group's noise is of full rank, or float32 does not hold its sigma.
        """
        if not all(group["noise_rank"] for group in self.param_groups):
            raise UserError("members can share a batch only if their noise is of low rank: set noise_rank to 1 or more")
        by_group = zip(*self._noise_of(members), strict=True)
        return [
            MemberNoise(weights.live.names, [n.seed for n in noise], [n.coef for n in noise], noise[0].noise_rank)
            for weights, noise in zip(self._weights, by_group, strict=True)
        ]

    def _noise_of(self, members: Sequence[int]) -> list[list[Inside]]:
        """What each member adds to each group."""
        for member in members:
            if member not in self.ask():
                raise UserError(f"member must be in 0..{self.population - 1}, not {member}")
        for group in self.param_groups:
            if not math.isfinite(as_f32(group["sigma"])):
                raise UserError(f"sigma must be a number that float32 holds, not {group['sigma']}")
        signs = [-1.0 if self.antithetic and member % 2 else 1.0 for member in members]
        return [
            [Inside(seed, sign * group["sigma"], group["noise_rank"]) for group in self.param_groups]
            for seed, sign in zip(self._seeds_of(self.generation, members), signs, strict=True)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Make the model compute with theta again, if a member is in place.

        Raises:
            RuntimeError: Others wrote the weights. With a member in place live is theta all the same.
        """
        try:
            self._refuse_changed()
        finally:
            self._put_back()

    def _put_back(self) -> None:
        """`restore`, whatever else was written."""
        for weights in self._weights:
            if weights.inside is None:
                continue
            if self.master is not None:
                self._restore(weights)
            else:
                # A pass of its own, before the next member's: most weights are then back where they were. Both in one
                # pass would save half the memory traffic and never come back: one rounding a member, which add up
                # (docs/develop/facts.md).
                noise = weights.inside
                self._write_live(weights, [noise.seed], [-noise.coef], noise_rank=noise.noise_rank)
                weights.inside = None

    def _restore(self, weights: GroupWeights) -> None:
        """live <- nearest(theta)."""
        self._write_live(weights, [], [], base=weights.theta)
        weights.inside = None
        # Theta may be loaded or freed next, and the allocator of pinned memory knows nothing of our kernels
        weights.wait_for_readers()

    def _write_live(self, weights: GroupWeights, seeds, coefs, **options) -> None:
        # All, since groups may be views of one tensor, as vLLM's q, k and v are, which share a count of writes
        for group in self._weights:
            group.versions = None
        self._add(weights.live, seeds, coefs, **options)

    def _add(self, out: es_kernels.ParamTable, seeds, coefs, **options) -> None:
        with torch.no_grad(), self._clock.on(out):
            es_kernels.add_noise_(out, seeds, coefs, **options)

    def _rounding(self, rounding: str, member: int, purpose: int) -> dict[str, Any]:
        if rounding == "nearest":
            return {}
        return {"rounding": rounding, "rounding_seed": member_seed(self.seed, self.generation, member, purpose)}

    def _seeds_of(self, generation: int, members: Sequence[int]) -> list[int]:
        words = [member // 2 for member in members] if self.antithetic else members
        return member_seeds(self.seed, generation, words, MEMBER_NOISE)

    def _refuse_if_perturbed(self, what: str) -> None:
        if any(weights.inside is not None for weights in self._weights):
            raise RuntimeError(
                f"{what} was called while a member's noise is in the weights: leave perturbed(), evaluate() or step() "
                "first"
            )

    # --- weights that somebody else writes --------------------------------------------------------------------------

    @torch.no_grad()
    def adopt_live(self) -> None:
        """Take the live weights, which others changed or moved in memory, as theta.

        All that starts from theta then starts from them. Generation, momentum and anchor stay: anchored decay still
        pulls toward the weights at construction. A log does not hold this, so it cannot be replayed past it.

        Raises:
            UserError: A tensor has another shape than at construction, or with master="copy" another dtype. Nothing was
                changed.
            RuntimeError: A member is in place. Nothing was changed.
        """
        self._refuse_if_perturbed("adopt_live()")
        for weights in self._weights:
            weights.refuse_unlike()
        for weights in self._weights:
            weights.live.refresh()
            if self.master is not None:
                weights.wait_for_readers()
                for theta, live in zip(weights.theta.tensors, weights.live.tensors, strict=True):
                    theta.copy_(live)
                self._restore(weights)  # nothing moves, but for NaNs, of which the kernels store one kind
                weights.prove()

    def _refuse_changed(self) -> None:
        """RuntimeError where live holds what this optimizer did not write, and would overwrite."""
        if self.master is None:
            return
        for weights in self._weights:
            name = weights.changed()
            if name and weights.inside is not None:
                raise RuntimeError(
                    f"{name!r} was written by others while a member's noise was in the weights, which restoring "
                    "undoes: write weights between members, and call adopt_live() after it"
                )
            if name:
                raise RuntimeError(
                    f"{name!r} was changed by others since this optimizer wrote it, and the next restore would undo "
                    "that: call adopt_live() to take the live weights as theta, or load_state_dict(state_dict()) to "
                    "have theta in them again"
                )

    # --- looking at it, saving it ------------------------------------------------------------------------------------

    @property
    def tables(self) -> tuple[GroupWeights, ...]:
        """The weights of each param_group, in order: to look at, never to change.

        Each has the parameter tables `live`, `theta` and `anchor` (or None), `inside` (the noise now in live,
        or None) and `step`, what the last update added.
        """
        return tuple(self._weights)

    @property
    def kernel_seconds(self) -> float:
        """Seconds spent in es_kernels so far; waits for the device if there is one."""
        return self._clock.seconds()

    def fingerprint(self, of: str = "theta") -> int:
        """64-bit fingerprint over all groups: equal weights, equal number, on every machine.

        Of sharded parameters it is that of the whole tensors, and a collective: every process that holds a part must
        call it. Without them, nothing is communicated. Replicas are not compared: each has the fingerprint of what it
        holds.

        Args:
            of: "theta" or "live".

        Returns:
            A u64. Waits for the device.
        """
        with torch.no_grad():
            return sum(dtensor.fingerprint(getattr(weights, of), weights.live) for weights in self._weights) % 2**64

    def __getstate__(self):
        """Refuse what copy, deepcopy, pickle and torch.save ask for.

        torch.optim's own state holds neither theta nor what else is needed, and a copy's weights would be those of no
        model.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "an EvolutionStrategy cannot be copied or pickled, since it works in the memory of its model: save its "
            "state_dict(), make a new one over the other model, and load_state_dict() there"
        )

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's, with an entry "es".

        With the same model built again, `load_state_dict` of it continues to the same bits.

        Returns:
            A dict, whose "es" holds theta and the anchor as tensors by name (references, not copies; theta in f32, or
            in the storage dtype with master="copy" and None), the generation, the run's settings, and what momentum
            carries. Sharded parameters have theta as DTensors. torch.distributed.checkpoint saves them, and loads them
            into the state_dict() of an optimizer over other processes.

        Raises:
            RuntimeError: A member is in place.
        """
        self._refuse_if_perturbed("state_dict()")

        def whole(kind: str) -> dict[str, torch.Tensor]:
            tables = [(getattr(weights, kind), weights.live) for weights in self._weights]
            return {
                name: t
                for table, live in tables
                if table is not None
                for name, t in dtensor.whole_tensors(table, live).items()
            }

        state = super().state_dict()
        state["es"] = {
            "noise_version": es_kernels.noise.VERSION,
            "master": self.master,
            **{key: getattr(self, key) for key in _SETTINGS},
            "theta": whole("theta"),
            "anchor": whole("anchor"),
            # As texts: torch.distributed.checkpoint takes dicts apart, and finds none of their keys in a new optimizer.
            "history": [json.dumps(past.to_json()) for past in self._history],
        }
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict()`: theta, live, generation, settings (all but master), options of the groups.

        Args:
            state_dict: Of an optimizer over the same tensors, with the same master.

        Raises:
            UserError: The state is of another optimizer, version of es_finetune, noise version or master, or its
                tensors are others or sharded otherwise. Nothing was changed.
            RuntimeError: A member is in place. Nothing was changed.
        """
        self._refuse_if_perturbed("load_state_dict()")
        saved = state_dict.get("es")
        if saved is None:
            raise UserError("this is no state of an EvolutionStrategy: it has no entry 'es'")
        for key in ("noise_version", "master", *_SETTINGS, "theta", "anchor", "history"):
            if key not in saved:
                raise UserError(
                    f"the saved state has no {key!r}, so another version of es_finetune saved it: load it with that "
                    "version"
                )
        for key, own in (("noise_version", es_kernels.noise.VERSION), ("master", self.master)):
            if saved[key] != own:
                raise UserError(f"the saved state has {key} {saved[key]!r}, this optimizer {own!r}")
        mine = self.state_dict()["es"]
        for kind in ("theta", "anchor"):
            described = [{name: (t.dtype, tuple(t.shape)) for name, t in es[kind].items()} for es in (saved, mine)]
            if described[0] != described[1]:
                different = sorted(
                    name
                    for name in described[0].keys() | described[1].keys()
                    if described[0].get(name) != described[1].get(name)
                )
                raise UserError(
                    f"the saved {kind} and this optimizer's differ in {len(different)} tensor(s), e.g. {different[0]!r}"
                )
            for name, tensor in mine[kind].items():
                dtensor.check_same_layout(name, saved[kind][name], tensor)
        # A state of before there was low rank has no noise_rank
        groups = [{"noise_rank": 0, **group} for group in state_dict["param_groups"]]
        super().load_state_dict({"state": {}, "param_groups": groups})
        for kind in ("theta", "anchor"):
            for name, tensor in mine[kind].items():
                dtensor.local(tensor).copy_(dtensor.local(saved[kind][name]))
        for key in _SETTINGS:
            setattr(self, key, saved[key])
        self._history = [Update.from_json(json.loads(past)) for past in saved["history"]]
        if self.master is not None:
            for weights in self._weights:
                self._restore(weights)
                weights.prove()


_SETTINGS = (
    "generation",
    "seed",
    "population",
    "antithetic",
    "shaping",
    "momentum",
    "momentum_window",
    "perturb_rounding",
    "update_rounding",
)


def _is_named(entry: Any) -> bool:
    """Whether it is (name, tensor) or (name, tensor, segments or None)."""
    if not (
        isinstance(entry, tuple)
        and len(entry) in (2, 3)
        and isinstance(entry[0], str)
        and isinstance(entry[1], torch.Tensor)
    ):
        return False
    segments = NamedTensor(*entry).segments
    return segments is None or (
        isinstance(segments, (list, tuple)) and all(isinstance(segment, es_kernels.Segment) for segment in segments)
    )
