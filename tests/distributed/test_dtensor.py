"""Contract under test: sharded models (es_finetune.optim.dtensor, EvolutionStrategy over DTensors).

- The Segments of a shard are its place in the whole: each element of the whole once, for every way of splitting, sizes
  that do not divide and fused tensors included. (One process that plays each rank in turn.)
- Number of processes and layout change no bit of live and theta, perturbed or not, and no fingerprint, for each master,
  with momentum, decay and roundings; nor does a model under parallelize_module or fully_shard, whose forward computes
  with the perturbed weights, in whichever state FSDP left its own. (Real processes, gloo.)
- theta in state_dict() is DTensors; torch.distributed.checkpoint loads it over other processes. What does not fit is
  refused in one sentence, with nothing changed.
- Without DTensors nothing is communicated, also where there is a process group.
"""

import itertools
import json
import os
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import _StridedShard

from es_finetune import EvolutionStrategy
from es_finetune.models.checkpoint_names import named_segments
from es_finetune.optim.dtensor import local_entry
from es_kernels import Segment

# --- places, without processes ---------------------------------------------------------------------------------------

S0, S1, S2, R = Shard(0), Shard(1), Shard(2), Replicate()
LAYOUTS = [  # mesh, placements, (mesh dimensions in the order in which they split a dimension)
    ((1,), [S0]),
    ((2,), [S0]),
    ((4,), [S0]),
    ((8,), [S1]),
    ((3,), [R]),
    ((2, 2), [S0, S1]),
    ((2, 3), [S1, S0]),
    ((2, 2), [S0, S0]),
    ((2, 4), [S1, S1]),
    ((2, 2), [R, S1]),
    ((2, 2), [S1, R]),
    ((2, 2), [_StridedShard(0, split_factor=2), S0]),
    ((4, 2), [_StridedShard(0, split_factor=2), S0]),
    ((2, 3), [_StridedShard(1, split_factor=3), S1]),
    ((2, 2, 2), [R, _StridedShard(0, split_factor=2), S0]),
    ((2, 2, 2), [_StridedShard(0, split_factor=4), S0, S0]),
    ((2, 2, 2), [_StridedShard(0, split_factor=2), S0, S1]),
    ((2,), [_StridedShard(0, split_factor=2)]),  # no order of splits makes this: two runs of rows in each process
    ((2,), [_StridedShard(1, split_factor=3)]),
    ((2, 2), [S2, S0]),
    ((2, 2), [S2, S1]),
]
SHAPES = [(1,), (5,), (9,), (5, 6), (9, 4), (8, 8), (3, 0), (4, 3, 6), (2, 5, 7), (2, 2, 3, 5)]


def pieces(index, mesh, placements, coordinate):
    """What process `coordinate` has of `index`, by torch.chunk: right to left where there is a _StridedShard and
    another split of its dimension."""

    def chunk(tensor, n, dim):
        chunks = list(torch.chunk(tensor, n, dim))
        return chunks + [tensor.narrow(dim, 0, 0)] * (n - len(chunks))

    order = list(range(len(mesh)))
    if len(mesh) > 1 and any(isinstance(p, _StridedShard) for p in placements):
        order = [i for i in order if not isinstance(placements[i], _StridedShard)] + [
            i for i in order if isinstance(placements[i], _StridedShard)
        ]
        placements = [Shard(p.dim) if isinstance(p, _StridedShard) else p for p in placements]
    for i in order:
        p = placements[i]
        if isinstance(p, _StridedShard):
            index = torch.cat(
                [chunk(part, mesh[i], p.dim)[coordinate[i]] for part in chunk(index, p.split_factor, p.dim)], p.dim
            )
        elif isinstance(p, Shard):
            index = chunk(index, mesh[i], p.dim)[coordinate[i]]
    return index.contiguous()


def fused(shape):
    """The whole as three checkpoint tensors, of one dimension or of two: rows of a column block, its other columns in
    two parts that end within a row."""
    n, width = torch.Size(shape).numel(), max(shape[-1], 1)
    rows, left = n // width, width // 3
    if left == 0:
        return [Segment("a", 1, n // 2), Segment("b", 1, n - n // 2, offset=n // 2, first=5)]
    right, top = width - left, rows // 2
    return [
        Segment("a", rows, left, 0, width, 7, left),
        Segment("b", top, right, left, width, 0, right, right),
        Segment("c", rows - top, right, left + top * width, width, 10 * right + 11, right + 1, right + 1),
    ]


def one_matrix(shape):
    """The whole as a checkpoint's matrix, whatever dimensions it has in memory."""
    return [Segment("m", 1, torch.Size(shape).numel(), width=shape[-1] or None)]


def places(segments, size):
    """(name, index, width) of each of the `size` elements of memory."""
    elements = [None] * size
    for s in segments:
        for row, col in itertools.product(range(s.rows), range(s.cols)):
            at = s.offset + row * s.row_stride + col
            assert elements[at] is None
            elements[at] = s.name, s.first + row * s.index_stride + col, s.width
    return elements


def width_of(shape):
    return shape[1] if len(shape) == 2 else None


@pytest.fixture
def as_rank():
    """as_rank(rank, mesh): the DeviceMesh as this rank of its processes sees it."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def make(rank, mesh):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=torch.Size(mesh).numel(), store=FakeStore())
        return init_device_mesh("cpu", mesh)

    yield make
    dist.destroy_process_group()


def dtensor(local, mesh, placements, shape, **options):
    whole = torch.empty(shape, device="meta")
    return DTensor(
        local,
        DTensorSpec(
            mesh, tuple(placements), tensor_meta=TensorMeta(whole.shape, whole.stride(), local.dtype), **options
        ),
        requires_grad=False,
    )


@pytest.mark.parametrize("mesh, placements", LAYOUTS, ids=str)
def test_a_shard_is_its_place(as_rank, mesh, placements):
    held = {shape: torch.zeros(torch.Size(shape).numel(), dtype=int) for shape in SHAPES}
    for rank, coordinate in enumerate(itertools.product(*map(range, mesh))):
        device_mesh = as_rank(rank, mesh)
        for shape in SHAPES:
            if any(p.dim >= len(shape) for p in placements if p != R):
                continue
            whole = torch.arange(torch.Size(shape).numel()).view(shape)
            index = pieces(whole, mesh, placements, coordinate)
            parameter = dtensor(index.float(), device_mesh, placements, shape)
            name, local, segments = local_entry("w", parameter)
            assert local.data_ptr() == parameter.to_local().data_ptr()
            assert places(segments, local.numel()) == [("w", i, width_of(shape)) for i in index.flatten().tolist()]
            held[shape] += torch.bincount(index.flatten(), minlength=whole.numel())
            for parts in (fused(shape), one_matrix(shape)):
                source = places(parts, whole.numel())
                _, _, segments = local_entry("w", parameter, parts)
                assert places(segments, local.numel()) == [source[i] for i in index.flatten().tolist()]
    copies = torch.Size(n for n, p in zip(mesh, placements, strict=True) if p == R).numel()
    assert all(
        (count == copies).all()
        for shape, count in held.items()
        if all(p == R or p.dim < len(shape) for p in placements)
    )


def test_an_explicit_shard_order_is_followed(as_rank):
    from torch.distributed.tensor._dtensor_spec import ShardOrderEntry

    for rank, (i, j) in enumerate(itertools.product(range(4), range(2))):
        index = pieces(torch.arange(9), (4, 2), [_StridedShard(0, split_factor=2), S0], (i, j))
        order = (ShardOrderEntry(tensor_dim=0, mesh_dims=(1, 0)),)
        _, _, segments = local_entry(
            "w", dtensor(index.float(), as_rank(rank, (4, 2)), [S0, S0], (9,), shard_order=order)
        )
        assert [place for _, place, _ in places(segments, len(index))] == index.tolist()


def test_many_rows_are_few_segments(as_rank):
    mesh = as_rank(3, (2, 2))
    for shape, placements in (
        ((512, 64), [S0, S1]),
        ((8, 64, 64), [S0, S1]),
        ((8, 64, 64), [R, S1]),
        ((2000, 2, 2), [S1, S2]),
    ):
        parameter = dtensor(pieces(torch.empty(shape), (2, 2), placements, (1, 1)), mesh, placements, shape)
        assert len(local_entry("w", parameter)[2]) == 1
    qkv = [Segment(name, 512, 16, 16 * i, 64, 0, 16, 16) for i, name in enumerate("qkv")]
    parameter = dtensor(torch.empty(256, 32), mesh, [S0, S1], (512, 64))
    assert local_entry("qkv", parameter, qkv)[2] == [Segment("v", 256, 16, 0, 32, 256 * 16, 16, 16)]


def test_a_sharded_model_has_the_segments_of_its_checkpoint(as_rank):
    """The experts that Mixtral's checkpoint holds one by one, in rows 3 and 4 of 5."""
    from torch.distributed.fsdp import fully_shard
    from transformers import MixtralConfig, MixtralForCausalLM

    # A hidden size that no other test has: torch's caches would remember which rank this process was with those.
    sizes = {
        "vocab_size": 11,
        "hidden_size": 12,
        "intermediate_size": 6,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=5))
    whole = list(named_segments(model))
    assert any(entry.segments for entry in whole)
    mesh = as_rank(1, (2,))
    fully_shard(model, mesh=mesh)
    for (name, _, segments), (name_here, parameter, segments_here) in zip(whole, named_segments(model), strict=True):
        assert (name, segments) == (name_here, segments_here)
        index = pieces(torch.arange(parameter.numel()).view(parameter.shape), (2,), [S0], (1,)).flatten().tolist()
        source = places(
            segments or [Segment(name, 1, parameter.numel(), width=width_of(parameter.shape))], parameter.numel()
        )
        _, local, local_segments = local_entry(name_here, parameter, segments_here)
        assert places(local_segments, local.numel()) == [source[i] for i in index]
    EvolutionStrategy(named_segments(model))


def test_what_has_no_place_is_refused(as_rank):
    mesh = as_rank(0, (2,))

    def optimizer(parameter):
        EvolutionStrategy([("plain", nn.Parameter(torch.ones(2))), ("layer.w", nn.Parameter(parameter))])

    with pytest.raises(ValueError, match="'layer.w' is placed P.* redistribute it to Shard or Replicate first"):
        optimizer(dtensor(torch.ones(4), mesh, [Partial()], (4,)))
    with pytest.raises(
        ValueError, match=r"'layer.w' has \(1,\) in this process .* gives \(2,\): shard it as distribute_tensor does"
    ):
        optimizer(dtensor(torch.ones(1), mesh, [S0], (4,)))
    with pytest.raises(ValueError, match="'layer.w' is sharded and not contiguous"):
        optimizer(dtensor(torch.ones(4, 2).t(), mesh, [S0], (4, 4)))
    with pytest.raises(
        ValueError, match="'layer.w', sharded .* more than 1024 pieces in a process: shard it in another dimension"
    ):
        optimizer(dtensor(torch.ones(1200, 2, 2), as_rank(0, (2, 2)), [S1, S2], (1200, 4, 4)))
    flat = torch.ones(3)
    flat._fsdp_flattened = True
    with pytest.raises(ValueError, match="shard the model with fully_shard"):
        EvolutionStrategy([("layer.w", flat.requires_grad_())])
    as_rank(3, (4,))
    with pytest.raises(
        ValueError, match="'layer.w' is on a device mesh that this process is not part of: leave it out here"
    ):
        optimizer(dtensor(torch.ones(0), DeviceMesh("cpu", [0, 1, 2]), [S0], (4,)))


def test_without_dtensors_nothing_is_communicated(as_rank, monkeypatch):
    as_rank(0, (2,))
    for name in ("all_reduce", "all_gather", "broadcast", "get_rank", "get_world_size", "barrier"):
        monkeypatch.setattr(dist, name, lambda *args, **kwargs: pytest.fail("a collective"))
    opt = EvolutionStrategy(nn.Linear(3, 2).named_parameters(), population=2)
    opt.tell([0.0, 1.0])
    opt.load_state_dict(opt.state_dict())
    assert opt.fingerprint() == opt.fingerprint("live")


def test_a_shard_that_others_write_is_refused_and_adopted(as_rank):
    """Without a word to the other processes."""
    parameter = dtensor(torch.arange(1.0, 5.0), as_rank(1, (2,)), [S0], (8,)).requires_grad_()
    opt = EvolutionStrategy([("layer.w", parameter)], population=2)
    parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([parameter], lr=0.5).step()
    with pytest.raises(RuntimeError, match=r"'layer.w' was changed by others .* adopt_live\(\)"):
        opt.tell([0.0, 1.0])
    opt.adopt_live()
    assert opt.tables[0].theta.tensors[0].tolist() == [0.5, 1.5, 2.5, 3.5]
    opt.tell([0.0, 1.0])
    assert torch.equal(opt.tables[0].theta.tensors[0], parameter.to_local())


# --- in processes ----------------------------------------------------------------------------------------------------

FITNESS = [[0.5, -1.0, 2.0, 0.25], [1.0, 3.0, -2.0, 0.0], [0.0, 0.5, 0.25, -4.0]]
OPTIONS = {
    "sigma": 0.05,
    "lr": 0.05,
    "population": 4,
    "seed": 7,
    "momentum": 0.5,
    "weight_decay": 0.5,
    "anchored": True,
}
RANKS = (0, 1, 3)  # of the noise
MASTERS = ("fp32", "copy", "host", None)


def weights():
    generator = torch.Generator().manual_seed(0)
    shapes = {"rows": (5, 8), "columns": (6, 10), "cube": (4, 3, 6), "vector": (9,), "one": (1,)}
    dtypes = itertools.cycle([torch.bfloat16, torch.float32, torch.float16])
    return {
        name: (0.1 * torch.randn(shape, generator=generator)).to(dtype)
        for (name, shape), dtype in zip(shapes.items(), dtypes, strict=False)
    }


def full(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        a, b = left[name].contiguous(), right[name].contiguous()
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


def history(opt, named, look=lambda: None):
    """Everything there is to see of three generations: whole tensors and fingerprints, perturbed and after each
    update."""
    named, seen = list(named), []

    def note():
        seen.append(
            {name: full(p) for name, p in named}
            | {"fingerprint": torch.tensor(list(opt.fingerprint("live").to_bytes(8, "big")))}
        )

    for fitness in FITNESS:
        for member in opt.ask():
            with opt.perturbed(member):
                look()
                note() if member % 2 else None
        opt.tell(fitness)
        note()
        seen.append({name: full(t) for name, t in opt.state_dict()["es"]["theta"].items()})
        seen.append({"fingerprint": torch.tensor(list(opt.fingerprint().to_bytes(8, "big")))})
    return seen


def same_history(left, right):
    for a, b in zip(left, right, strict=True):
        same(a, b)


def history_of(parameters, **options):
    return history(EvolutionStrategy(parameters.items(), **OPTIONS, **options), parameters.items())


def unsharded(**options):
    return history_of({name: nn.Parameter(t) for name, t in weights().items()}, **options)


def sharded(mesh, placements):
    def fit(t):
        return [p if p == R or p.dim < t.ndim else R for p in placements]

    return {name: nn.Parameter(distribute_tensor(t, mesh, fit(t), src_data_rank=None)) for name, t in weights().items()}


def check_layouts(world):
    layouts = {
        1: [((1,), [S0]), ((1,), [R]), ((1, 1), [S0, S1])],
        2: [((2,), [S0]), ((2,), [S1]), ((2,), [S2]), ((2,), [R]), ((1, 2), [S0, S0]), ((2, 1), [S1, R])],
        4: [((4,), [S0]), ((4,), [S1])] + [((2, 2), [a, b]) for a in (S0, S1, R) for b in (S0, S1, R)],
    }[world]
    for rank in RANKS:
        expected = unsharded(noise_rank=rank)
        for shape, placements in layouts:
            parameters = sharded(init_device_mesh("cpu", shape), placements)
            same_history(history_of(parameters, noise_rank=rank), expected)


def check_strided(world):
    """A split that splits again what the dimension to its right has split: the data where FSDP2 would put them, in
    uneven sizes. And alone."""
    if world == 1:
        return
    for rank in RANKS:
        parameters = sharded(init_device_mesh("cpu", (world,)), [_StridedShard(0, split_factor=3)])
        same_history(history_of(parameters, noise_rank=rank), unsharded(noise_rank=rank))
    shape = (2, world // 2)
    mesh = init_device_mesh("cpu", shape)
    placements = [_StridedShard(0, split_factor=shape[1]) if shape[1] > 1 else S0, S0]
    for rank in RANKS:
        parameters = {
            name: nn.Parameter(dtensor(pieces(t, shape, placements, mesh.get_coordinate()), mesh, placements, t.shape))
            for name, t in weights().items()
        }
        same_history(history_of(parameters, noise_rank=rank), unsharded(noise_rank=rank))


def check_masters(world):
    for master in MASTERS[1:]:
        options = {"master": master, "noise_rank": int(master is None)}
        parameters = sharded(init_device_mesh("cpu", (world,)), [S0 if master == "copy" else S1])
        same_history(history_of(parameters, **options), unsharded(**options))


def check_parts_and_groups(world):
    """Parameters that are no DTensors beside others that are, a fused one, and two groups of other ranks."""
    mesh = init_device_mesh("cpu", (world,))

    def groups(parameters):
        segments = [Segment("q", 2, 8, width=8), Segment("v", 3, 8, offset=16, width=8)]
        first = [("rows", parameters["rows"], segments), ("columns", parameters["columns"])]
        return [
            {"params": first, "sigma": 0.1, "noise_rank": 2},
            {"params": [(name, parameters[name]) for name in ("cube", "vector", "one")]},
        ]

    plain = {name: nn.Parameter(t) for name, t in weights().items()}
    mixed = sharded(mesh, [S0]) | {name: nn.Parameter(weights()[name]) for name in ("columns", "one")}
    same_history(
        history(EvolutionStrategy(groups(mixed), **OPTIONS), mixed.items()),
        history(EvolutionStrategy(groups(plain), **OPTIONS), plain.items()),
    )


class Tiny(nn.Module):
    def __init__(self, hidden=10, tied=True):
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(5, 6)
        self.up = nn.Linear(6, hidden)
        self.down = nn.Linear(hidden, 6)
        self.head = nn.Linear(6, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.down(torch.tanh(self.up(self.embed(tokens)))))


def check_fsdp(world):
    from torch.distributed.fsdp import fully_shard

    tokens = torch.arange(5)
    plain, expected = Tiny(), []
    options = {**OPTIONS, "noise_rank": 1}
    expected_history = history(
        EvolutionStrategy(named_segments(plain), **options),
        plain.named_parameters(),
        lambda: expected.append(plain(tokens)),
    )
    for per_layer, reshard in ((True, None), (False, None), (True, False)):
        model, actual = Tiny(), []
        for layer in (model.up, model.down) if per_layer else ():
            fully_shard(layer, reshard_after_forward=reshard)
        fully_shard(model, reshard_after_forward=reshard)
        named = list(model.named_parameters())
        assert all(isinstance(p, DTensor) for _, p in named)
        opt = EvolutionStrategy(named_segments(model), **options)
        same_history(history(opt, named, lambda: actual.append(model(tokens))), expected_history)  # noqa: B023
        same(dict(enumerate(actual)), dict(enumerate(expected)))
        same({"": model(tokens)}, {"": plain(tokens)})
        gathered = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
        if gathered:
            with pytest.raises(ValueError, match="was FSDP's gathered copy, now given up: pass model.named_parameters"):
                EvolutionStrategy(model.named_parameters())
            EvolutionStrategy(model.named_parameters())
        same({name: full(p) for name, p in model.named_parameters()}, dict(plain.named_parameters()))


def check_tensor_parallel(world):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    # Not tied: parallelize_module would part the two.
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), "embed": RowwiseParallel(input_layouts=Replicate())}
    for hidden, rank in ((8, 1), (9, 0), (9, 3)):
        plain = Tiny(hidden, tied=False)
        expected = history_of(dict(plain.named_parameters()), noise_rank=rank)
        model = parallelize_module(Tiny(hidden, tied=False), init_device_mesh("cpu", (world,)), plan)
        named = dict(model.named_parameters())
        same_history(history_of(named, noise_rank=rank), expected)
        if world == 4:
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
            model = fully_shard(parallelize_module(Tiny(hidden, tied=False), mesh["tp"], plan), mesh=mesh["dp"])
            named = dict(model.named_parameters())
            assert any(isinstance(p, _StridedShard) for p in named["up.weight"].placements)
            same_history(history_of(named, noise_rank=rank), expected)


def check_state(world):
    import torch.distributed.checkpoint as dcp

    mesh = init_device_mesh("cpu", (world,))
    parameters = sharded(mesh, [S0])
    opt = EvolutionStrategy(parameters.items(), **OPTIONS)
    opt.tell(FITNESS[0])
    state = opt.state_dict()
    assert all(isinstance(t, DTensor) for kind in ("theta", "anchor") for t in state["es"][kind].values())

    again = sharded(mesh, [S0])
    resumed = EvolutionStrategy(again.items(), **OPTIONS)
    resumed.load_state_dict(state)
    assert (resumed.fingerprint(), resumed.generation) == (opt.fingerprint(), 1)
    before = opt.fingerprint()
    for other in (sharded(mesh, [S1]), {name: nn.Parameter(t) for name, t in weights().items()}):
        stranger = EvolutionStrategy(other.items(), **OPTIONS)
        start = stranger.fingerprint()
        with pytest.raises(ValueError, match="by torch.distributed.checkpoint, which shards it as this one is"):
            stranger.load_state_dict(state)
        assert stranger.fingerprint() == start
        with pytest.raises(ValueError, match="'rows' is sharded .*, and in the saved state"):
            opt.load_state_dict(stranger.state_dict())
        assert opt.fingerprint() == before

    # From the process before, of another number of processes and other columns, or to the next.
    plain = {name: nn.Parameter(t) for name, t in weights().items()}
    reference = EvolutionStrategy(plain.items(), **OPTIONS)
    reference.tell(FITNESS[0])
    folder = os.environ["SAVED"]
    if world == 2:
        dcp.save(state, checkpoint_id=folder)
    else:
        other = sharded(mesh, [S1])
        resumed = EvolutionStrategy(other.items(), **OPTIONS)
        state = resumed.state_dict()
        dcp.load(state, checkpoint_id=folder)
        resumed.load_state_dict(state)
        assert (resumed.fingerprint(), resumed.generation) == (reference.fingerprint(), 1)
        resumed.tell(FITNESS[1])
        reference.tell(FITNESS[1])
        same({name: full(p) for name, p in other.items()}, plain)


def check_moved(world):
    parameters = sharded(init_device_mesh("cpu", (world,)), [S1])
    opt = EvolutionStrategy(parameters.items(), **OPTIONS)
    parameters["rows"]._local_tensor = parameters["rows"]._local_tensor.clone()
    with pytest.raises(RuntimeError, match="'rows' moved in memory"):
        opt.tell(FITNESS[0])


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def main(rank, world, store, out):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    results = {}
    for name, check in CHECKS.items():
        try:
            check(world)
            results[name] = None
        except (Exception, pytest.fail.Exception):  # noqa: BLE001 - the test of this check fails with it
            results[name] = traceback.format_exc()
            break  # the other processes may be anywhere
    Path(f"{out}.{rank}").write_text(json.dumps(results))
    os._exit(0)  # past the destruction of a group that another process may have left


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """World size -> what each check did in each process; those of 2 first, whose checkpoint the others load."""
    folder, results = tmp_path_factory.mktemp("processes"), {}
    for world in (2, 1, 4):
        store, out = folder / f"store{world}", folder / f"out{world}"
        environment = os.environ | {
            "SAVED": str(folder / "saved"),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        running = [
            subprocess.Popen([sys.executable, __file__, str(rank), str(world), str(store), str(out)], env=environment)
            for rank in range(world)
        ]
        end = time.monotonic() + 150
        try:
            for process in running:
                process.wait(timeout=max(0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass  # found below to have written nothing
        finally:
            for process in running:
                process.kill()
                process.wait()
        results[world] = [
            json.loads(Path(f"{out}.{rank}").read_text()) if Path(f"{out}.{rank}").exists() else {}
            for rank in range(world)
        ]
    return results


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("check", CHECKS)
def test_processes(processes, world, check):
    for rank, results in enumerate(processes[world]):
        assert results.get(check, "not reached: another check failed, or the process hung") is None, (
            f"process {rank}: {results.get(check)}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
