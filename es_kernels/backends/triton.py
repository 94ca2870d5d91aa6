"""The Triton backend: NVIDIA GPUs without a CUDA toolkit, and AMD. One launch for the whole table, equal to the others
bit for bit.

A program takes a range of consecutive units (a unit is 8 indices, one noise block: csrc/es_kernels.h), finds the
segment of the first by binary search and goes on through the next ones. Tensors are [UNITS, 8]: a thread owns whole
units, so nothing is exchanged between threads. Memory moves as 128-bit words, [UNITS, 4] int32, which hold 4 float32 or
8 values of 16 bits.

Of noise of low rank a program takes whole tiles of a matrix, [128, 128], 64 values a thread of 256. A thread draws one
element of L or R, of many seeds of rank 1 one noise block of eight seeds' factors, and these are then exchanged.

Exactness: `tl.fma` where the contract says fma and `enable_fp_fusion=False` so that nothing else becomes one; to
nearest by casts, which are exact on devices (not in the interpreter: tests/conftest.py), stochastically on the bits.

SASS a value, sm_90 (bench/instructions/static_analysis.py): 24.1 bf16 in place, 22.5 f32 -> bf16, 20.9 a seed of the
update. Of rank 1: 8.5, 7.0 and 1.5 (3.2 a seed drawn by itself). Tried: looking for NaNs by `x != x` (3 more, of rank 1
4), multiplying by tl.umulhi and `*` (1.4 more: two instructions where a 64-bit product is one). ptxas moves the loads
behind the noise, so other warps must hide their latency; a barrier moves along with them, and a branch around the noise
keeps them in front for 2.5 more instructions and 16 registers. Of rank 1: tiles loaded or stored in halves (fewer
registers, but each half's L and R are exchanged and multiplied again), four seeds at a time (1.9, as many registers).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .. import noise, streams
from ..layout import Pack
from ..low_rank import FACTOR, FactorLayout
from ..segment import SEGMENT, TILE, UNITS_PER_TILE
from .reference import ieee_denormals

try:
    import triton
    import triton.language as tl
except ImportError as error:
    triton, _import_error = None, error

_UNITS, _WARPS = 256, 4  # units of one step of a program, and warps: 2 units, 16 values, a thread
_PROGRAMS = 64  # a processor: several waves, so that the last one is a small part


def unavailable(device: torch.device) -> str | None:
    if triton is None:
        return f"triton cannot be imported ({_import_error}): pip install triton"
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        return (
            f"triton {triton.__version__} is too old: 3.6, which torch 2.10 brings, is the oldest that it is tested "
            "with"
        )
    if isinstance(_add_noise_kernel, triton.runtime.JITFunction):
        if device.type == "cuda":
            return None
        return (
            f"it serves CUDA and ROCm devices, not {device.type} (unless TRITON_INTERPRET=1 is set before the import)"
        )
    return None if device.type == "cpu" else "TRITON_INTERPRET=1 is set: the interpreter serves CPU tensors only"


def add_noise_(
    pack: Pack,
    seeds: torch.Tensor,
    coefs: torch.Tensor,
    rounding_seed: torch.Tensor | None,
    decay: float,
    noise_rank: int,
) -> None:
    segments = _table(pack)
    stochastic = rounding_seed is not None
    seeds, coefs, *others = streams.staged(
        pack.device, seeds, coefs, *(() if rounding_seed is None else (rounding_seed,))
    )
    key = others[0] if stochastic else seeds  # not read
    grid, per_program = _split(pack, UNITS_PER_TILE if noise_rank else _UNITS)
    with _launching(pack.device):
        _add_noise_kernel[(grid,)](
            segments, len(pack.segments), pack.units, per_program, seeds, coefs, seeds.numel(), key, -decay,
            STOCHASTIC=stochastic, DECAY=decay != 0, NVIDIA=pack.device.type == "cuda" and torch.version.hip is None,
            **_ranked(noise_rank),
        )  # fmt: skip


def factors(layout: FactorLayout, out: torch.Tensor, seeds: torch.Tensor) -> None:
    (seeds,) = streams.staged(out.device, seeds)
    per_seed = -(-layout.units // _UNITS)
    with _launching(out.device):
        _factors_kernel[(per_seed * seeds.numel(),)](
            layout.on_device(out.device), len(layout.table), layout.units, per_seed, seeds, seeds.numel(), out,
            UNITS=_UNITS, **_OPTIONS,
        )  # fmt: skip


def fingerprint(pack: Pack) -> torch.Tensor:
    segments = _table(pack)
    grid, per_program = _split(pack, _UNITS)
    sums = torch.empty(grid, dtype=torch.int64, device=pack.device)
    with _launching(pack.device):
        _fingerprint_kernel[(grid,)](
            segments, len(pack.segments), pack.units, per_program, sums, UNITS=_UNITS, **_OPTIONS
        )
    return sums.sum()  # modulo 2^64


def compile_for(
    target: int | str,
    n_seeds: int | None = 1,
    stochastic: bool = False,
    decay: bool = False,
    kernel: str = "add_noise",
    noise_rank: int = 0,
) -> Any:
    """The kernel as it is launched, compiled without a GPU. target: a compute capability (80, 90, ...) or an AMD
    architecture ("gfx942"). n_seeds: 1, or None for any number. Returns triton's CompiledKernel; its `asm` holds ptx
    and cubin, or amdgcn and hsaco. Must not run under TRITON_INTERPRET=1."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = {"add_noise": _add_noise_kernel, "fingerprint": _fingerprint_kernel, "factors": _factors_kernel}[kernel]
    types = {name: type for name, type in _TYPES.items() if name in fn.arg_names}
    launch = _ranked(noise_rank)
    constants = {"STOCHASTIC": stochastic, "DECAY": decay, "NVIDIA": isinstance(target, int), **launch}
    constants |= {"n_seeds": 1} if n_seeds == 1 else {}
    constants = {name: value for name, value in constants.items() if name in fn.arg_names}
    target = GPUTarget("cuda", target, 32) if isinstance(target, int) else GPUTarget("hip", target, 64)
    return triton.compile(
        ASTSource(fn, types | dict.fromkeys(constants, "constexpr"), constants),
        target=target,
        options={name: launch[name] for name in _OPTIONS},
    )


_OPTIONS = {"num_warps": _WARPS, "num_stages": 1, "enable_fp_fusion": False}
_TYPES = {
    "segments": "*i64",
    "n_segments": "i32",
    "units": "i64",
    "per_program": "i32",
    "seeds": "*i64",
    "coefs": "*fp32",
}
_TYPES |= {"n_seeds": "i32", "rounding_seed": "*i64", "minus_decay": "fp32", "sums": "*i64"}
_TYPES |= {"table": "*i64", "n_factors": "i32", "per_seed": "i32", "out": "*bf16"}


def _table(pack: Pack) -> torch.Tensor:
    """The segments where the kernel reads them."""
    strided = pack.segments[(pack.segments["rows"] > 1) & (pack.segments["width"] == 0)]
    if len(strided) and (strided["rows"] * strided["units_per_row"]).max() >= 1 << 32:
        raise ValueError("the triton backend takes up to 2^35 elements in a segment of several rows: split it")
    return pack.on_device()


def _ranked(noise_rank: int) -> dict[str, Any]:
    """What the kernel is compiled for. Of a tile of a matrix 256 threads have 64 values each."""
    if noise_rank == 0:
        return {"UNITS": _UNITS, "RANK": 0, "SCALE": 1.0, **_OPTIONS}
    scale = float(noise.rank_scale(noise_rank))
    return {"UNITS": 2 * _UNITS, "RANK": noise_rank, "SCALE": scale, **_OPTIONS, "num_warps": 2 * _WARPS}


def _split(pack: Pack, step: int) -> tuple[int, int]:
    """How many programs, and how many units each takes, a multiple of `step`."""
    processors = (
        torch.cuda.get_device_properties(pack.device).multi_processor_count if pack.device.type == "cuda" else 1
    )
    steps = -(-pack.units // step)
    per_program = -(-steps // (_PROGRAMS * processors)) * step
    return -(-pack.units // per_program), per_program


def _launching(device: torch.device) -> contextlib.AbstractContextManager[None]:
    if device.type == "cuda":
        return torch.cuda.device(device)
    return _interpreting()


@contextlib.contextmanager
def _interpreting() -> Iterator[None]:
    with ieee_denormals(), np.errstate(all="ignore"):
        yield


if triton is not None:
    _WORDS_A_SEGMENT, _WORDS_A_FACTOR = tl.constexpr(SEGMENT.itemsize // 8), tl.constexpr(FACTOR.itemsize // 8)
    _TILE, _TILE_UNITS = tl.constexpr(TILE), tl.constexpr(UNITS_PER_TILE)
    _DOMAIN_LEFT, _DOMAIN_RIGHT = tl.constexpr(noise.DOMAIN_LEFT), tl.constexpr(noise.DOMAIN_RIGHT)
    _DOMAIN_FINGERPRINT, _DOMAIN_ROUNDING = tl.constexpr(noise.DOMAIN_FINGERPRINT), tl.constexpr(noise.DOMAIN_ROUNDING)
    _M0, _M1 = map(tl.constexpr, noise._PHILOX_M)
    _W0, _W1 = map(tl.constexpr, noise._PHILOX_W)
    _LOG0, _LOG1, _LOG2, _LOG3 = (tl.constexpr(float(c)) for c in noise.LOG)
    _LOG_SLOPE = tl.constexpr(float(noise.LOG_SLOPE))
    _RSQRT_SEED, _RSQRT = tl.constexpr(noise.RSQRT_SEED), tl.constexpr(float(noise.RSQRT))
    _COS0, _COS1, _COS2, _COS3 = (tl.constexpr(float(c)) for c in noise.COS)
    _SIN0, _SIN1, _SIN2 = (tl.constexpr(float(c)) for c in noise.SIN)

    # ---- the noise, line by line as in noise.py ----

    @triton.jit
    def _halves(number):
        return number.to(tl.uint32), (number >> 32).to(tl.uint32)

    @triton.jit
    def _seed(p, given=True):
        """The two words of the seed at p; 0 if none was given. Halves of a 64-bit load would be multiplied as 64 bits,
        one instruction more."""
        words = p.to(tl.pointer_type(tl.uint32))
        return tl.load(words, mask=given, other=0), tl.load(words + 1, mask=given, other=0)

    @triton.jit
    def _philox(c0, c1, c2, c3, key, ROUNDS: tl.constexpr):
        k0, k1 = key
        for _ in tl.static_range(ROUNDS):
            p0 = c0.to(tl.uint64) * _M0
            p1 = c2.to(tl.uint64) * _M1
            c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
            c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
            k0 += _W0
            k1 += _W1
        return c0, c1, c2, c3

    @triton.jit
    def _words(block, domain, stream, key, ROUNDS: tl.constexpr):
        """The four random words of each block, given as (low, high)."""
        low, high = block
        return _philox(low, high | (domain << 29), stream.to(tl.uint32), (stream >> 32).to(tl.uint32), key, ROUNDS)

    @triton.jit
    def _box_muller(w, zero):
        """zero: 0, unknown to the compiler. Of two constants in (w & mask) | set one takes a register: made from a
        variable it stays there, else ptxas moves it in again each time, 1.7 instructions a value."""
        f = ((w & (zero + 0xFFFFC000)) | 0x2000).to(tl.float32).to(tl.uint32, bitcast=True)
        log = (f - 0x4F800000).to(tl.int32, bitcast=True).to(tl.float32)
        m = ((f & (zero + 0x007FFFFF)) | 0x3F800000).to(tl.float32, bitcast=True)
        v = tl.fma(tl.fma(tl.fma(_LOG3, m, _LOG2), m, _LOG1), m, _LOG0)
        v = tl.fma(log, _LOG_SLOPE, v)
        s = tl.sub(_RSQRT_SEED, (w << 31) | (v.to(tl.uint32, bitcast=True) >> 1)).to(tl.float32, bitcast=True)
        a = v * s
        r = a * tl.fma(a * -1.0, s, _RSQRT)  # `-a` is 0 - a, one more instruction, up to triton 3.8
        t = ((w & (zero + 0x3FFE)) | 0x4B000000).to(tl.float32, bitcast=True) - 8396799.0  # 2^23 + 8191
        z = t * t
        x_over_r = tl.fma(tl.fma(tl.fma(_COS3, z, _COS2), z, _COS1), z, _COS0)
        y_over_rt = tl.fma(tl.fma(_SIN2, z, _SIN1), z, _SIN0)
        return r * x_over_r, (r * t) * y_over_rt

    @triton.jit
    def _together(w0, w1, w2, w3):
        """[UNITS] x 4 -> [UNITS, 4], in this order."""
        pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        return tl.reshape(pairs, [w0.shape[0], 4])

    @triton.jit
    def _interleave(even, odd):
        """[UNITS, 4] x 2 -> [UNITS, 8]."""
        return tl.reshape(tl.join(even, odd), [even.shape[0], 8])

    @triton.jit
    def _concatenate(low, high):
        """[UNITS, 4] x 2 -> [UNITS, 8]."""
        return tl.reshape(tl.permute(tl.join(low, high), [0, 2, 1]), [low.shape[0], 8])

    @triton.jit
    def _halve(x):
        """[UNITS, 8] -> lanes 0..3 and 4..7, [UNITS, 4] each."""
        return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, 4]), [0, 2, 1]))

    @triton.jit
    def _pick(lane, x0, x1, x2, x3):
        """x0 where lane is 0, ... x3 where it is 3."""
        return tl.where(lane < 2, tl.where(lane == 0, x0, x1), tl.where(lane == 2, x2, x3))

    @triton.jit
    def _normals(block, domain, lane, stream, seed, zero, VECTOR: tl.constexpr):
        w0, w1, w2, w3 = _words(block, domain, stream, seed, 10)
        if VECTOR:
            x, y = _box_muller(_together(w0, w1, w2, w3), zero)
            normals = _interleave(x, y)
        else:
            x, y = _box_muller(_pick(lane >> 1, w0, w1, w2, w3), zero)
            normals = tl.where((lane & 1) == 0, x, y)
        return normals

    @triton.jit
    def _thresholds(block, lane, stream, seed, VECTOR: tl.constexpr):
        """The 16-bit thresholds of stochastic rounding."""
        w0, w1, w2, w3 = _words(block, _DOMAIN_ROUNDING, stream, seed, 10)
        if VECTOR:
            w = _together(w0, w1, w2, w3)
            thresholds = _interleave(w & 0xFFFF, w >> 16)
        else:
            thresholds = (_pick(lane >> 1, w0, w1, w2, w3) >> ((lane & 1) * 16).to(tl.uint32)) & 0xFFFF
        return thresholds

    @triton.jit
    def _fingerprint_keys(block, lane, stream, dtype, VECTOR: tl.constexpr):
        """What is added to the bits, and what the sum is multiplied with."""
        w0, w1, w2, w3 = _words(block, _DOMAIN_FINGERPRINT, stream, _halves(dtype.to(tl.uint64)), 7)
        if VECTOR:
            w = _together(w0, w1, w2, w3)
            add = _concatenate(_together(w1, w2, w3, w0), _together(w2, w3, w0, w1))
            multiply = _concatenate(w, (w << 16) | (w >> 16)) | 1
        else:
            add = _pick((lane + 1 + (lane >> 2)) & 3, w0, w1, w2, w3)
            w = _pick(lane & 3, w0, w1, w2, w3)
            multiply = tl.where(lane < 4, w, (w << 16) | (w >> 16)) | 1
        return add, multiply

    # ---- storage formats ----

    @triton.jit
    def _to_f32(words, halves, dtype):
        """Stored bits -> float32. `words` holds them if dtype is float32, else `halves`: uint32 [UNITS, 8]."""
        if dtype == 0:
            x = words.to(tl.float32, bitcast=True)
        elif dtype == 1:
            x = (halves << 16).to(tl.float32, bitcast=True)
        else:
            x = halves.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        return x

    # To storage. Arithmetic on NVIDIA makes one NaN, 7FFFFFFF, and casts make 7FFF of it: more than any other integer,
    # so a minimum, one instruction for two of 16 bits, makes it that of the format.

    @triton.jit
    def _one_nan(x, n_seeds, NVIDIA: tl.constexpr):
        """x, of which any NaN is 7FFFFFFF. x: what an fma made if there are seeds."""
        if not NVIDIA or n_seeds == 0:
            x = tl.where(x != x, 0x7FFFFFFF, x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        return x

    @triton.jit
    def _to_f32_bits(x):
        return tl.minimum(x.to(tl.int32, bitcast=True), 0x7FC00000).to(tl.uint32, bitcast=True)

    @triton.jit
    def _to_bf16(x, r, STOCHASTIC: tl.constexpr):
        if STOCHASTIC:
            bits = ((_to_f32_bits(x) + r) >> 16).to(tl.uint16)  # r has 16 bits: the NaN stays what it is
        else:
            bits = tl.minimum(x.to(tl.bfloat16).to(tl.int16, bitcast=True), 0x7FC0).to(tl.uint16, bitcast=True)
        return bits

    @triton.jit
    def _to_f16(x, r, STOCHASTIC: tl.constexpr):
        if STOCHASTIC:
            # The magnitude in f16 ulps is n + f: up if floor(f 2^16) + r >= 2^16. A normal has 13 bits of f, so r >> 3
            # decides.
            u = x.to(tl.uint32, bitcast=True)
            magnitude = u & 0x7FFFFFFF
            normal = tl.minimum(((magnitude + (r >> 3)) >> 13).to(tl.int32) - (112 << 10), 0x7C00).to(tl.uint32)
            small = tl.where(magnitude < 0x38800000, magnitude, 0).to(tl.float32, bitcast=True)
            subnormal = ((small * 1099511627776.0).to(tl.int32).to(tl.uint32) + r) >> 16  # 2^40
            bits = tl.where(magnitude < 0x38800000, subnormal, normal) | ((u >> 16) & 0x8000)
            bits = tl.where(magnitude > 0x7F800000, 0x7E00, bits).to(tl.uint16)
        else:
            bits = tl.minimum(x.to(tl.float16).to(tl.int16, bitcast=True), 0x7E00).to(tl.uint16, bitcast=True)
        return bits

    # ---- memory ----

    @triton.jit
    def _only_if(scalar, mask):
        return tl.where(scalar, mask, False)  # `mask & scalar` is no mask to the interpreter

    @triton.jit
    def _unit(address, dtype, at):
        """The addresses of the 16 or 32 bytes of units, of which the first elements are `at`."""
        return address + at * tl.where(dtype == 0, 4, 2)

    @triton.jit
    def _pointers(address, TYPE: tl.constexpr, N: tl.constexpr):
        """To the N words of 16 bytes at each address."""
        return tl.multiple_of(address.to(tl.pointer_type(TYPE)), 16)[:, None] + tl.arange(0, N)[None, :]

    @triton.jit
    def _load_vectors(address, dtype, inside):
        """address: of each unit. -> its first 16 bytes, and its last, as uint32 [UNITS, 4]."""
        p = _pointers(address, tl.uint32, 4)
        return tl.load(p, mask=inside[:, None]), tl.load(p + 4, mask=_only_if(dtype == 0, inside)[:, None])

    @triton.jit
    def _load(address, dtype, at, inside, VECTOR: tl.constexpr):
        """The bits of elements `at` (of lane 0 of each unit if VECTOR), as _unpack takes them. Nothing here waits for
        the memory."""
        if VECTOR:
            low, high = _load_vectors(_unit(address, dtype, at), dtype, inside)
        else:
            low = tl.load(address.to(tl.pointer_type(tl.uint32)) + at, mask=_only_if(dtype == 0, inside))
            high = tl.load(address.to(tl.pointer_type(tl.uint16)) + at, mask=_only_if(dtype != 0, inside)).to(tl.uint32)
        return low, high

    @triton.jit
    def _unpack(low, high, VECTOR: tl.constexpr):
        """-> words, halves, of which the dtype makes one meaningful."""
        if VECTOR:
            words, halves = _concatenate(low, high), _interleave(low & 0xFFFF, low >> 16)
        else:
            words, halves = low, high
        return words, halves

    @triton.jit
    def _store_vectors(address, dtype, inside, x, r, STOCHASTIC: tl.constexpr):
        """address: of the elements of each unit."""
        if dtype == 0:
            p = _pointers(address, tl.uint32, 4)
            low, high = _halve(_to_f32_bits(x))
            tl.store(p, low, mask=inside[:, None])
            tl.store(p + 4, high, mask=inside[:, None])
        elif dtype == 1:
            tl.store(_pointers(address, tl.uint16, 8), _to_bf16(x, r, STOCHASTIC), mask=inside[:, None])
        else:
            tl.store(_pointers(address, tl.uint16, 8), _to_f16(x, r, STOCHASTIC), mask=inside[:, None])

    @triton.jit
    def _store(address, dtype, at, inside, x, r, STOCHASTIC: tl.constexpr, VECTOR: tl.constexpr):
        """Rounds and stores float32. Any NaN is stored as the one NaN of the format."""
        if VECTOR:
            _store_vectors(_unit(address, dtype, at), dtype, inside, x, r, STOCHASTIC)
        else:
            tl.store(address.to(tl.pointer_type(tl.uint32)) + at, _to_f32_bits(x), mask=_only_if(dtype == 0, inside))
            if dtype == 1:
                halves = _to_bf16(x, r, STOCHASTIC)
            else:
                halves = _to_f16(x, r, STOCHASTIC)
            tl.store(address.to(tl.pointer_type(tl.uint16)) + at, halves, mask=_only_if(dtype != 0, inside))

    # ---- the table ----

    @triton.jit
    def _find(segments, n_segments, unit):
        """The segment of a unit: the first whose unit_end lies past it."""
        low, high = 0, n_segments - 1
        while low < high:
            middle = (low + high) >> 1
            if tl.load(segments + tl.cast(middle, tl.int64) * _WORDS_A_SEGMENT + 12) > unit:
                high = middle
            else:
                low = middle + 1
        return segments + tl.cast(low, tl.int64) * _WORDS_A_SEGMENT

    @triton.jit
    def _shape(segment, unit):
        """Of struct Segment: rows, cols, first, index_stride, stream, units_per_row; and the number that unit `unit` of
        the table has in it."""
        rows, units_per_row = tl.load(segment + 3), tl.load(segment + 11)
        start = unit - (tl.load(segment + 12) - rows * units_per_row)
        return (
            rows,
            tl.load(segment + 4),
            tl.load(segment + 8),
            tl.load(segment + 9),
            tl.load(segment + 10),
            units_per_row,
            start,
        )

    @triton.jit
    def _dtypes(segment):
        """out_dtype, base_dtype, anchor_dtype, vector_path: four int32 at the end of struct Segment."""
        two, two_more = tl.load(segment + 13), tl.load(segment + 14)
        return two.to(tl.int32), (two >> 32).to(tl.int32), two_more.to(tl.int32), (two_more >> 32).to(tl.int32)

    @triton.jit
    def _path(segment):
        """How to work on a segment: 0 element by element, 1 vectors over several rows, 2 vectors over one row."""
        _, _, _, vector_path = _dtypes(segment)
        return vector_path + (vector_path != 0).to(tl.int32) * (tl.load(segment + 3) == 1).to(tl.int32)

    @triton.jit
    def _place(
        start, step, count, rows, cols, first, index_stride, units_per_row, UNITS: tl.constexpr, PATH: tl.constexpr
    ):
        """The units start + step ... of a segment: their block as (low, high), lane, row, column, and which are
        inside."""
        if PATH == 2:
            unit = tl.arange(0, UNITS)
            number = (first.to(tl.uint64) >> 3) + start.to(tl.uint64)  # its high half is the same for the whole segment
            block = number.to(tl.uint32) + (step + unit).to(tl.uint32), (number >> 32).to(tl.uint32)
            lane, row, col = 0, 0, unit * 8  # columns after those that _advance has passed
            inside = unit < count - step
        else:
            offset = step + tl.arange(0, UNITS) // (8 if PATH == 0 else 1)
            lane = tl.arange(0, UNITS) & 7 if PATH == 0 else 0
            unit = start + offset
            # With several rows there are fewer than 2^32 units (_table): a 64-bit division would be a function call.
            row = tl.where(rows > 1, unit.to(tl.uint32) // units_per_row.to(tl.uint32), 0).to(tl.int64)
            index = (first + row * index_stride).to(tl.uint64)
            number = (index >> 3) + (unit - row * units_per_row).to(tl.uint64)
            block = number.to(tl.uint32), (number >> 32).to(tl.uint32)
            col = (unit - row * units_per_row) * 8 + lane - (index & 7).to(tl.int64)
            inside = (offset < count) & (col >= 0) & (col < cols)
        return block, lane, row, col, inside

    @triton.jit
    def _advance(address, units, dtype, PATH: tl.constexpr):
        """Vectors over one row need no column: their address goes along."""
        if PATH == 2:
            address += tl.where(dtype == 0, 32, 16).to(tl.int64) * units
        return address

    # ---- noise of low rank ----

    @triton.jit
    def _add_terms(x, at, domain, stream, seed, coef, zero, SIDE: tl.constexpr, RANK: tl.constexpr,
                   SCALE: tl.constexpr):  # fmt: skip
        """x + c L R^T of one seed, [SIDE, SIDE], a term at a time. `at`: which rows of L, then of R, [2 SIDE]; they are
        drawn together, so that there is one for every thread."""
        if RANK > 1:
            coef = coef * SCALE
        for q in range(RANK):
            index = at * RANK + q
            normals = _normals(_halves(index >> 3), domain, index.to(tl.int32) & 7, stream, seed, zero, False)
            left, right = tl.split(tl.permute(tl.reshape(normals, [2, SIDE]), [1, 0]))
            x = tl.fma((left * coef)[:, None], right[None, :], x)
        return x

    @triton.jit
    def _eight_seeds(first_row, first_col, stream, seeds, coefs, zero):
        """c L and R of rank 1 of eight seeds for a tile that begins at multiples of 8, a noise block a thread:
        [128, 2, 2, 2, 2], where the last indices are L or R and the bits of the seed's number, lowest first."""
        one = tl.arange(0, 32 * 8)
        is_left, member, block = (one & 16) == 0, one >> 5, (one & 15).to(tl.uint64)
        number = (tl.where(is_left, first_row, first_col) >> 3) + block
        domain = tl.where(is_left, _DOMAIN_LEFT, _DOMAIN_RIGHT).to(tl.uint32)
        normals = _normals(_halves(number), domain, 0, stream, _seed(seeds + member), zero, True)
        normals = normals * tl.where(is_left, tl.load(coefs + member), 1.0)[:, None]
        normals = tl.permute(tl.reshape(normals, [2, 2, 2, 2, 16, 8]), [4, 5, 3, 2, 1, 0])
        return tl.reshape(normals, [128, 2, 2, 2, 2])

    @triton.jit
    def _add_one(x, factors):
        left, right = tl.split(factors)
        return tl.fma(left[:, None], right[None, :], x)

    @triton.jit
    def _add_two(x, factors):
        first, second = tl.split(factors)
        return _add_one(_add_one(x, first), second)

    @triton.jit
    def _add_four(x, factors):
        first, second = tl.split(factors)
        return _add_two(_add_two(x, first), second)

    @triton.jit
    def _add_eight(x, factors):
        first, second = tl.split(factors)
        return _add_four(_add_four(x, first), second)

    @triton.jit
    def _square_unit(address, dtype, stride, row, col):
        """As _unit, by one 32-bit product a unit. address: of the square."""
        size = tl.where(dtype == 0, 4, 2)
        offset = row.to(tl.uint32).to(tl.uint64) * (stride * size).to(tl.uint32).to(tl.uint64)
        return (address.to(tl.uint64) + (col * size).to(tl.uint64) + offset).to(tl.int64)

    @triton.jit
    def _at(segment, ROLE: tl.constexpr, dtype, stride, row, col):
        """The address of element (row, col) of out, base or anchor."""
        return tl.load(segment + ROLE) + (row * stride + col) * tl.where(dtype == 0, 4, 2)

    @triton.jit
    def _load_square(address, dtype, stride, place, VECTOR: tl.constexpr):
        row, col, inside = place
        if VECTOR:
            low, high = _load_vectors(_square_unit(address, dtype, stride, row, col), dtype, inside)
        else:
            low, high = _load(address, dtype, row * stride + col, inside, False)
        return _unpack(low, high, VECTOR)

    @triton.jit
    def _store_square(out, dtype, stride, place, x, r, STOCHASTIC: tl.constexpr, VECTOR: tl.constexpr):
        row, col, inside = place
        if VECTOR:
            _store_vectors(_square_unit(out, dtype, stride, row, col), dtype, inside, x, r, STOCHASTIC)
        else:
            _store(out, dtype, row * stride + col, inside, x, r, STOCHASTIC, False)

    @triton.jit
    def _add_noise_squares(segment, begin, end, seeds, coefs, n_seeds, rounding_seed, minus_decay,
                           STOCHASTIC: tl.constexpr, DECAY: tl.constexpr, NVIDIA: tl.constexpr, RANK: tl.constexpr,
                           SCALE: tl.constexpr, SIDE: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
        """Units [begin, end) of the table, whole tiles of one segment, in squares of SIDE rows and columns."""
        rows, cols, stream, units_per_row = (
            tl.load(segment + 3), tl.load(segment + 4), tl.load(segment + 10), tl.load(segment + 11)
        )  # fmt: skip
        first, index_stride = tl.load(segment + 8).to(tl.uint64), tl.load(segment + 9).to(tl.uint64)
        width = tl.load(segment + 15).to(tl.uint64)
        out_dtype, base_dtype, anchor_dtype, _ = _dtypes(segment)
        has_anchor = tl.load(segment + 2) != 0
        zero = (rows >> 63).to(tl.uint32)
        first_row, first_col, row_step = first // width, first % width, index_stride // width
        # A segment has fewer than 2^32 tiles: a 64-bit division would be a function call.
        start = begin - (tl.load(segment + 12) - (rows + (_TILE - 1)) // _TILE * units_per_row)
        tile, tiles_per_row = (start // _TILE_UNITS).to(tl.uint32), (units_per_row // _TILE_UNITS).to(tl.uint32)
        top, left = (tile // tiles_per_row).to(tl.int64) * _TILE, (tile % tiles_per_row).to(tl.int64) * _TILE
        position = tl.arange(0, 2 * SIDE)
        domain = tl.where(position < SIDE, _DOMAIN_LEFT, _DOMAIN_RIGHT).to(tl.uint32)
        in_eights = 0  # seeds that are drawn eight at a time
        if RANK == 1 and VECTOR:
            whole_blocks = ((first_row | first_col) & 7 == 0) & (row_step == 1)
            in_eights = tl.where(whole_blocks, (n_seeds - 1) // 8 * 8, 0)
        for _ in range(((end - begin) // _TILE_UNITS).to(tl.int32)):
            for down in range(0, _TILE, SIDE):
                for right in range(0, _TILE, SIDE):
                    # Loaded again each time, as the seeds are: what follows from them would be kept in registers.
                    out_stride, base_stride, anchor_stride = (
                        tl.load(segment + 5), tl.load(segment + 6), tl.load(segment + 7)
                    )  # fmt: skip
                    # Where the square begins: in the segment, in the matrix, in the stream
                    row, col = top + down, left + right
                    at_row, at_col = first_row + row.to(tl.uint64) * row_step, first_col + col.to(tl.uint64)
                    index = first + row.to(tl.uint64) * index_stride + col.to(tl.uint64)
                    base = _at(segment, 1, base_dtype, base_stride, row, col)
                    anchor = _at(segment, 2, anchor_dtype, anchor_stride, row, col)
                    out = _at(segment, 0, out_dtype, out_stride, row, col)
                    rows_left = tl.minimum(rows - row, SIDE).to(tl.int32)
                    cols_left = tl.minimum(cols - col, SIDE).to(tl.int32)
                    if VECTOR:
                        unit = tl.arange(0, SIDE * SIDE // 8)
                        row, col = unit // (SIDE // 8), unit % (SIDE // 8) * 8
                    else:
                        row, col = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
                    inside = (row < rows_left) & (col < cols_left)
                    in_square = (position & (SIDE - 1)).to(tl.uint64)
                    at = tl.where(position < SIDE, at_row + in_square * row_step, at_col + in_square)
                    # Zero, in the layout of the vectors, of words that nobody loads: those of the base would stay in
                    # registers while the seeds pass.
                    nowhere = _only_if(n_seeds < 0, inside)
                    words, halves = _load_square(base, base_dtype, base_stride, (row, col, nowhere), VECTOR)
                    acc = tl.reshape(((words >> 31) >> 1).to(tl.float32, bitcast=True), [SIDE, SIDE])
                    if RANK == 1 and VECTOR:
                        for i in range(0, in_eights, 8):
                            acc = _add_eight(acc, _eight_seeds(at_row, at_col, stream, seeds + i, coefs + i, zero))
                    for i in range(in_eights, n_seeds - 1):
                        acc = _add_terms(
                            acc, at, domain, stream, _seed(seeds + i), tl.load(coefs + i), zero, SIDE, RANK, SCALE
                        )
                    words, halves = _load_square(base, base_dtype, base_stride, (row, col, inside), VECTOR)
                    b = _to_f32(words, halves, base_dtype)
                    if DECAY:
                        words, halves = _load_square(
                            anchor, anchor_dtype, anchor_stride, (row, col, _only_if(has_anchor, inside)), VECTOR
                        )
                        towards = tl.where(has_anchor, _to_f32(words, halves, anchor_dtype), 0.0)
                        b = tl.fma(b - towards, tl.full(b.shape, minus_decay, tl.float32), b)
                    b = tl.reshape(b, [SIDE, SIDE])
                    if n_seeds > 1:
                        b = b + acc
                    if n_seeds > 0:
                        last = n_seeds - 1
                        b = _add_terms(
                            b, at, domain, stream, _seed(seeds + last), tl.load(coefs + last), zero, SIDE, RANK, SCALE
                        )
                    b = _one_nan(b, n_seeds, NVIDIA)
                    if STOCHASTIC:
                        index_stride = tl.load(segment + 9).to(tl.uint64)
                        element = index + row.to(tl.uint64) * index_stride + col.to(tl.uint64)
                        lane = element.to(tl.int32) & 7
                        r = _thresholds(_halves(element >> 3), lane, stream, _seed(rounding_seed), VECTOR)
                    else:
                        r = 0
                    if VECTOR:
                        b = tl.reshape(b, [SIDE * SIDE // 8, 8])
                    _store_square(out, out_dtype, out_stride, (row, col, inside), b, r, STOCHASTIC, VECTOR)
            left += _TILE
            if left >= cols:
                left = left * 0
                top += _TILE

    # ---- the kernels ----

    @triton.jit
    def _add_noise_segment(segment, begin, end, seeds, coefs, n_seeds, last_seed, last_coef, rounding_seed,
                           minus_decay, STOCHASTIC: tl.constexpr, DECAY: tl.constexpr, NVIDIA: tl.constexpr,
                           UNITS: tl.constexpr, PATH: tl.constexpr):  # fmt: skip
        """Units [begin, end) of the table, all of one segment."""
        rows, cols, first, index_stride, stream, units_per_row, start = _shape(segment, begin)
        out_dtype, base_dtype, anchor_dtype, _ = _dtypes(segment)
        out = _advance(tl.load(segment), start, out_dtype, PATH)
        base = _advance(tl.load(segment + 1), start, base_dtype, PATH)
        anchor, has_anchor = _advance(tl.load(segment + 2), start, anchor_dtype, PATH), tl.load(segment + 2) != 0
        out_stride, base_stride, anchor_stride = tl.load(segment + 5), tl.load(segment + 6), tl.load(segment + 7)
        zero = (rows >> 63).to(tl.uint32)
        VECTOR: tl.constexpr = PATH > 0
        SHAPE: tl.constexpr = [UNITS, 8] if VECTOR else [UNITS]
        STEP: tl.constexpr = UNITS if VECTOR else UNITS // 8
        count = (end - begin).to(tl.int32)
        for step in range(0, count, STEP):
            block, lane, row, col, inside = _place(
                start, step, count, rows, cols, first, index_stride, units_per_row, UNITS, PATH
            )
            low, high = _load(base, base_dtype, row * base_stride + col, inside, VECTOR)
            if DECAY:
                anchor_low, anchor_high = _load(
                    anchor, anchor_dtype, row * anchor_stride + col, _only_if(has_anchor, inside), VECTOR
                )
            words, halves = _unpack(low, high, VECTOR)
            # Zero, in the layout of the vectors: tl.zeros would get one where eight threads share a unit, and keep it
            # in the loop.
            acc = ((words >> 31) >> 1).to(tl.float32, bitcast=True)
            for i in range(n_seeds - 1):
                acc = tl.fma(_normals(block, 0, lane, stream, _seed(seeds + i), zero, VECTOR), tl.load(coefs + i), acc)
            if n_seeds > 0:
                normals = _normals(block, 0, lane, stream, last_seed, zero, VECTOR)
            else:
                normals = acc
            b = _to_f32(words, halves, base_dtype)
            if DECAY:
                words, halves = _unpack(anchor_low, anchor_high, VECTOR)
                towards = tl.where(has_anchor, _to_f32(words, halves, anchor_dtype), 0.0)
                b = tl.fma(b - towards, tl.full(SHAPE, minus_decay, tl.float32), b)
            if n_seeds > 1:
                b = b + acc
            if n_seeds > 0:
                b = tl.fma(normals, last_coef, b)
            b = _one_nan(b, n_seeds, NVIDIA)
            if STOCHASTIC:
                r = _thresholds(block, lane, stream, rounding_seed, VECTOR)
            else:
                r = 0
            _store(out, out_dtype, row * out_stride + col, inside, b, r, STOCHASTIC, VECTOR)
            out, base, anchor = (
                _advance(out, STEP, out_dtype, PATH),
                _advance(base, STEP, base_dtype, PATH),
                _advance(anchor, STEP, anchor_dtype, PATH),
            )

    @triton.jit
    def _add_full_noise(segment, begin, end, seeds, coefs, n_seeds, last_seed, last_coef, rounding_seed, minus_decay,
                        STOCHASTIC: tl.constexpr, DECAY: tl.constexpr, NVIDIA: tl.constexpr,
                        UNITS: tl.constexpr):  # fmt: skip
        """Units [begin, end) of the table, all of one segment."""
        path = _path(segment)
        if path == 2:
            _add_noise_segment(segment, begin, end, seeds, coefs, n_seeds, last_seed, last_coef, rounding_seed,
                               minus_decay, STOCHASTIC, DECAY, NVIDIA, UNITS, 2)  # fmt: skip
        elif path == 1:
            _add_noise_segment(segment, begin, end, seeds, coefs, n_seeds, last_seed, last_coef, rounding_seed,
                               minus_decay, STOCHASTIC, DECAY, NVIDIA, UNITS, 1)  # fmt: skip
        else:
            _add_noise_segment(segment, begin, end, seeds, coefs, n_seeds, last_seed, last_coef, rounding_seed,
                               minus_decay, STOCHASTIC, DECAY, NVIDIA, UNITS, 0)  # fmt: skip

    @triton.jit
    def _add_low_rank_noise(segment, begin, end, seeds, coefs, n_seeds, rounding_seed, minus_decay,
                            STOCHASTIC: tl.constexpr, DECAY: tl.constexpr, NVIDIA: tl.constexpr, RANK: tl.constexpr,
                            SCALE: tl.constexpr):  # fmt: skip
        """Units [begin, end) of the table, whole tiles of one segment."""
        _, _, _, vector_path = _dtypes(segment)
        strides = tl.load(segment + 5) | tl.load(segment + 6) | tl.load(segment + 7)
        if (vector_path != 0) & (strides < 1 << 30):  # _square_unit
            _add_noise_squares(segment, begin, end, seeds, coefs, n_seeds, rounding_seed, minus_decay, STOCHASTIC,
                               DECAY, NVIDIA, RANK, SCALE, _TILE, True)  # fmt: skip
        else:
            _add_noise_squares(segment, begin, end, seeds, coefs, n_seeds, rounding_seed, minus_decay, STOCHASTIC,
                               DECAY, NVIDIA, RANK, SCALE, 64, False)  # fmt: skip

    @triton.jit(
        do_not_specialize=[
            "segments",
            "n_segments",
            "units",
            "per_program",
            "seeds",
            "coefs",
            "rounding_seed",
            "minus_decay",
        ]
    )
    def _add_noise_kernel(segments, n_segments, units: tl.int64, per_program, seeds, coefs, n_seeds, rounding_seed,
                          minus_decay, STOCHASTIC: tl.constexpr, DECAY: tl.constexpr, NVIDIA: tl.constexpr,
                          UNITS: tl.constexpr, RANK: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
        unit = tl.program_id(0).to(tl.int64) * per_program
        stop = tl.minimum(unit + per_program, units)
        segment = _find(segments, n_segments, unit)
        # Loaded once: for one seed the round keys then stay in registers.
        last_seed = _seed(seeds + (n_seeds - 1), n_seeds > 0)
        last_coef = tl.load(coefs + (n_seeds - 1), mask=n_seeds > 0, other=0)
        key = _seed(rounding_seed) if STOCHASTIC else last_seed
        while unit < stop:
            end = tl.minimum(tl.load(segment + 12), stop)
            if RANK > 0:
                if tl.load(segment + 15) != 0:
                    _add_low_rank_noise(segment, unit, end, seeds, coefs, n_seeds, rounding_seed, minus_decay,
                                        STOCHASTIC, DECAY, NVIDIA, RANK, SCALE)  # fmt: skip
                else:
                    _add_full_noise(segment, unit, end, seeds, coefs, n_seeds, last_seed, last_coef, key,
                                    minus_decay, STOCHASTIC, DECAY, NVIDIA, UNITS)  # fmt: skip
            else:
                _add_full_noise(segment, unit, end, seeds, coefs, n_seeds, last_seed, last_coef, key, minus_decay,
                                STOCHASTIC, DECAY, NVIDIA, UNITS)  # fmt: skip
            unit = tl.load(segment + 12)  # not `end`, whose two registers would make ptxas spill
            segment += _WORDS_A_SEGMENT

    @triton.jit
    def _fingerprint_segment(segment, begin, end, UNITS: tl.constexpr, PATH: tl.constexpr):
        """The sum of units [begin, end) of the table, all of one segment, in parts: uint64 [UNITS]."""
        rows, cols, first, index_stride, stream, units_per_row, start = _shape(segment, begin)
        dtype, _, _, _ = _dtypes(segment)
        out, stride = _advance(tl.load(segment), start, dtype, PATH), tl.load(segment + 5)
        VECTOR: tl.constexpr = PATH > 0
        STEP: tl.constexpr = UNITS if VECTOR else UNITS // 8
        total = tl.full([UNITS], 0, tl.uint64)
        count = (end - begin).to(tl.int32)
        for step in range(0, count, STEP):
            block, lane, row, col, inside = _place(
                start, step, count, rows, cols, first, index_stride, units_per_row, UNITS, PATH
            )
            low, high = _load(out, dtype, row * stride + col, inside, VECTOR)
            add, multiply = _fingerprint_keys(block, lane, stream, dtype, VECTOR)
            words, halves = _unpack(low, high, VECTOR)
            if dtype == 0:
                bits = words
            else:
                bits = halves
            terms = (bits + add).to(tl.uint64) * multiply.to(tl.uint64)
            if VECTOR:
                terms = tl.sum(terms, axis=1)
            total += tl.where(inside, terms, 0)
            out = _advance(out, STEP, dtype, PATH)
        return total

    @triton.jit(do_not_specialize=["segments", "n_segments", "units", "per_program"])
    def _fingerprint_kernel(segments, n_segments, units: tl.int64, per_program, sums, UNITS: tl.constexpr):
        unit = tl.program_id(0).to(tl.int64) * per_program
        stop = tl.minimum(unit + per_program, units)
        segment = _find(segments, n_segments, unit)
        total = tl.full([UNITS], 0, tl.uint64)
        while unit < stop:
            end = tl.minimum(tl.load(segment + 12), stop)
            path = _path(segment)
            if path == 2:
                total += _fingerprint_segment(segment, unit, end, UNITS, 2)
            elif path == 1:
                total += _fingerprint_segment(segment, unit, end, UNITS, 1)
            else:
                total += _fingerprint_segment(segment, unit, end, UNITS, 0)
            unit = end
            segment += _WORDS_A_SEGMENT
        tl.store(sums + tl.program_id(0), tl.sum(total, axis=0).to(tl.int64))

    @triton.jit(do_not_specialize=["table", "n_factors", "units", "per_seed", "seeds", "n_seeds", "out"])
    def _factors_kernel(table, n_factors, units: tl.int64, per_seed, seeds, n_seeds, out, UNITS: tl.constexpr):
        """A program draws UNITS noise blocks of one seed, of every factor that they belong to."""
        seed = tl.program_id(0) // per_seed
        key = _seed(seeds + seed)
        unit = (tl.program_id(0) % per_seed).to(tl.int64) * UNITS
        stop = tl.minimum(unit + UNITS, units)
        low, high = 0, n_factors - 1
        while low < high:
            middle = (low + high) >> 1
            if tl.load(table + middle * _WORDS_A_FACTOR + 4) > unit:
                high = middle
            else:
                low = middle + 1
        factor = table + low * _WORDS_A_FACTOR
        while unit < stop:
            offset, count, stream, domain = (
                tl.load(factor), tl.load(factor + 1), tl.load(factor + 2), tl.load(factor + 3).to(tl.uint32),
            )  # fmt: skip
            end = tl.load(factor + 4)
            number = unit - (end - (count + 7) // 8) + tl.arange(0, UNITS)
            zero = (count >> 63).to(tl.uint32)
            normals = _normals(_halves(number.to(tl.uint64)), domain, 0, stream, key, zero, True)
            index = number[:, None] * 8 + tl.arange(0, 8)[None, :]
            inside = (index < count) & (tl.arange(0, UNITS) < stop - unit)[:, None]
            at = n_seeds * offset + seed * count + index
            tl.store(out + at, normals.to(out.dtype.element_ty), mask=inside)
            unit = end
            factor += _WORDS_A_FACTOR
