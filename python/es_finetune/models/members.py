"""Members in one batch: their weights differ by noise of low rank alone, so they share every product with the weights,
and each layer adds what is a member's own.

The rows of a batch are grouped by member: of M members with b rows each the rows k b to (k + 1) b - 1 are member k's. A
layer y = x W^T + v of a member with noise E = L R^T / sqrt(r) in W and e in v gives

    y + c ((x R) L^T + e),   c = sigma / sqrt(r), with the member's sign;   e: full noise, without 1 / sqrt(r)

computed in the weights' dtype, by two thin products beside the one with W (EGGROLL, arXiv:2511.16652). An embedding
adds c L[token] R^T. Engines round this otherwise than weights that were perturbed in memory; scores differ by as much.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

import es_kernels
from es_finetune.models.checkpoint_names import base_of
from es_kernels import NamedTensor
from es_kernels.noise import rank_scale


class MemberNoise(NamedTuple):
    """What some members add to the parameters of one param_group.

    Attributes:
        names: Of the parameters.
        seeds: u64, one for each member.
        coefs: sigma with the member's sign, one for each member.
        noise_rank: Of the matrices' noise, 1 or more.
    """

    names: Collection[str]
    seeds: Sequence[int]
    coefs: Sequence[float]
    noise_rank: int


class _Place(NamedTuple):
    """A parameter where a layer computes with it."""

    module: torch.nn.Module
    kind: str  # "linear", "conv1d" (weight [in, out]), "embedding", "bias"
    name: str


class Members:
    """The layers of a model to which members that share a batch can add their noise.

    Args:
        model: A causal LM. Nothing is changed in it.
        entries: Its tuned parameters, as `checkpoint_names.named_segments` gives them.
        adapters: Only the weights of linear layers below the head: what an engine's own adapters can change.
    """

    def __init__(self, model: torch.nn.Module, entries: Sequence[NamedTensor], *, adapters: bool = False):
        self._places = _places(model, entries)
        if adapters:
            head = base_of(model).get_output_embeddings()
            self._places = [p for p in self._places if p.kind == "linear" and p.module is not head]
        tensors = {entry.name: entry.tensor for entry in entries}
        self._tensors = {place.name: tensors[place.name] for place in self._places}

    @property
    def names(self) -> set[str]:
        """Parameters that members can differ in. All others only one member at a time can change, in memory: weights of
        norms, experts that are fused into one tensor, and what else is no linear layer's or embedding's."""
        return set(self._tensors)

    @contextmanager
    def added(self, noise: Sequence[MemberNoise]) -> Iterator[Callable[[int], None]]:
        """Within, the model computes for members in groups of rows.

        Args:
            noise: Of each param_group, of the same members; all their names are among `names`.

        Yields:
            A function to call with the number of rows of the next batch, a multiple of the members.
        """
        terms = _terms(self._tensors, noise)
        batch = _Batch(len(noise[0].seeds))
        hooks = []
        try:
            for module, kind, name in self._places:
                if name in terms:
                    hooks.append(module.register_forward_hook(_HOOKS[kind](batch, *terms[name])))
            yield batch.begin
        finally:
            for hook in hooks:
                hook.remove()


class _Batch:
    """How many members share the batch, and its rows."""

    def __init__(self, members: int):
        self.members, self.rows = members, 0

    def begin(self, rows: int) -> None:
        if rows % self.members:
            raise ValueError(f"{rows} rows are no whole number for each of {self.members} members")
        self.rows = rows

    def grouped(self, x: torch.Tensor) -> torch.Tensor:
        """[rows or rows * tokens, ..., n] -> [members, of each, n], a view where it lies in one piece, as outputs do.

        Raises:
            RuntimeError: A layer sees other rows than those of the batch, as experts of a mixture do.
        """
        if x.shape[0] % self.rows:
            raise RuntimeError(f"a layer was given {x.shape[0]} rows of a batch of {self.rows}")
        return x.reshape(self.members, -1, x.shape[-1])


def _places(model: torch.nn.Module, entries: Sequence[NamedTensor]) -> list[_Place]:
    """Where the parameters are used that no other kind of layer uses too."""
    names = {id(entry.tensor): entry.name for entry in entries if entry.segments is None}
    places, others = [], set()
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = names.get(id(parameter))
            kind = _kind(module, attribute)
            if name is not None and kind is not None:
                places.append(_Place(module, kind, name))
            elif name is not None:
                others.add(name)
    return [place for place in places if place.name not in others]


def _kind(module: torch.nn.Module, attribute: str) -> str | None:
    """What a layer does with its parameter; None if that is not known."""
    forward = type(module).forward
    if forward is torch.nn.Linear.forward:
        return {"weight": "linear", "bias": "bias"}.get(attribute)
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return {"weight": "conv1d", "bias": "bias"}.get(attribute)
    if attribute == "weight" and isinstance(module, torch.nn.Embedding) and module.max_norm is None:
        # Gemma 3's scales what it looks up.
        scaled = isinstance(getattr(module, "embed_scale", None), torch.Tensor)
        return "embedding" if forward is torch.nn.Embedding.forward or scaled else None
    return None


# ---- what each member adds ----


def scaled_factors(
    shapes: Mapping[str, tuple[int, int]], noise: MemberNoise, device: torch.device
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Matrices of a group, name -> (rows m, columns n), to what each of its members adds there: name -> (c L [members,
    m, r], R [members, n, r]), f32."""
    coefs = torch.tensor(noise.coefs, dtype=torch.float32, device=device)
    scaled = coefs if noise.noise_rank == 1 else coefs * float(rank_scale(noise.noise_rank))
    factors = es_kernels.factors(shapes, noise.seeds, noise.noise_rank, device=device)
    return {name: (left * scaled[:, None, None], right) for name, (left, right) in factors.items()}


def _terms(tensors: Mapping[str, torch.Tensor], noise: Sequence[MemberNoise]) -> dict[str, tuple[torch.Tensor, ...]]:
    """Name -> (c L [members, m, r], R [members, n, r]) of a matrix, or (c e [members, m],) of a bias, in its dtype."""
    terms: dict[str, tuple[torch.Tensor, ...]] = {}
    for group in noise:
        own = {name: tensors[name] for name in group.names}
        device = next(iter(own.values())).device
        shapes = {name: (t.shape[0], t.shape[1]) for name, t in own.items() if t.dim() == 2}
        for name, factors in scaled_factors(shapes, group, device).items():
            terms[name] = tuple(factor.to(own[name].dtype) for factor in factors)
        vectors = {
            name: torch.zeros(len(group.seeds), len(t), device=device) for name, t in own.items() if t.dim() == 1
        }
        for member, (seed, coef) in enumerate(zip(group.seeds, group.coefs, strict=True) if vectors else ()):
            es_kernels.add_noise_({name: rows[member] for name, rows in vectors.items()}, seed, coef)
        terms |= {name: (rows.to(own[name].dtype),) for name, rows in vectors.items()}
    return terms


# ---- hooks: they write into the layer's output, which nobody else has seen yet ----


def _linear(batch: _Batch, left: torch.Tensor, right: torch.Tensor) -> Callable[..., None]:
    left = left.mT.contiguous()  # [members, r, m]

    def add(module: torch.nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
        _add_product(batch.grouped(out), batch.grouped(args[0]) @ right, left)

    return add


def _conv1d(batch: _Batch, left: torch.Tensor, right: torch.Tensor) -> Callable[..., None]:
    return _linear(batch, right, left)  # y = x W


def _embedding(batch: _Batch, left: torch.Tensor, right: torch.Tensor) -> Callable[..., torch.Tensor]:
    right, member = right.mT.contiguous(), torch.arange(batch.members, device=left.device)[:, None]

    def add(module: torch.nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        tokens = args[0]
        if tokens.shape[0] == 1 < batch.rows:  # positions, the same in every row
            tokens, out = tokens.expand(batch.rows, -1), out.expand(batch.rows, -1, -1).clone()
        looked_up = left[member, batch.grouped(tokens[..., None])[..., 0]]  # [members, of each, r]
        scale = getattr(module, "embed_scale", None)
        if isinstance(scale, torch.Tensor):
            looked_up = looked_up * scale.to(looked_up.dtype)
        _add_product(batch.grouped(out), looked_up, right)
        return out

    return add


def _bias(batch: _Batch, noise: torch.Tensor) -> Callable[..., None]:
    def add(module: torch.nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
        batch.grouped(out).add_(noise[:, None])

    return add


_HOOKS: dict[str, Callable[..., Callable[..., torch.Tensor | None]]] = {
    "linear": _linear,
    "conv1d": _conv1d,
    "embedding": _embedding,
    "bias": _bias,
}


def _add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """out [members, k, m] += a [members, k, r] b [members, r, m], in place."""
    if a.shape[-1] == 1:
        out.addcmul_(a, b)
    else:
        out.baddbmm_(a, b)
