"""The Triton backend: NVIDIA GPUs without a CUDA toolkit, and AMD. One launch for the whole table, equal to the others bit for bit.

A program takes a range of consecutive units (a unit is 8 indices, one noise block: csrc/segments.h), finds the segment of the first by
binary search and goes on through the next ones. Tensors are [UNITS, 8]: a thread owns whole units, so nothing is exchanged between
threads. Memory moves as 128-bit words, [UNITS, 4] int32, which hold 4 float32 or 8 values of 16 bits.

Exactness: `tl.fma` where the contract says fma and `enable_fp_fusion=False` so that nothing else becomes one; rounding to bfloat16 and
stochastic rounding on the bits.
"""

import contextlib

import numpy as np
import torch

from .. import noise
from ..table import SEGMENT
from .reference import ieee_denormals

try:
    import triton
    import triton.language as tl
except ImportError as error:
    triton, _import_error = None, error

_UNITS, _WARPS = 256, 4  # units of one step of a program, and warps: 2 units, 16 values, a thread
_PROGRAMS = 64  # a processor: several waves, so that the last one is a small part


def unavailable(device):
    if triton is None:
        return f"triton cannot be imported ({_import_error}): pip install triton"
    if isinstance(_add_noise_kernel, triton.runtime.JITFunction):
        return None if device.type == "cuda" else f"it serves CUDA and ROCm devices, not {device.type} (unless TRITON_INTERPRET=1 is set before the import)"
    return None if device.type == "cpu" else "TRITON_INTERPRET=1 is set: the interpreter serves CPU tensors only"


def add_noise_(pack, seeds, coefs, rounding_seed, decay):
    segments = _on_device(pack)
    seeds, coefs = seeds.to(pack.device).contiguous(), coefs.to(pack.device).contiguous()
    rounding_seed = seeds if rounding_seed is None else rounding_seed.to(pack.device)
    stochastic = rounding_seed is not seeds
    grid, per_program = _split(pack)
    with _launching(pack.device):
        _add_noise_kernel[(grid,)](
            segments, len(pack.segments), pack.units, per_program, seeds, coefs, seeds.numel(), rounding_seed, -decay,
            STOCHASTIC=stochastic, DECAY=decay != 0, UNITS=_UNITS, **_OPTIONS,
        )  # fmt: skip


def fingerprint(pack):
    segments = _on_device(pack)
    grid, per_program = _split(pack)
    sums = torch.empty(grid, dtype=torch.int64, device=pack.device)
    with _launching(pack.device):
        _fingerprint_kernel[(grid,)](segments, len(pack.segments), pack.units, per_program, sums, UNITS=_UNITS, **_OPTIONS)
    return sums.sum()  # modulo 2^64


def compile_for(target, n_seeds=1, stochastic=False, decay=False, kernel="add_noise"):
    """The kernel as it is launched, compiled without a GPU. target: a compute capability (80, 90, ...) or an AMD architecture ("gfx942").
    n_seeds: 1, or None for any number. Returns triton's CompiledKernel; its `asm` holds ptx and cubin, or amdgcn and hsaco.
    Must not run under TRITON_INTERPRET=1."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = {"add_noise": _add_noise_kernel, "fingerprint": _fingerprint_kernel}[kernel]
    types = {name: type for name, type in _TYPES.items() if name in fn.arg_names}
    constants = {"STOCHASTIC": stochastic, "DECAY": decay, "UNITS": _UNITS} | ({"n_seeds": 1} if n_seeds == 1 else {})
    constants = {name: value for name, value in constants.items() if name in fn.arg_names}
    target = GPUTarget("cuda", target, 32) if isinstance(target, int) else GPUTarget("hip", target, 64)
    return triton.compile(ASTSource(fn, types | dict.fromkeys(constants, "constexpr"), constants), target=target, options=_OPTIONS)


_OPTIONS = {"num_warps": _WARPS, "num_stages": 1, "enable_fp_fusion": False}
_TYPES = {"segments": "*i64", "n_segments": "i32", "units": "i64", "per_program": "i32", "seeds": "*i64", "coefs": "*fp32"}
_TYPES |= {"n_seeds": "i32", "rounding_seed": "*i64", "minus_decay": "fp32", "sums": "*i64"}


def _on_device(pack):
    if pack.on_device is None:
        pack.on_device = torch.from_numpy(pack.segments.view(np.int64)).to(pack.device)
    return pack.on_device


def _split(pack):
    """How many programs, and how many units each takes."""
    processors = torch.cuda.get_device_properties(pack.device).multi_processor_count if pack.device.type == "cuda" else 1
    steps = -(-pack.units // _UNITS)
    per_program = -(-steps // (_PROGRAMS * processors)) * _UNITS
    return -(-pack.units // per_program), per_program


def _launching(device):
    if device.type == "cuda":
        return torch.cuda.device(device)
    return _interpreting()


@contextlib.contextmanager
def _interpreting():
    with ieee_denormals(), np.errstate(all="ignore"):
        yield


if triton is not None:
    _WORDS_A_SEGMENT = tl.constexpr(SEGMENT.itemsize // 8)
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
    def _philox(c0, c1, c2, c3, key, ROUNDS: tl.constexpr):
        k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
        for i in tl.static_range(ROUNDS):
            p0 = c0.to(tl.uint64) * _M0
            p1 = c2.to(tl.uint64) * _M1
            c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
            c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
            k0 += _W0
            k1 += _W1
        return c0, c1, c2, c3

    @triton.jit
    def _words(low, high, stream, key, ROUNDS: tl.constexpr):
        """The four random words of each block: uint32 [UNITS] x 4."""
        return _philox(low, high, stream.to(tl.uint32), (stream >> 32).to(tl.uint32), key, ROUNDS)

    @triton.jit
    def _box_muller(w):
        f = ((w & 0xFFFFC000) | 0x2000).to(tl.float32).to(tl.uint32, bitcast=True)
        log = (f - 0x4F800000).to(tl.int32, bitcast=True).to(tl.float32)
        m = ((f & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
        v = tl.fma(tl.fma(tl.fma(_LOG3, m, _LOG2), m, _LOG1), m, _LOG0)
        v = tl.fma(log, _LOG_SLOPE, v)
        s = (_RSQRT_SEED - ((w << 31) | (v.to(tl.uint32, bitcast=True) >> 1))).to(tl.float32, bitcast=True)
        a = v * s
        r = a * tl.fma(a * -1.0, s, _RSQRT)  # `-a` is 0 - a, one more instruction, up to triton 3.8
        t = ((w & 0x3FFE) | 0x4B000000).to(tl.float32, bitcast=True) - 8396799.0  # 2^23 + 8191
        z = t * t
        x_over_r = tl.fma(tl.fma(tl.fma(_COS3, z, _COS2), z, _COS1), z, _COS0)
        y_over_rt = tl.fma(tl.fma(_SIN2, z, _SIN1), z, _SIN0)
        return r * x_over_r, (r * t) * y_over_rt

    @triton.jit
    def _eight(w0, w1, w2, w3):
        """[UNITS] x 4 -> [UNITS, 4], in this order."""
        pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        return tl.reshape(pairs, [w0.shape[0], 4])

    @triton.jit
    def _interleave(even, odd):
        """[UNITS, 4] x 2 -> [UNITS, 8]."""
        return tl.reshape(tl.join(even, odd), [even.shape[0], 8])

    @triton.jit
    def _deinterleave(x):
        """[UNITS, 8] -> even and odd lanes, [UNITS, 4] each."""
        return tl.split(tl.reshape(x, [x.shape[0], 4, 2]))

    @triton.jit
    def _concatenate(low, high):
        """[UNITS, 4] x 2 -> [UNITS, 8]."""
        return tl.reshape(tl.permute(tl.join(low, high), [0, 2, 1]), [low.shape[0], 8])

    @triton.jit
    def _halve(x):
        """[UNITS, 8] -> lanes 0..3 and 4..7, [UNITS, 4] each."""
        return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, 4]), [0, 2, 1]))

    @triton.jit
    def _normals(block, stream, seed):
        """The eight normals of each block: float32 [UNITS, 8]."""
        w0, w1, w2, w3 = _words(block.to(tl.uint32), (block >> 32).to(tl.uint32), stream, seed, 10)
        x, y = _box_muller(_eight(w0, w1, w2, w3))
        return _interleave(x, y)

    @triton.jit
    def _thresholds(block, stream, seed):
        """The 16-bit thresholds of stochastic rounding: uint32 [UNITS, 8]."""
        w0, w1, w2, w3 = _words(block.to(tl.uint32), (block >> 32).to(tl.uint32) | (_DOMAIN_ROUNDING << 29), stream, seed, 10)
        w = _eight(w0, w1, w2, w3)
        return _interleave(w & 0xFFFF, w >> 16)

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

    @triton.jit
    def _round(x, r, dtype, STOCHASTIC: tl.constexpr):
        """float32 -> stored bits, uint32 [UNITS, 8]. Any NaN becomes the one NaN."""
        u = x.to(tl.uint32, bitcast=True)
        if dtype == 0:
            bits = tl.where(x != x, 0x7FC00000, u)
        elif dtype == 1:
            up = r if STOCHASTIC else 0x7FFF + ((u >> 16) & 1)
            bits = tl.where(x != x, 0x7FC0, (u + up) >> 16)
        else:
            if STOCHASTIC:
                # The magnitude in f16 ulps is n + f: up if floor(f 2^16) + r >= 2^16. A normal has 13 bits of f, so r >> 3 decides.
                magnitude = u & 0x7FFFFFFF
                normal = tl.minimum(((magnitude + (r >> 3)) >> 13).to(tl.int32) - (112 << 10), 0x7C00).to(tl.uint32)
                small = tl.where(magnitude < 0x38800000, magnitude, 0).to(tl.float32, bitcast=True)
                subnormal = ((small * 1099511627776.0).to(tl.int32).to(tl.uint32) + r) >> 16  # 2^40
                bits = tl.where(magnitude < 0x38800000, subnormal, normal) | ((u >> 16) & 0x8000)
            else:
                bits = x.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
            bits = tl.where(x != x, 0x7E00, bits)
        return bits

    # ---- memory: `at` is the element, relative to `address`, of lane 0 of each unit ----

    @triton.jit
    def _vectors(address, dtype, at):
        """Pointers to the 16 bytes where each unit's elements start: [UNITS, 4] of int32."""
        pointer = tl.multiple_of(address.to(tl.pointer_type(tl.uint32)), 16)
        word = tl.multiple_of(at >> (dtype != 0).to(tl.int64), 4)
        return pointer + word[:, None] + tl.arange(0, 4)[None, :]

    @triton.jit
    def _load(address, dtype, at, inside, VECTOR: tl.constexpr):
        """The bits of float32 elements, or those of 16-bit elements: see _unpack. Nothing here waits for the memory."""
        if VECTOR:
            p = _vectors(address, dtype, at)
            low = tl.load(p, mask=inside, other=0)
            high = tl.load(p + 4, mask=inside & (dtype == 0), other=0)
        else:
            at = at[:, None] + tl.arange(0, 8)[None, :]
            low = tl.load(address.to(tl.pointer_type(tl.uint32)) + at, mask=inside & (dtype == 0), other=0)
            high = tl.load(address.to(tl.pointer_type(tl.uint16)) + at, mask=inside & (dtype != 0), other=0).to(tl.uint32)
        return low, high

    @triton.jit
    def _unpack(low, high, VECTOR: tl.constexpr):
        """-> words, halves: uint32 [UNITS, 8] each, of which the dtype makes one meaningful."""
        if VECTOR:
            words, halves = _concatenate(low, high), _interleave(low & 0xFFFF, low >> 16)
        else:
            words, halves = low, high
        return words, halves

    @triton.jit
    def _store(address, dtype, at, inside, bits, VECTOR: tl.constexpr):
        if VECTOR:
            p = _vectors(address, dtype, at)
            if dtype == 0:
                low, high = _halve(bits)
                tl.store(p, low, mask=inside)
                tl.store(p + 4, high, mask=inside)
            else:
                even, odd = _deinterleave(bits)
                tl.store(p, even | (odd << 16), mask=inside)
        else:
            at = at[:, None] + tl.arange(0, 8)[None, :]
            tl.store(address.to(tl.pointer_type(tl.uint32)) + at, bits, mask=inside & (dtype == 0))
            tl.store(address.to(tl.pointer_type(tl.uint16)) + at, bits.to(tl.uint16), mask=inside & (dtype != 0))

    # ---- the table ----

    @triton.jit
    def _find(segments, n_segments, unit):
        """The segment of a unit: the first whose unit_end lies past it."""
        low, high = 0, n_segments - 1
        while low < high:
            middle = (low + high) >> 1
            if tl.load(segments + middle.to(tl.int64) * _WORDS_A_SEGMENT + 12) > unit:
                high = middle
            else:
                low = middle + 1
        return low

    @triton.jit
    def _shape(segment):
        """rows, cols, first, index_stride, stream, units_per_row, unit_end of struct Segment."""
        return (tl.load(segment + 3), tl.load(segment + 4), tl.load(segment + 8), tl.load(segment + 9), tl.load(segment + 10),
                tl.load(segment + 11), tl.load(segment + 12))  # fmt: skip

    @triton.jit
    def _dtypes(segment):
        """out_dtype, base_dtype, anchor_dtype, vector_path: four int32 at the end of struct Segment."""
        two, two_more = tl.load(segment + 13), tl.load(segment + 14)
        return two.to(tl.int32), (two >> 32).to(tl.int32), two_more.to(tl.int32), (two_more >> 32).to(tl.int32)

    @triton.jit
    def _place(unit, rows, first, index_stride, units_per_row, out_stride, base_stride, anchor_stride):
        """Units of a segment, int64 [UNITS] -> their noise block (uint64), the column of lane 0 and its element in out, base and anchor."""
        if rows > 1:
            row = unit // units_per_row
            index = (first + row * index_stride).to(tl.uint64)
            col = (unit - row * units_per_row) * 8 - (index & 7).to(tl.int64)
            block = (index >> 3) + (unit - row * units_per_row).to(tl.uint64)
            out_at, base_at, anchor_at = row * out_stride + col, row * base_stride + col, row * anchor_stride + col
        else:
            block = (first.to(tl.uint64) >> 3) + unit.to(tl.uint64)
            col = unit * 8 - (first & 7)
            out_at, base_at, anchor_at = col, col, col
        return block, col, out_at, base_at, anchor_at

    @triton.jit
    def _inside(unit, end, col, cols, VECTOR: tl.constexpr):
        """Which lanes are elements: [UNITS, 1] or [UNITS, 8]."""
        inside = (unit < end)[:, None]
        if not VECTOR:
            col = col[:, None] + tl.arange(0, 8)[None, :]
            inside = inside & (col >= 0) & (col < cols)
        return inside

    # ---- the kernels ----

    @triton.jit
    def _add_noise_segment(segment, begin, end, seeds, coefs, n_seeds, rounding_seed, minus_decay,
                           STOCHASTIC: tl.constexpr, DECAY: tl.constexpr, UNITS: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
        """Units [begin, end) of the table, all of one segment."""
        rows, cols, first, index_stride, stream, units_per_row, unit_end = _shape(segment)
        out_dtype, base_dtype, anchor_dtype, _ = _dtypes(segment)
        out, base, anchor = tl.load(segment), tl.load(segment + 1), tl.load(segment + 2)
        out_stride, base_stride, anchor_stride = tl.load(segment + 5), tl.load(segment + 6), tl.load(segment + 7)
        start = unit_end - rows * units_per_row
        for step in range(begin - start, end - start, UNITS):
            unit = step + tl.arange(0, UNITS).to(tl.int64)
            block, col, out_at, base_at, anchor_at = _place(unit, rows, first, index_stride, units_per_row, out_stride, base_stride, anchor_stride)
            inside = _inside(unit, end - start, col, cols, VECTOR)
            low, high = _load(base, base_dtype, base_at, inside, VECTOR)
            if DECAY:
                anchor_low, anchor_high = _load(anchor, anchor_dtype, anchor_at, inside & (anchor != 0), VECTOR)
            acc = tl.full([UNITS, 8], 0.0, tl.float32)
            noise = acc
            for i in range(n_seeds):
                noise = _normals(block, stream, tl.load(seeds + i))
                if i < n_seeds - 1:
                    acc = tl.fma(noise, tl.load(coefs + i), acc)
            words, halves = _unpack(low, high, VECTOR)
            b = _to_f32(words, halves, base_dtype)
            if DECAY:
                words, halves = _unpack(anchor_low, anchor_high, VECTOR)
                b = tl.fma(b - _to_f32(words, halves, anchor_dtype), tl.full([UNITS, 8], minus_decay, tl.float32), b)
            if n_seeds > 1:
                b = b + acc
            if n_seeds > 0:
                b = tl.fma(noise, tl.load(coefs + n_seeds - 1), b)
            if STOCHASTIC:
                r = _thresholds(block, stream, tl.load(rounding_seed))
            else:
                r = 0
            _store(out, out_dtype, out_at, inside, _round(b, r, out_dtype, STOCHASTIC), VECTOR)

    @triton.jit(do_not_specialize=["segments", "n_segments", "units", "per_program", "seeds", "coefs", "rounding_seed", "minus_decay"])
    def _add_noise_kernel(segments, n_segments, units: tl.int64, per_program, seeds, coefs, n_seeds, rounding_seed, minus_decay,
                          STOCHASTIC: tl.constexpr, DECAY: tl.constexpr, UNITS: tl.constexpr):  # fmt: skip
        unit = tl.program_id(0).to(tl.int64) * per_program
        stop = tl.minimum(unit + per_program, units)
        segment = segments + _find(segments, n_segments, unit).to(tl.int64) * _WORDS_A_SEGMENT
        while unit < stop:
            end = tl.minimum(tl.load(segment + 12), stop)
            _, _, _, vector_path = _dtypes(segment)
            if vector_path != 0:
                _add_noise_segment(segment, unit, end, seeds, coefs, n_seeds, rounding_seed, minus_decay, STOCHASTIC, DECAY, UNITS, True)
            else:
                _add_noise_segment(segment, unit, end, seeds, coefs, n_seeds, rounding_seed, minus_decay, STOCHASTIC, DECAY, UNITS, False)
            unit = end
            segment += _WORDS_A_SEGMENT

    @triton.jit
    def _fingerprint_segment(segment, begin, end, UNITS: tl.constexpr, VECTOR: tl.constexpr):
        """The sum of units [begin, end) of the table, all of one segment, lane by lane: uint64 [UNITS]."""
        rows, cols, first, index_stride, stream, units_per_row, unit_end = _shape(segment)
        dtype, _, _, _ = _dtypes(segment)
        out, out_stride = tl.load(segment), tl.load(segment + 5)
        start = unit_end - rows * units_per_row
        total = tl.full([UNITS], 0, tl.uint64)
        for step in range(begin - start, end - start, UNITS):
            unit = step + tl.arange(0, UNITS).to(tl.int64)
            block, col, at, _, _ = _place(unit, rows, first, index_stride, units_per_row, out_stride, out_stride, out_stride)
            inside = _inside(unit, end - start, col, cols, VECTOR)
            low, high = _load(out, dtype, at, inside, VECTOR)
            domain = (block >> 32).to(tl.uint32) | (_DOMAIN_FINGERPRINT << 29)
            w0, w1, w2, w3 = _words(block.to(tl.uint32), domain, stream, dtype.to(tl.uint64), 7)
            w = _eight(w0, w1, w2, w3)
            add = _concatenate(_eight(w1, w2, w3, w0), _eight(w2, w3, w0, w1))
            multiply = _concatenate(w, (w << 16) | (w >> 16)) | 1
            words, halves = _unpack(low, high, VECTOR)
            if dtype == 0:
                bits = words
            else:
                bits = halves
            terms = (bits + add).to(tl.uint64) * multiply.to(tl.uint64)
            total += tl.sum(tl.where(inside, terms, 0), axis=1)
        return total

    @triton.jit(do_not_specialize=["segments", "n_segments", "units", "per_program"])
    def _fingerprint_kernel(segments, n_segments, units: tl.int64, per_program, sums, UNITS: tl.constexpr):
        unit = tl.program_id(0).to(tl.int64) * per_program
        stop = tl.minimum(unit + per_program, units)
        segment = segments + _find(segments, n_segments, unit).to(tl.int64) * _WORDS_A_SEGMENT
        total = tl.full([UNITS], 0, tl.uint64)
        while unit < stop:
            end = tl.minimum(tl.load(segment + 12), stop)
            _, _, _, vector_path = _dtypes(segment)
            if vector_path != 0:
                total += _fingerprint_segment(segment, unit, end, UNITS, True)
            else:
                total += _fingerprint_segment(segment, unit, end, UNITS, False)
            unit = end
            segment += _WORDS_A_SEGMENT
        tl.store(sums + tl.program_id(0), tl.sum(total, axis=0).to(tl.int64))
