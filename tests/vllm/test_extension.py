"""Contract under test: however vLLM cuts and fuses a tensor over ranks, each element draws the noise of its place in
the checkpoint's tensor, in memory and in the adapters of members, and each is counted by one rank. Layers are vLLM's
own classes without their processes: what is tested is the arithmetic of places."""

import math
from types import SimpleNamespace

import pytest
import torch

import es_kernels

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
HIDDEN, HEAD, HEADS, KV_HEADS, INNER, VOCABULARY = 24, 8, 8, 2, 40, 50
SHAPES = {
    "embed.weight": (VOCABULARY, HIDDEN),
    "norm.weight": (HIDDEN,),
    "a.same.weight": (5, HIDDEN),
    "a.single.weight": (16, HIDDEN),
}
SHAPES |= {
    f"a.{x}_proj.weight": (heads * HEAD, HIDDEN) for x, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
}
SHAPES |= {f"a.{x}_proj.bias": (heads * HEAD,) for x, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))}
SHAPES |= {
    "a.o_proj.weight": (HIDDEN, HEADS * HEAD),
    "a.o_proj.bias": (HIDDEN,),
    "a.gate_proj.weight": (INNER, HIDDEN),
    "a.up_proj.weight": (INNER, HIDDEN),
}


def layer(cls, tensors, **attributes):
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    made = cls.__new__(cls)
    torch.nn.Module.__init__(made)
    made.quant_method = UnquantizedLinearMethod.__new__(UnquantizedLinearMethod)
    for name, tensor in tensors.items():
        made.register_parameter(name, torch.nn.Parameter(tensor.clone(), requires_grad=False))
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def model_of(rank, size, full):
    """What rank `rank` of `size` holds of the full tensors."""
    from vllm.model_executor.layers.linear import (
        ColumnParallelLinear,
        MergedColumnParallelLinear,
        QKVParallelLinear,
        ReplicatedLinear,
        RowParallelLinear,
    )
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    def cut(name, dim=0, of=size, at=rank):
        return full[name].chunk(of, dim)[at]

    place = {"tp_rank": rank, "tp_size": size}
    kv, copies = max(1, KV_HEADS // size), max(1, size // KV_HEADS)
    at = {"of": min(size, KV_HEADS), "at": rank // copies}
    qkv = {
        kind: torch.cat([cut(f"a.q_proj.{kind}"), cut(f"a.k_proj.{kind}", **at), cut(f"a.v_proj.{kind}", **at)])
        for kind in ("weight", "bias")
    }
    heads = {
        "num_heads": HEADS // size,
        "num_kv_heads": kv,
        "num_kv_head_replicas": copies,
        "head_size": HEAD,
        "v_head_size": HEAD,
    }
    rows = -(-VOCABULARY // size)
    start, end = min(rank * rows, VOCABULARY), min((rank + 1) * rows, VOCABULARY)
    padded = torch.cat(
        [full["embed.weight"][start:end], torch.full((rows - (end - start) + 14, HIDDEN), 7.0, dtype=torch.bfloat16)]
    )
    indices = SimpleNamespace(num_added_elements=0, num_org_elements=end - start, org_vocab_start_index=start)
    model = torch.nn.Module()
    model.packed_modules_mapping = FUSED
    model.embed = layer(VocabParallelEmbedding, {"weight": padded}, shard_indices=indices)
    model.a = torch.nn.Module()
    model.a.qkv_proj = layer(QKVParallelLinear, qkv, **place, **heads)
    model.a.o_proj = layer(
        RowParallelLinear, {"weight": cut("a.o_proj.weight", 1), "bias": full["a.o_proj.bias"]}, **place
    )
    gate_up = torch.cat([cut("a.gate_proj.weight"), cut("a.up_proj.weight")])
    model.a.gate_up_proj = layer(MergedColumnParallelLinear, {"weight": gate_up}, **place, output_sizes=[INNER, INNER])
    model.a.single = layer(ColumnParallelLinear, {"weight": cut("a.single.weight")}, **place)
    model.a.same = layer(ReplicatedLinear, {"weight": full["a.same.weight"]}, **place)
    model.norm = torch.nn.LayerNorm(HIDDEN, bias=False)
    model.norm.weight.data = full["norm.weight"].clone()
    return model


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("noise_rank", [0, 1, 3])
def test_the_shards_of_all_ranks_are_the_model(size, noise_rank):
    from es_finetune.workers.vllm.extension import _entry, parts_of

    generator = torch.Generator().manual_seed(0)
    full = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}
    expected = {name: tensor.clone() for name, tensor in full.items()}
    es_kernels.add_noise_(expected, [5], [0.1], noise_rank=noise_rank)
    joined = {name: torch.full(shape, math.nan, dtype=torch.bfloat16) for name, shape in SHAPES.items()}
    proofs, covered = [], dict.fromkeys(SHAPES, 0)
    for rank in range(size):
        model = model_of(rank, size, full)
        parts = list(parts_of(model, rank))
        table = es_kernels.ParamTable([_entry(part, list(SHAPES[part.name])) for part in parts])
        es_kernels.add_noise_(table, [5], [0.1], noise_rank=noise_rank)
        counted = [part for part in parts if part.counted]
        proofs.append(
            es_kernels.fingerprint(es_kernels.ParamTable([_entry(part, list(SHAPES[part.name])) for part in counted]))
        )
        for part in parts:
            covered[part.name] += part.counted * math.prod(part.shape)
            place = torch.as_strided(joined[part.name], part.shape, (part.index_stride, 1), part.first)
            assert place.isnan().all() or torch.equal(place, part.tensor.reshape(part.shape))  # copies agree
            place.copy_(part.tensor.reshape(part.shape))
        assert (model.embed.weight[model.embed.shard_indices.num_org_elements :] == 7).all()  # padding is left alone
    for name in SHAPES:
        assert torch.equal(joined[name].view(torch.int16), expected[name].view(torch.int16)), name
    assert covered == {name: math.prod(shape) for name, shape in SHAPES.items()}
    assert sum(proofs) % 2**64 == es_kernels.fingerprint(es_kernels.ParamTable(expected))


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("noise_rank, rank", [(1, 1), (3, 8)])
def test_adapters_of_all_ranks_add_the_noise_of_the_members(size, noise_rank, rank):
    from es_finetune.models.members import MemberNoise
    from es_finetune.workers.vllm.extension import slots_of

    shapes = {name: shape for name, shape in SHAPES.items() if name.startswith("a.") and len(shape) == 2}
    full = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    noise = MemberNoise(list(shapes), [5, 6], [0.1, -0.1], noise_rank)
    added = {name: torch.full((2, *shape), math.nan) for name, shape in shapes.items()}
    kv = max(1, KV_HEADS // size) * HEAD
    heights = {"qkv_proj": [HEADS // size * HEAD, kv, kv], "gate_up_proj": [INNER // size] * 2}
    for at in range(size):
        layers = {}
        for name, base in model_of(at, size, full).a.named_children():
            rows, cols = base.weight.shape
            of_slices = heights.get(name, [rows])
            layers[f"a.{name}"] = SimpleNamespace(
                base_layer=base,
                lora_a_stacked=tuple(torch.zeros(4, 1, rank, cols) for _ in of_slices),
                lora_b_stacked=tuple(torch.zeros(4, 1, height, rank) for height in of_slices),
            )
        slots = list(slots_of(layers, shapes, FUSED, at))
        layers["a.qkv_proj"].lora_b_stacked = (torch.zeros(4, 1, sum(heights["qkv_proj"]), rank),)
        assert len(list(slots_of(layers, shapes, FUSED, at))) == len(slots) - 3  # one adapter for all of q, k and v
        assert {each.part.name for each in slots} == set(shapes)
        for each in slots:
            each.put(noise)
            product = each.b @ each.a
            part = each.part
            assert not product[2:].any()
            for member in range(2):
                place = torch.as_strided(
                    added[part.name], part.shape, (part.index_stride, 1), member * math.prod(each.shape) + part.first
                )
                place.copy_(product[member])
    for member in range(2):
        expected = {name: torch.zeros(shape) for name, shape in shapes.items()}
        es_kernels.add_noise_(expected, noise.seeds[member], noise.coefs[member], noise_rank=noise_rank)
        for name in shapes:
            torch.testing.assert_close(added[name][member], expected[name], rtol=1e-5, atol=1e-7)


def test_layouts_that_are_not_known_are_refused_by_name():
    from vllm.model_executor.layers.linear import ColumnParallelLinear

    from es_finetune.workers.vllm.extension import parts_of

    class Packed(ColumnParallelLinear):
        pass

    def refused(module, words):
        model = torch.nn.Module()
        model.layer = module
        with pytest.raises(ValueError, match=words):
            list(parts_of(model, 0))

    place = {"tp_rank": 0, "tp_size": 1}
    refused(
        layer(ColumnParallelLinear, {"weight": torch.empty(0)}, **place),
        "vLLM has taken the weights out of layer.weight",
    )
    refused(
        layer(ColumnParallelLinear, {"weight": torch.ones(4, 4, 2)}, **place), "layer.weight has a layout of vLLM's own"
    )
    refused(
        layer(ColumnParallelLinear, {"weight_packed": torch.ones(4, 4)}, **place),
        "layer.weight_packed has a layout of vLLM's own",
    )
    refused(
        layer(Packed, {"weight": torch.ones(4, 4)}, **place), "how vLLM lays out layer.weight .Packed. is not known"
    )
    quantised = layer(ColumnParallelLinear, {"weight": torch.ones(4, 4)}, **place)
    quantised.quant_method = object()
    refused(quantised, "layer is quantised .object.")
    refused(
        layer(ColumnParallelLinear, {"weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}, **place),
        "layer.weight is torch.float8_e4m3fn in vLLM",
    )
    experts = torch.nn.Module()
    experts.experts = torch.nn.Module()
    experts.experts.w13_weight = torch.nn.Parameter(torch.ones(2, 4, 4))
    refused(experts, "how vLLM lays out layer.experts.w13_weight")
