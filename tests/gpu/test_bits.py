"""Contract: on a real GPU the CUDA and Triton backends give the bits of the CPU backend (which gives NumPy's:
tests/es_kernels), on any stream, in replayed graphs, at any alignment; and read and write nothing else."""

import itertools

import pytest
import torch

import es_kernels
from es_kernels import ParamTable, Segment, add_noise_, factors, fingerprint

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("cuda", "triton")
SPECIAL = torch.tensor(
    [float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-40, -1e-42, 6e-8, 65504.0, 65519.0, 3.3895e38]
)


@pytest.fixture(params=BACKENDS)
def gpu(request):
    why = es_kernels.backends.unavailable(request.param, torch.device("cuda", 0))
    if why:
        # A silent skip would hide a broken backend
        pytest.fail(f"{request.param} must work where tests/gpu run: {why}")
    with es_kernels.backend(request.param):
        yield request.param


def bits(t):
    return t.cpu().view({4: torch.int32, 2: torch.int16}[t.element_size()])


def weights(n, dtype, seed=0, offset=0):
    """n weights on the CPU, special values among them, `offset` elements into their storage."""
    t = torch.randn(n + offset, generator=torch.Generator().manual_seed(seed))
    t[: len(SPECIAL)] = SPECIAL[: n + offset]
    t = t * 1.0
    return t.to(dtype)[offset:]


def on_gpu(t):
    """A copy on the GPU with the same offset into its storage, guarded by a poisoned margin."""
    offset = t.storage_offset()
    storage = torch.full((offset + t.numel() + 64,), 7.0, dtype=t.dtype, device="cuda")
    view = storage[offset : offset + t.numel()]
    view.copy_(t)
    return storage, view


def assert_same(out, *args, **kwargs):
    """add_noise_ of CPU tensors `out` (and base, anchor) equals its twin on the GPU, and the margin is untouched."""
    moved, storages = {}, []
    for what in ("base", "anchor"):
        if kwargs.get(what) is not None:
            storage, moved[what] = on_gpu(kwargs[what])
    storage, gpu_out = on_gpu(out)
    storages.append(storage)
    add_noise_(gpu_out, *args, **{**kwargs, **moved})
    with es_kernels.backend("cpu"):
        add_noise_(out, *args, **kwargs)
    assert torch.equal(bits(gpu_out), bits(out))
    margin = torch.cat([storage[: out.storage_offset()], storage[out.storage_offset() + out.numel() :]])
    assert (margin == 7).all()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("out_dtype, base_dtype", [*itertools.product(DTYPES, DTYPES), *((d, None) for d in DTYPES)])
def test_dtypes_seeds_and_sizes(gpu, out_dtype, base_dtype, rounding):
    extra = {"rounding": "stochastic", "rounding_seed": 2**63 + 5} if rounding == "stochastic" else {}
    for n, n_seeds in [*((n, 1) for n in range(34)), (70001, 0), (70001, 1), (70001, 2), (70001, 30), (4097, 300)]:
        base = None if base_dtype is None else weights(n, base_dtype, seed=1)
        assert_same(
            weights(n, out_dtype),
            list(range(2**62, 2**62 + n_seeds)),
            [0.01 * (i + 1) for i in range(n_seeds)],
            base=base,
            name="w",
            **extra,
        )


@pytest.mark.parametrize("offset", range(9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_storage_offsets(gpu, dtype, offset):
    assert_same(weights(5000, dtype, offset=offset), 1, 1e-3, name="w")
    assert_same(
        weights(5000, dtype, offset=offset),
        [1, 2],
        [1e-3, -1e-3],
        base=weights(5000, torch.float32, seed=2, offset=3),
        name="w",
    )


@pytest.mark.parametrize("n_seeds", [1, 30])
@pytest.mark.parametrize("anchor_dtype", [None, *DTYPES])
def test_decay_and_anchor(gpu, anchor_dtype, n_seeds):
    anchor = None if anchor_dtype is None else weights(9001, anchor_dtype, seed=3)
    assert_same(
        weights(9001, torch.bfloat16), list(range(n_seeds)), [0.1] * n_seeds, anchor=anchor, decay=0.01, name="w"
    )


@pytest.mark.parametrize("rank", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (7, 9), (129, 257), (300, 64)])
def test_low_rank(gpu, rank, shape):
    """As a run of a matrix whose rows it crosses: the end of a row, whole rows and a beginning."""
    rows, cols = shape
    n, stochastic = rows * cols, {"rounding": "stochastic", "rounding_seed": 7}
    for dtype, n_seeds, extra in itertools.product(DTYPES, (0, 1, 2, 30, 300), ({}, stochastic, {"decay": 0.01})):
        out, base = weights(n, dtype), weights(n, torch.float32, seed=1)
        storage, on_device = on_gpu(out)
        segment = [Segment("w", 1, n, first=3 * cols - 1, width=cols)]
        seeds, coefs = list(range(n_seeds)), [0.01] * n_seeds
        options = {"noise_rank": rank, **extra}
        add_noise_(ParamTable([("w", on_device, segment)]), seeds, coefs, {"w": base.cuda()}, **options)
        with es_kernels.backend("cpu"):
            add_noise_(ParamTable([("w", out, segment)]), seeds, coefs, {"w": base}, **options)
        assert torch.equal(bits(on_device), bits(out)) and (storage[n:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors(gpu, dtype):
    shapes = {"a": (40, 8), "b": (1, 3), "c": (7, 1300), "empty": (0, 4)}
    for rank, seeds in ((1, [3]), (3, [1, 2, -5]), (64, list(range(200))), (2, torch.arange(5, device="cuda"))):
        ours = factors(shapes, seeds, rank, dtype=dtype, device="cuda")
        with es_kernels.backend("cpu"):
            theirs = factors(shapes, seeds if isinstance(seeds, list) else seeds.cpu(), rank, dtype=dtype)
        for name in shapes:
            for a, b in zip(ours[name], theirs[name], strict=True):
                assert torch.equal(bits(a.contiguous()), bits(b.contiguous()))


@pytest.mark.parametrize("first", [0, 3, 2**32 - 40, 2**35 - 40, 2**35 - 43, 2**63])
def test_segments_and_far_indices(gpu, first):
    for rows, cols, row_stride, index_stride in [
        (1, 1000, 1000, 1000),
        (37, 24, 40, 64),
        (37, 21, 23, 45),
        (5, 3, 3, 3),
        (64, 64, 64, 64),
    ]:
        segment = Segment("w", rows, cols, 0, row_stride, first, index_stride)
        t = weights(rows * row_stride, torch.bfloat16, offset=0)
        g = t.cuda()
        add_noise_(ParamTable([("w", g, [segment])]), [5, 6], [1.0, 0.5])
        with es_kernels.backend("cpu"):
            add_noise_(ParamTable([("w", t, [segment])]), [5, 6], [1.0, 0.5])
        assert torch.equal(bits(g), bits(t))


def model():
    """A mixed table of many tensors, some tiny, some strided."""
    sizes = [(1,), (7,), (64, 64), (1000, 3), (33, 129), (0,), (300_001,), (512, 1024)]
    named = {f"w{i}": weights(torch.Size(s).numel(), DTYPES[i % 3], seed=i).reshape(s) for i, s in enumerate(sizes)}
    named["slice"] = weights(64 * 96, torch.bfloat16, seed=9).reshape(64, 96)[:, 16:80]
    return named


def test_whole_model_in_one_call_and_its_fingerprint(gpu):
    cpu = model()
    cuda = {
        n: t.cuda() if n != "slice" else t.as_strided((64, 96), (96, 1), 0).cuda()[:, 16:80] for n, t in cpu.items()
    }
    for seeds, coefs in ((1, 1e-3), ([1, 2], [-1e-3, 1e-3]), (list(range(30)), [1e-4] * 30)):
        add_noise_(cuda, seeds, coefs)
        of_cuda = fingerprint(cuda)
        with es_kernels.backend("cpu"):
            add_noise_(cpu, seeds, coefs)
            assert of_cuda == fingerprint(cpu)
        for name in cpu:
            assert torch.equal(bits(cuda[name]), bits(cpu[name])), name


def test_master_on_the_gpu_restores_after_many_members(gpu):
    master = torch.randn(100_003, device="cuda")
    live = master.bfloat16()
    expected = bits(live)
    for member in range(1000):
        add_noise_(live, member, 1e-3, base=master, name="w")
    add_noise_(live, [], [], base=master, name="w")
    assert torch.equal(bits(live), expected)


def test_runs_on_the_current_stream(gpu):
    t = torch.zeros(1 << 22, device="cuda")
    expected = torch.zeros(1 << 22)
    with es_kernels.backend("cpu"):
        add_noise_(expected, 3, 1.0, base=torch.full_like(expected, 5.0), name="w")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # were the kernel on another stream it would run before the fill
        t.fill_(5.0)
        add_noise_(t, 3, 1.0, name="w")
    stream.synchronize()
    assert torch.equal(bits(t), bits(expected))


@pytest.mark.parametrize("n_seeds", [1, 2, 200])
@pytest.mark.parametrize("noise_rank", [0, 1, 5])
def test_captured_graph_replays_new_members(gpu, n_seeds, noise_rank):
    base = torch.randn(21, 2381)
    live, gpu_base = torch.zeros_like(base, dtype=torch.bfloat16, device="cuda"), base.cuda()
    options = {"name": "w", "rounding": "stochastic", "noise_rank": noise_rank}
    seeds, coefs = torch.zeros(n_seeds, dtype=torch.int64, device="cuda"), torch.zeros(n_seeds, device="cuda")
    rounding_seed = torch.zeros(1, dtype=torch.int64, device="cuda")

    def call():
        add_noise_(live, seeds, coefs, gpu_base, rounding_seed=rounding_seed, **options)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()  # uploads the table, compiles
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for generation in range(3):
        new = torch.randint(-(2**62), 2**62, (n_seeds + 1,))
        (
            seeds.copy_(new[:-1]),
            rounding_seed.copy_(new[-1:]),
            coefs.copy_(torch.full((n_seeds,), 0.01 * (generation + 1))),
        )
        graph.replay()
        expected = torch.zeros_like(base, dtype=torch.bfloat16)
        with es_kernels.backend("cpu"):
            add_noise_(expected, new[:-1], coefs.cpu(), base, rounding_seed=new[-1:], **options)
        assert torch.equal(bits(live), bits(expected))


def test_a_table_outlives_its_place_in_the_cache_while_a_side_stream_reads_it(gpu):
    """Eight other tables push the first one out, and new tensors ask for its memory, before the side stream comes to
    read it."""
    live, expected = torch.zeros(5000, device="cuda"), torch.zeros(5000)
    add_noise_(live, 1, 0.0, name="w")  # uploads, on this stream
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        add_noise_(live, 1, 1.0, name="w")
    for k in range(9):
        add_noise_(torch.zeros(10 + k, device="cuda"), 1, 1.0, name="w")
    poison = [torch.full((15,), -1, dtype=torch.int64, device="cuda") for _ in range(200)]
    side.synchronize()
    with es_kernels.backend("cpu"):
        add_noise_(expected, 1, 1.0, name="w")
    assert torch.equal(bits(live), bits(expected)) and len(poison) == 200


@pytest.mark.parametrize("n_seeds", [1, 200])
def test_a_call_with_python_numbers_does_not_wait_for_the_queue(gpu, n_seeds):
    t, expected = torch.zeros(5000, device="cuda"), torch.zeros(5000)

    def call(t):
        add_noise_(t, list(range(n_seeds)), [0.1] * n_seeds, name="w", rounding="stochastic", rounding_seed=3)

    call(t)  # uploads the table, compiles
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    call(t)
    waited = torch.cuda.current_stream().query()
    with es_kernels.backend("cpu"):
        call(expected), call(expected)
    assert not waited and torch.equal(bits(t), bits(expected))


@pytest.mark.parametrize("n_seeds", [1, 200])
def test_python_numbers_in_a_captured_graph(gpu, n_seeds):
    """As the kernel's parameters they are replayed; what would have to be copied is refused."""
    t = torch.zeros(5000, device="cuda")
    call = lambda: add_noise_(t, list(range(n_seeds)), [0.1] * n_seeds, name="w")  # noqa: E731
    call()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        try:
            if gpu == "triton" or n_seeds > 128:
                with pytest.raises(
                    RuntimeError,
                    match="while a CUDA graph is captured, pass seeds, coefs and rounding_seed as tensors on cuda:0",
                ):
                    call()
            else:
                call()
            t.mul_(1.0)  # a graph of nothing warns
        finally:
            graph.capture_end()


def test_reference_serves_cuda_tensors_when_asked():
    t = torch.zeros(1000, device="cuda", dtype=torch.bfloat16)
    expected = torch.zeros(1000, dtype=torch.bfloat16)
    with es_kernels.backend("reference"):
        add_noise_(t, 1, 1.0, name="w")
        add_noise_(expected, 1, 1.0, name="w")
    assert torch.equal(bits(t), bits(expected))


def test_host_master_in_pinned_memory(gpu):
    if gpu != "cuda":
        pytest.skip("the CUDA backend reads pinned host memory in place")
    master = torch.randn(10_001).pin_memory()
    live = torch.empty(10_001, dtype=torch.bfloat16, device="cuda")
    add_noise_(live, 4, 0.1, base=master, name="w")
    expected = torch.empty(10_001, dtype=torch.bfloat16)
    with es_kernels.backend("cpu"):
        add_noise_(expected, 4, 0.1, base=master, name="w")
    assert torch.equal(bits(live), bits(expected))


def test_no_extra_device_memory(gpu):
    live = {f"w{i}": torch.zeros(1 << 22, dtype=torch.bfloat16, device="cuda") for i in range(8)}
    table = ParamTable(live)
    add_noise_(table, [1, 2], [1.0, -1.0])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    add_noise_(table, [1, 2], [1.0, -1.0])
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 0.001 * 8 * 2 * (1 << 22)


def test_compiled(gpu):
    t, expected = torch.zeros(5000, device="cuda"), torch.zeros(5000)
    seeds, coefs = torch.tensor([7], device="cuda"), torch.ones(1, device="cuda")
    torch.compile(lambda t: add_noise_(t, seeds, coefs, name="w") * 2, fullgraph=True)(t)
    with es_kernels.backend("cpu"):
        add_noise_(expected, 7, 1.0, name="w")
    assert torch.equal(bits(t), bits(expected))
