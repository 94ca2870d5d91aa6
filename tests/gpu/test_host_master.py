"""Contract: on a GPU master="host" keeps theta in pinned host memory, and gives the bits of master="fp32" although the
CPU, which computes its updates, does not wait for what the GPU still has in its queue."""

import itertools

import pytest
import torch

from es_finetune import EvolutionStrategy

DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def bits(t):
    return t.detach().cpu().view({4: torch.int32, 2: torch.int16}[t.element_size()])


def optimizer(master, **options):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1000, 1001), (33,), (0, 4), (512, 64)]
    named = [
        (f"w{i}", torch.nn.Parameter((0.1 * torch.randn(shape, generator=generator)).to("cuda", dtype)))
        for i, (shape, dtype) in enumerate(zip(shapes, itertools.cycle(DTYPES)))
    ]
    return EvolutionStrategy(
        named,
        master=master,
        sigma=0.05,
        lr=0.02,
        population=4,
        weight_decay=0.1,
        anchored=True,
        momentum=0.5,
        **options,
    )


def test_theta_is_pinned():
    weights = optimizer("host").tables[0]
    assert all(t.is_pinned() for t in weights.theta.tensors if t.numel()) and all(
        p.is_cuda for p in weights.live.tensors
    )
    assert all(t.device.type == "cpu" for t in weights.anchor.tensors)


@pytest.mark.parametrize("antithetic, noise_rank", [(False, 0), (True, 0), (False, 1)])
def test_host_has_the_bits_of_fp32_with_a_full_queue(antithetic, noise_rank):
    runs = []
    for master in ("fp32", "host"):
        opt, seen = optimizer(master, antithetic=antithetic, noise_rank=noise_rank), []

        def look(opt=opt, seen=seen):
            seen.extend(p.detach().clone() for p in opt.param_groups[0]["params"])
            torch.cuda._sleep(50_000_000)  # the next member and the look at it wait in the queue, while the CPU goes on
            return float(len(seen) % 5)

        for _ in range(3):
            opt.step(look)
            look()
            opt.tell([2.0, -1.0, 0.0, 0.5])
            look()
        state = opt.state_dict()
        opt.tell([0.0, -1.0, 0.0, 0.5])
        opt.load_state_dict(state)
        look()
        runs.append([*seen, *state["es"]["theta"].values()])
    assert len(runs[0]) == len(runs[1])
    for fp32, host in zip(*runs, strict=True):
        assert torch.equal(bits(fp32), bits(host))
