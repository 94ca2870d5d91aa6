"""PTX, run on the CPU by NumPy: what nvcc and Triton make of the kernels, before ptxas and the hardware take over.

Threads are lanes: a register is an array, an instruction one or a few NumPy calls for all threads of up to 1024 /
(threads a block) blocks. Where threads diverge, those with the least program counter go on first, to the end of their
basic block; others at the place where they arrive join them. Floating point is that of the PTX manual: subnormals are
kept, a NaN that arithmetic makes is 7FFFFFFF (7FFF in 16 bits), fma rounds once.

A launch ends in a `Trap` where a GPU would go on in silence or fault: memory outside the ranges given, or written where
it may only be read; an address that is not a multiple of the access; a register or shared memory read before it was
written; two threads at one address of which one writes, in global memory within a launch, in shared memory between
barriers; a barrier or shuffle that not all threads reach. Decoding refuses what it does not know, and all that lets
ptxas choose a rounding: .ftz, and float32 arithmetic without .rn.
"""

import collections
import ctypes
import re
from functools import partial

import numpy as np

from es_kernels import noise

LANES = 1024  # at a time, if a block is not larger
WARP = 32
_MANY = -1  # readers of one place
_NAN32, _NAN16 = np.uint32(0x7FFFFFFF), np.uint16(0x7FFF)


class Trap(Exception):
    """What the launch did wrong, and at which instruction."""


class Unknown(ValueError):
    """An instruction that this interpreter does not know, or refuses."""


# ---- text -> kernels ----

Instruction = collections.namedtuple("Instruction", "op operands guard")  # guard: None, or (register, negated)
_BITS = {"pred": 1} | {f"{kind}{bits}": bits for bits in (8, 16, 32, 64) for kind in "busf"}
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)*?\.align\s+\d+\s+)?(\w+)(?:\[(\d+)\])?"
)

_SHARED = re.compile(r"\.shared \.align (\d+) \.(\w+) ([\w$]+)(?:\[(\d+)\])?")


class Kernel:
    """One .entry: its instructions, labels, parameters, registers and shared variables."""

    def __init__(self, name, parameters, body):
        self.name, self.code, self.labels, self.widths, self.shared, self.shared_bytes = name, [], {}, {}, {}, 0
        self.parameters, self.parameter_bytes = {}, 0  # name -> offset, size
        self.decoded = {}  # blocks and threads that run together -> Threads
        self.budget = 1 << 22  # basic blocks that one run of them may take
        for align, type, symbol, count in _PARAMETER.findall(parameters):
            size = _BITS[type] // 8
            align = int(align or size)
            start = -(-self.parameter_bytes // align) * align
            self.parameters[symbol] = start, size * int(count or 1)
            self.parameter_bytes = start + size * int(count or 1)
        for statement in body.split(";"):
            statement = self._labels(statement)
            if statement.startswith(".reg"):
                self._registers(statement)
            elif statement.startswith(".shared"):
                align, type, symbol, count = _SHARED.fullmatch(statement).groups()
                self.shared[symbol] = -(-self.shared_bytes // int(align)) * int(align)
                self.shared_bytes = self.shared[symbol] + _BITS[type] // 8 * int(count or 1)
            elif statement and not statement.startswith(".pragma"):
                self.code.append(self._instruction(statement))

    def _labels(self, statement):
        """The statement without the labels and braces in front of it."""
        while match := re.match(r"\s*([{}]|(\$?\w+):)\s*|\s+", statement):
            if match[2]:
                self.labels[match[2]] = len(self.code)
            statement = statement[match.end() :]
        return " ".join(statement.split())

    def _registers(self, statement):
        type, names = re.fullmatch(r"\.reg \.(\w+) (.+)", statement).groups()
        for name in names.split(","):
            name, count = re.fullmatch(r"([%\w]+)(?:<(\d+)>)?", name.strip()).groups()
            for i in range(int(count)) if count else [""]:
                self.widths[f"{name}{i}"] = _BITS[type]

    def _instruction(self, statement):
        guard, op, operands = re.fullmatch(r"(?:@(!?[%\w]+) )?([\w.]+)\s*(.*)", statement).groups()
        operands = [re.sub(r"\s", "", o) for o in re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", operands)]
        return Instruction(op, operands, guard and (guard.lstrip("!"), guard[0] == "!"))


def parse(text):
    """{name: Kernel} of a module's text."""
    text = re.sub(r"//[^\n]*|^\s*\.loc[^\n]*", "", text, flags=re.M)
    outside = re.findall(r"\.extern \.shared .*? (\w+)\[\]", text)  # its size comes with the launch
    kernels = {}
    for match in re.finditer(r"\.entry\s+(\w+)\s*\((.*?)\)[^{]*\{", text, flags=re.S):
        depth, end = 1, match.end()
        while depth:
            end = re.compile("[{}]").search(text, end).end()
            depth += 1 if text[end - 1] == "{" else -1
        kernels[match[1]] = kernel = Kernel(match[1], match[2], text[match.end() : end - 1])
        kernel.shared.update((symbol, kernel.shared_bytes) for symbol in outside)
    return kernels


# ---- memory ----


class Space:
    """Bytes, of which ranges (address, size, writable) may be touched, all even. Who touched what is kept, for every
    two bytes."""

    def __init__(self, name, data, origin, ranges):
        """origin: the address of data[0], a multiple of 8."""
        self.name, self.origin = name, np.uint64(origin)
        self.views = {t: data.view(t) for t in (np.uint16, np.uint32, np.uint64)}
        self.starts = np.array(sorted({0, *(p for start, size, _ in ranges for p in (start, start + size))}), np.uint64)
        index = {int(p): i for i, p in enumerate(self.starts)}
        self.readable, self.writable = np.zeros((2, len(self.starts)), bool)  # from each start to the next
        for start, size, writable in ranges:
            self.readable[index[start] : index[start + size]] = True
            self.writable[index[start] : index[start + size]] |= writable
        sizes = np.where(self.readable[:-1], np.diff(self.starts), 0).astype(np.int64) // 2
        self.first = np.concatenate([[0], np.cumsum(sizes)])
        self.written = np.zeros(sizes.sum(), bool)  # ever, in this launch
        self.writer, self.reader = np.zeros((2, sizes.sum()), np.int32)  # 1 + thread; 0: nobody

    def forget(self):
        """After a barrier it no longer matters who touched what."""
        self.writer[:] = self.reader[:] = 0

    def _places(self, address, size, write):
        """The numbers of the pairs of bytes that an access touches, [lanes, size / 2]; None if nobody may write
        them."""
        misaligned = address % np.uint64(size) != 0
        if misaligned.any():
            raise Trap(f"misaligned: {self.name} address {int(address[misaligned][0]):#x} is no multiple of {size}")
        allowed = self.writable if write else self.readable
        first, last = (np.searchsorted(self.starts, address + np.uint64(i), "right") - 1 for i in (0, size - 1))
        good, k = allowed[first], first
        while (k < last).any():  # an access over the border of two ranges
            k = np.minimum(k + 1, last)
            good = good & allowed[k]
        if not good.all():
            raise Trap(
                f"out of bounds: {size} bytes at {self.name} address {int(address[~good][0]):#x} may not be "
                f"{'written' if write else 'read'}"
            )
        if not (self.writable[first] | self.writable[last]).any():
            return None
        return (self.first[first] + (address - self.starts[first]).astype(np.int64) // 2)[:, None] + np.arange(
            size // 2
        )

    def _at(self, address, type):
        return ((address - self.origin) // np.uint64(np.dtype(type).itemsize)).astype(np.int64)

    def load(self, address, type, thread, count=1):
        """`count` values of this unsigned type for each thread, [count, lanes]. thread: 1 + its number."""
        places = self._places(address, np.dtype(type).itemsize * count, False)
        if places is not None:
            own, writer, reader = thread[:, None], self.writer[places], self.reader[places]
            if ((writer != 0) & (writer != own)).any():
                raise Trap(f"race: a thread reads {self.name} memory that another one wrote")
            self.reader[places] = own
            several = (self.reader[places] != own) | ((reader != 0) & (reader != own))
            self.reader[places[several]] = _MANY
        return self.views[type][self._at(address, type) + np.arange(count)[:, None]]

    def unwritten(self, address, type, count):
        """Which of the values that `load` gives nobody has written, [count, lanes]."""
        return (
            ~self.written[self._places(address, np.dtype(type).itemsize * count, False)]
            .reshape(len(address), count, -1)
            .all(2)
            .T
        )

    def store(self, address, values, thread):
        """values: a list of unsigned arrays [lanes], what each thread writes one after the other."""
        type = values[0].dtype.type
        places, own = self._places(address, values[0].itemsize * len(values), True), thread[:, None]
        if any(((who != 0) & (who != own)).any() for who in (self.writer[places], self.reader[places])):
            raise Trap(f"race: a thread writes {self.name} memory that another one touched")
        self.writer[places], self.written[places] = own, True
        at = self._at(address, type) + np.arange(len(values))[:, None]
        self.views[type][at] = values
        last = self.writer[places]
        # Threads of one warp may write the same value to one place, in shared memory those of any: Triton's reductions
        # do, and what it exchanges where several threads hold it.
        apart = self.name != "shared" and ((last - 1) // WARP != (own - 1) // WARP).any()
        if (last != own).any() and (apart or (self.views[type][at] != values).any()):
            raise Trap(f"race: threads write to one {self.name} address at once")


def process_memory(ranges):
    """Global memory: ranges (address, bytes, writable) of this process."""
    ranges = [r for r in ranges if r[1]]
    low = min(start for start, _, _ in ranges) & ~7
    size = max(start + size for start, size, _ in ranges) - low
    return Space("global", np.ctypeslib.as_array((ctypes.c_uint8 * (-(-size // 8) * 8)).from_address(low)), low, ranges)


# ---- arithmetic that NumPy has not ----


def fma(a, b, c):
    """float32 fma. In float64 the sum rounds twice only next to a tie of float32, or below its normals; there noise.fma
    is asked."""
    s = a.astype(np.float64) * b + c
    near = (s.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    near |= np.abs(s) < 2.0**-125
    return noise.fma(a, b, c) if np.count_nonzero(near) else s.astype(np.float32)


def to_bf16(x):
    u = x.view(np.uint32)
    rounded = (u + np.uint32(0x7FFF) + (u >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), _NAN16, rounded).astype(np.uint16)


def to_f16(x):
    return np.where(np.isnan(x), _NAN16, x.astype(np.float16).view(np.uint16)).astype(np.uint16)


def from_16(h, format):
    return (
        h.view(np.float16).astype(np.float32)
        if format == "f16"
        else (h.astype(np.uint32) << np.uint32(16)).view(np.float32)
    )


def truncate(x, type):
    """cvt.rzi: towards zero, saturating, NaN to 0."""
    limits = np.iinfo(type)
    x = np.nan_to_num(np.trunc(x.astype(np.float64)), nan=0, posinf=limits.max, neginf=limits.min)
    return np.clip(x, limits.min, limits.max).astype(np.int64).astype(type)


def divide(a, b):
    """Towards zero, of what is not divided by zero."""
    q = np.floor_divide(a, b)
    return q + ((q < 0) & (q * b != a))


def lop3(table, a, b, c):
    """Any function of three bits: bit 4a + 2b + c of the table."""
    if table == 0xEA:
        return a & b | c
    terms = [(a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8) if table >> i & 1]
    return np.bitwise_or.reduce(terms) if terms else a & ~a


def prmt(a, b, selector):
    """Four bytes of the eight of (a, b); a selector's bit 3 replicates the byte's sign."""
    eight, result = b.astype(np.uint64) << np.uint64(32) | a, 0
    for i in range(4):
        s = selector >> np.uint32(4 * i)
        byte = (eight >> (np.uint64(8) * (s & np.uint32(7)))).astype(np.uint32) & np.uint32(0xFF)
        byte = np.where(s & np.uint32(8), (byte >> np.uint32(7)) * np.uint32(0xFF), byte)
        result = result | byte << np.uint32(8 * i)
    return result


def funnel(left, low, high, n):
    both, n = high.astype(np.uint64) << np.uint64(32) | low, n & np.uint32(31)
    return (both << n >> np.uint64(32) if left else both >> n).astype(np.uint32)


# ---- the threads ----


class Group:
    """Lanes that are at one place: as an array, and as the bits of an int."""

    def __init__(self, lanes):
        self.lanes, self.bits = lanes, int.from_bytes(np.packbits(lanes, bitorder="little").tobytes(), "little")
        self._index = None

    @property
    def index(self):
        if self._index is None:
            self._index = np.flatnonzero(self.lanes)
        return self._index


_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_COMPARE_FLOAT = {k: _COMPARE[k] for k in ("eq", "lt", "le", "gt", "ge")}
_COMPARE_FLOAT |= {
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "neu": np.not_equal,
}
_INTEGER = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}
_INTEGER |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_UNSIGNED = {16: np.uint16, 32: np.uint32, 64: np.uint64, 1: np.bool_}


def numpy_type(type):
    if type == "pred":
        return np.bool_
    return np.dtype({"b": "u", "u": "u", "s": "i", "f": "f"}[type[0]] + str(_BITS[type] // 8)).type


class Threads:
    """The threads of some blocks of one kernel, and its instructions, decoded for them as they are met."""

    def __init__(self, kernel, blocks, threads):
        self.kernel, self.blocks, self.threads, self.n = kernel, blocks, threads, blocks * threads
        self.decoded = {}
        self.starts = set(kernel.labels.values())
        self.everyone = Group(np.ones(self.n, bool))
        self.number = np.arange(self.n, dtype=np.uint32)
        self.block, self.grid = np.zeros((2, self.n), np.uint32)
        thread = self.number % np.uint32(threads)
        self.registers = {
            "%tid.x": thread,
            "%ntid.x": np.full(self.n, threads, np.uint32),
            "%laneid": thread % np.uint32(WARP),
        }
        self.registers |= {"%ctaid.x": self.block, "%nctaid.x": self.grid}

    def run(self, first_block, grid, parameters, shared_bytes, memory):
        """Runs the blocks of threads from first_block on to their end."""
        self.block[:], self.grid[:] = first_block + self.number // np.uint32(self.threads), grid
        self.owner = (first_block * self.threads + 1 + self.number).astype(np.int32)
        self.memory, self.parameters = memory, np.pad(parameters, (0, -len(parameters) % 8))
        used = self.kernel.shared_bytes + shared_bytes
        self.shared_stride = -(-used // 16) * 16 + 16  # past the end of one block's memory there is none
        ranges = [(self.shared_stride * i, used, True) for i in range(self.blocks)]
        self.shared_memory = Space("shared", np.zeros(self.shared_stride * self.blocks, np.uint8), 0, ranges)
        self.written = collections.defaultdict(int)  # register -> the lanes that have written it
        running, waiting, budget = {0: self.everyone}, {}, self.kernel.budget
        while running or waiting:
            if not running:
                running, waiting = self._released(waiting), {}
            at = min(running)
            group = running.pop(at)
            budget -= 1
            if budget < 0:
                raise Trap("it does not end")
            steps, ending = self._block(at)
            for self.at, reads, writes, do, guard in steps:
                self._execute(reads, writes, do, guard, group)
            for queue, to, there in ending(group):
                queue = waiting if queue == "wait" else running
                queue[to] = Group(queue[to].lanes | there.lanes) if to in queue else there

    def _released(self, waiting):
        """All threads wait or have ended: those of each block at one barrier."""
        for group in waiting.values():
            rows = group.lanes.reshape(self.blocks, self.threads)
            if (rows.any(1) & ~rows.all(1)).any():
                raise Trap("a barrier is reached by some threads of a block only")
        self.shared_memory.forget()
        return waiting

    def _execute(self, reads, writes, do, guard, group):
        if guard:
            register, predicate, negated = guard
            self._readable((register,), group)
            group = Group(group.lanes & (predicate != negated))
            if not group.bits:
                return
        self._readable(reads, group)
        undefined = do(group)
        for register in writes:
            self.written[register] |= group.bits
        for register, lanes in undefined or ():
            self.written[register] &= ~lanes

    def _readable(self, registers, group):
        for register in registers:
            if group.bits & ~self.written[register]:
                raise Trap(f"uninitialised: {register} is read before it is written")

    # ---- decoding ----

    def _block(self, at):
        """The steps from `at` to the next branch or label, and ending(group) -> [("run" or "wait", where, who)]."""
        if at not in self.decoded:
            steps, pc, code, ending = [], at, self.kernel.code, None
            while ending is None:
                ending = self._ending(pc, code[pc])
                if ending is None:
                    steps.append((pc, *self._decode(code[pc])))
                    pc += 1
                    if pc in self.starts:
                        ending = self._going_on(pc)
            self.decoded[at] = steps, ending
        return self.decoded[at]

    def _going_on(self, pc):
        return lambda group: [("run", pc, group)]

    def _ending(self, pc, instruction):
        op, operands, guard = instruction
        if op in ("ret", "exit") and not guard:
            return lambda group: []
        if op == "bar.sync" and operands == ["0"] and not guard:
            return lambda group: [("wait", pc + 1, group)]
        if op not in ("bra", "bra.uni"):
            return None
        target = self.kernel.labels[operands[0]]
        if not guard:
            return self._going_on(target)
        register, negated = guard
        predicate = self._register(register)

        def branch(group):
            self.at = pc
            self._readable((register,), group)
            taken = Group(group.lanes & (predicate != negated))
            if taken.bits == group.bits or not taken.bits:
                return [("run", target if taken.bits else pc + 1, group)]
            return [("run", target, taken), ("run", pc + 1, Group(group.lanes & ~taken.lanes))]

        return branch

    def _register(self, name):
        """The array of a register, unsigned."""
        if name not in self.registers:
            self.registers[name] = np.zeros(self.n, _UNSIGNED[self.kernel.widths[name]])
        return self.registers[name]

    def _typed(self, name, type):
        array = self._register(name)
        if array.itemsize != np.dtype(numpy_type(type)).itemsize:
            raise Unknown(f"{name} is no {type}")
        return array.view(numpy_type(type))

    def _operand(self, text, type):
        """What an instruction reads, in its type: the array of a register, or a constant [1]."""
        return (
            self._typed(text, type)
            if text in self.registers or text in self.kernel.widths
            else self._constant(text, type)
        )

    def _constant(self, text, type):
        if text in self.kernel.parameters:
            value = self.kernel.parameters[text][0]
        elif text in self.kernel.shared:
            value = self.kernel.shared[text]
        elif re.fullmatch(r"0[fF][0-9A-Fa-f]{8}", text):
            value = int(text[2:], 16)
            return np.full(1, value, np.uint32).view(numpy_type(type))
        else:
            value = int(text.rstrip("U"), 0)
        if type == "pred":
            return np.full(1, value, bool)
        return np.full(1, value & (1 << _BITS[type]) - 1, _UNSIGNED[_BITS[type]]).view(numpy_type(type))

    def _target(self, text, type):
        """write(value, group) to a register."""
        array = self._typed(text, type)

        def write(value, group):
            np.copyto(array, value, where=self._where(text, group), casting="unsafe")

        return write

    def _where(self, text, group):
        """Lanes in which nothing was written yet may be overwritten without harm: where nobody else has written, nearly
        always, no mask is needed."""
        return group.lanes if self.written[text] & ~group.bits else True

    def _decode(self, instruction):
        """(registers read, registers written, do(group), guard)."""
        op, operands, guard = instruction
        guard = guard and (guard[0], self._register(guard[0]), guard[1])
        name, *modifiers = op.split(".")
        registers = [[r for r in re.findall(r"%?[\w.]+", o) if r in self.kernel.widths] for o in operands]
        try:
            special = getattr(self, f"_{name}", None)
            if name in ("st", "stmatrix"):
                return sum(registers, []), [], special(modifiers, operands), guard
            do = special(modifiers, operands) if special else self._plain(name, modifiers, operands)
            if do is None:
                raise Unknown("not known")
        except (Unknown, KeyError, ValueError) as error:
            raise Unknown(f"{self.kernel.name}: {op} {', '.join(operands)}: {error}") from None
        return sum(registers[1:], []), registers[0], do, guard

    def _compute(self, operands, result, types, function):
        """target = function(sources), in these types."""
        text, array = operands[0], self._typed(operands[0], result)
        sources = [self._operand(o, t) for o, t in zip(operands[1:], types, strict=True)]
        bits, floats = array.view(np.uint32) if result == "f32" else array, result == "f32"

        def do(group):
            value, where = function(*sources), self._where(text, group)
            if floats and np.count_nonzero(nan := np.isnan(value)):
                value = np.where(nan, _NAN32, value.view(np.uint32)).view(np.float32)
            np.copyto(array, value, where=where, casting="unsafe")

        def whole(group):
            if self.written[text] & ~group.bits:
                return do(group)
            function(*sources, out=array)
            if floats and np.count_nonzero(nan := np.isnan(array)):
                bits[nan] = _NAN32

        return whole if isinstance(function, np.ufunc) else do

    def _plain(self, name, modifiers, operands):
        """What computes on registers alone."""
        type = modifiers[-1] if modifiers else ""
        integer = type[:1] in ("u", "s", "b") and type != "b8"
        compute = partial(self._compute, operands)
        match name, *modifiers:
            case ("add" | "sub" | "mul", "rn", "f32"):
                return compute(type, [type] * 2, {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name])
            case ("fma", "rn", "f32"):
                return compute(type, [type] * 3, fma)
            case ("add", "f16x2" | "bf16x2"):  # nothing that it could be contracted with exists in this format
                return compute("b32", ["b32"] * 2, partial(_add_pairs, type[:-2]))
            case ("min", "s16x2"):
                return compute("b32", ["b32"] * 2, _min_pairs)
            case ("neg", "f32"):
                return compute("b32", ["b32"], partial(np.bitwise_xor, np.uint32(1 << 31)))
            case ("abs", "f32"):
                return compute("b32", ["b32"], partial(np.bitwise_and, np.uint32(0x7FFFFFFF)))
            case ("neg", "s32" | "s64"):
                return compute(type, [type], np.negative)
            case ("add" | "sub" | "min" | "max" | "and" | "or" | "xor", _) if integer or (
                type == "pred" and name in ("and", "or", "xor")
            ):
                return compute(type, [type] * 2, _INTEGER[name])
            case ("not", "b32" | "b64" | "pred"):
                return compute(type, [type], np.invert)
            case ("mul", "lo", _) if integer:
                return compute(type, [type] * 2, np.multiply)
            case ("mad", "lo", _) if integer:
                return compute(type, [type] * 3, lambda a, b, c: a * b + c)
            case ("mul" | "mad", "wide", "u32" | "s32"):
                wide = type[0] + "64"
                to = numpy_type(wide)
                if name == "mul":
                    return compute(wide, [type] * 2, lambda a, b: a.astype(to) * b)
                return compute(wide, [type, type, wide], lambda a, b, c: a.astype(to) * b + c)
            case ("mul", "hi", "u32"):
                return compute(type, [type] * 2, lambda a, b: a.astype(np.uint64) * b >> np.uint64(32))
            case ("div", "u32" | "s32" | "u64" | "s64"):
                return self._divide(operands, type, divide)
            case ("rem", "u32" | "u64"):
                return self._divide(operands, type, np.remainder)
            case ("shl", "b16" | "b32" | "b64"):
                return compute(type, [type, "u32"], np.left_shift)
            case ("shr", "u16" | "u32" | "s32" | "u64" | "s64" | "b32" | "b64"):
                return compute(type, [type, "u32"], np.right_shift)
            case ("shf", "l" | "r" as way, "wrap", "b32"):
                return compute(type, [type] * 3, partial(funnel, way == "l"))
            case ("bfe", "s32"):
                up, down = 32 - int(operands[2]) - int(operands[3]), 32 - int(operands[3])
                return self._compute(operands[:2], type, [type], lambda a: a << np.int32(up) >> np.int32(down))
            case ("bfe", "u32" | "u64"):
                number = {"u32": np.uint32, "u64": np.uint64}[type]
                at, mask = number(int(operands[2])), number((1 << int(operands[3])) - 1)
                return self._compute(operands[:2], type, [type], lambda a: a >> at & mask)
            case ("bfi", "b32"):
                at, mask = np.uint32(int(operands[3])), np.uint32((1 << int(operands[4])) - 1)
                return self._compute(operands[:3], type, [type] * 2, lambda a, b: b & ~(mask << at) | (a & mask) << at)
            case ("lop3", "b32"):
                return self._compute(operands[:4], type, [type] * 3, partial(lop3, int(operands[4], 0)))
            case ("prmt", "b32"):
                return compute(type, [type] * 3, prmt)
            case ("selp", _):
                bits = f"b{_BITS[type]}"
                return compute(bits, [bits, bits, "pred"], lambda a, b, p: np.where(p, a, b))
            case ("setp", comparison, _):
                table = _COMPARE_FLOAT if type == "f32" else _COMPARE
                return compute("pred", [type] * 2, table[comparison])
            case ("set", "eq", "bf16x2" | "u32", "f16x2" | "bf16x2"):
                return compute("b32", ["b32"] * 2, partial(_equal_pairs, modifiers[1], type[:-2]))
            case ("cvta", "to", "global", "u64") | ("cvta", "global", "u64"):
                return compute("b64", ["b64"], lambda a: a)

    def _divide(self, operands, type, function):
        divisor, write = self._operand(operands[2], type), self._target(operands[0], type)
        dividend = self._operand(operands[1], type)

        def do(group):
            zero = divisor == 0
            if (zero & group.lanes).any():
                raise Trap("division by zero")
            write(function(dividend, np.where(zero, divisor.dtype.type(1), divisor)), group)

        return do

    def _cvt(self, modifiers, operands):
        match modifiers:
            case ["rn", "f32", ("u32" | "s32") as source]:
                return self._compute(operands, "f32", [source], lambda a: a.astype(np.float32))
            case ["rzi", ("u32" | "s32") as target, "f32"]:
                return self._compute(operands, target, ["f32"], lambda a: truncate(a, numpy_type(target)))
            case ["f32", "f16"]:
                return self._compute(operands, "f32", ["b16"], lambda h: from_16(h, "f16"))
            case ["rn", ("f16" | "bf16") as target, "f32"]:
                return self._compute(operands, "b16", ["f32"], {"f16": to_f16, "bf16": to_bf16}[target])
            case ["rn", ("f16x2" | "bf16x2") as target, "f32"]:
                to = {"f16x2": to_f16, "bf16x2": to_bf16}[target]
                return self._compute(
                    operands,
                    "b32",
                    ["f32"] * 2,
                    lambda high, low: to(high).astype(np.uint32) << np.uint32(16) | to(low),
                )
            case [target, source] if target[0] in "us" and source[0] in "us":
                wide = f"b{self.kernel.widths[operands[1]]}"  # a register may be wider than what is read of it
                return self._compute(operands, target, [wide], lambda a: a.astype(numpy_type(source)))

    def _mov(self, modifiers, operands):
        (type,) = modifiers
        target, source = operands
        if target[0] == "{":  # unpack
            parts = target[1:-1].split(",")
            part = f"b{_BITS[type] // len(parts)}"
            write = [None if p == "_" else self._target(p, part) for p in parts]
            whole = self._operand(source, f"b{_BITS[type]}")

            def do(group):
                for i, w in enumerate(write):
                    if w:
                        w((whole >> whole.dtype.type(_BITS[part] * i)).astype(numpy_type(part)), group)

            return do
        if source[0] == "{":
            parts = source[1:-1].split(",")
            part = f"b{_BITS[type] // len(parts)}"
            to = numpy_type(f"b{_BITS[type]}")

            def pack(*values):
                return sum(v.astype(to) << to(_BITS[part] * i) for i, v in enumerate(values))

            return self._compute([target, *parts], f"b{_BITS[type]}", [part] * len(parts), pack)
        bits = type if type == "pred" else f"b{_BITS[type]}"
        return self._compute(operands, bits, [bits], lambda a: a)

    # ---- memory and exchange ----

    def _address(self, text):
        """(group) -> the addresses of its lanes, u64 [active]."""
        base, offset = re.fullmatch(r"\[([%\w$]+?)(?:\+(-?\w+))?\]", text).groups()
        offset = int(offset or "0", 0)
        if base in self.kernel.widths:
            array = self._register(base)
            return lambda group: array[group.index].astype(np.uint64) + np.uint64(offset & (1 << 64) - 1)
        constant = np.uint64(int(self._constant(base, "u64")[0]) + offset)
        return lambda group: np.full(len(group.index), constant)

    def _access(self, modifiers, operand):
        """space, how many values, their type."""
        *how, type = modifiers
        # A generic address of global memory is the same
        space = how.pop(0) if how and how[0] in ("global", "shared", "param") else "global"
        count = {"v2": 2, "v4": 4}[how.pop(0)] if how else 1
        if how or _BITS[type] < 16:
            raise Unknown("not known")
        parts = operand[1:-1].split(",") if operand[0] == "{" else [operand]
        if len(parts) != count:
            raise Unknown("a vector of another length")
        return space, parts, type

    def _shared(self, group, address):
        return address + (group.index // self.threads * self.shared_stride).astype(np.uint64)

    def _ld(self, modifiers, operands):
        space, parts, type = self._access(modifiers, operands[0])
        address, unsigned = self._address(operands[1]), _UNSIGNED[_BITS[type]]
        arrays = [self._register(p) for p in parts]
        arrays = [a.view(a.dtype.str.replace("u", "i")) if type[0] == "s" else a for a in arrays]

        def do(group):
            at, lanes = address(group), group.index
            if space == "param":
                size = np.dtype(unsigned).itemsize * len(parts)
                if (at % np.uint64(size)).any() or (at > self.kernel.parameter_bytes - size).any():
                    raise Trap("out of bounds: parameters")
                at = (at // np.uint64(np.dtype(unsigned).itemsize)).astype(np.int64)
                values = self.parameters.view(unsigned)[at + np.arange(len(parts))[:, None]]
            elif space == "shared":
                at = self._shared(group, at)
                values = self.shared_memory.load(at, unsigned, self.owner[lanes], len(parts))
                unwritten = self.shared_memory.unwritten(at, unsigned, len(parts))
            else:
                values = self.memory.load(at, unsigned, self.owner[lanes], len(parts))
            for array, value in zip(arrays, values, strict=False):
                array[lanes] = value.view(numpy_type(type)) if type[0] == "s" else value
            if space == "shared" and unwritten.any():  # padding, that a vector takes along: only its use is wrong
                masks = np.zeros((len(parts), self.n), bool)
                masks[:, lanes] = unwritten
                return [(part, Group(mask).bits) for part, mask in zip(parts, masks, strict=False)]

        return do

    def _st(self, modifiers, operands):
        space, parts, type = self._access(modifiers, operands[1])
        address, unsigned = self._address(operands[0]), _UNSIGNED[_BITS[type]]
        values = [self._operand(p, f"b{self.kernel.widths.get(p, _BITS[type])}") for p in parts]

        def do(group):
            at, lanes = address(group), group.index
            words = [np.broadcast_to(v, self.n)[lanes].astype(unsigned) for v in values]
            if space == "shared":
                self.shared_memory.store(self._shared(group, at), words, self.owner[lanes])
            else:
                self.memory.store(at, words, self.owner[lanes])

        return do

    def _atom(self, modifiers, operands):
        if modifiers != ["global", "add", "u64"]:
            raise Unknown("not known")
        address, term, target = (
            self._address(operands[1]),
            self._operand(operands[2], "u64"),
            self._register(operands[0]),
        )

        def do(group):
            terms = np.broadcast_to(term, self.n)
            for at, lane in zip(address(group), group.index, strict=False):
                at, atomic = at[None], np.full(1, np.iinfo(np.int32).max, np.int32)  # one thread for all of them
                before = self.memory.load(at, np.uint64, atomic)[0]
                target[lane] = before[0]
                self.memory.store(at, [before + terms[lane]], atomic)

        return do

    def _converged(self, group, mask):
        rows = group.lanes.reshape(-1, WARP)
        if (rows.any(1) != rows.all(1)).any() or ((mask != 0xFFFFFFFF) & group.lanes).any():
            raise Trap("threads of a warp exchange values, and not all of them are there")

    def _shfl(self, modifiers, operands):
        if modifiers != ["sync", "bfly", "b32"]:
            raise Unknown("not known")
        target, _, inside = operands[0].partition("|")
        source, with_, clamp, mask = (self._operand(o, "b32") for o in operands[1:])
        write, write_inside = self._target(target, "b32"), self._target(inside, "pred") if inside else None

        def do(group):
            self._converged(group, mask)
            if (((clamp != 31) | (with_ >= WARP)) & group.lanes).any():
                raise Trap("a shuffle over parts of a warp")
            write(source[self.number ^ with_ & np.uint32(31)], group)
            if write_inside:
                write_inside(True, group)

        return do

    def _matrix_rows(self, modifiers, address):
        """(group, k) -> where each lane's word of matrix k lies: 8 x 8 of 16 bits, whose rows are where 8 lanes say; a
        lane has two of a row."""
        match modifiers:
            case ["sync", "aligned", "m8n8", "x1" | "x2" | "x4", "shared", "b16"]:
                where = self._address(address)
            case _:
                raise Unknown("not known")
        lane = np.arange(WARP)

        def rows(group, k):
            self._converged(group, np.uint32(0xFFFFFFFF))
            at = where(group).reshape(-1, WARP)[:, 8 * k + lane // 4] + (lane % 4 * 4).astype(np.uint64)
            return self._shared(group, at.ravel())

        return rows

    def _stmatrix(self, modifiers, operands):
        rows = self._matrix_rows(modifiers, operands[0])
        values = [self._operand(part, "b32") for part in operands[1].strip("{}").split(",")]

        def do(group):
            for k, value in enumerate(values):
                words = np.broadcast_to(value, self.n)[group.index].astype(np.uint32)
                self.shared_memory.store(rows(group, k), [words], self.owner[group.index])

        return do

    def _ldmatrix(self, modifiers, operands):
        rows = self._matrix_rows(modifiers, operands[1])
        parts = operands[0].strip("{}").split(",")
        arrays = [self._register(part) for part in parts]

        def do(group):
            masks = np.zeros((len(parts), self.n), bool)
            for k, array in enumerate(arrays):
                at = rows(group, k)
                array[group.index] = self.shared_memory.load(at, np.uint32, self.owner[group.index], 1)[0]
                masks[k, group.index] = self.shared_memory.unwritten(at, np.uint32, 1)[0]
            if masks.any():
                return [(part, Group(mask).bits) for part, mask in zip(parts, masks, strict=True)]

        return do

    def _redux(self, modifiers, operands):
        if modifiers != ["sync", "add", "s32"]:
            raise Unknown("not known")
        write, source, mask = (
            self._target(operands[0], "b32"),
            self._operand(operands[1], "b32"),
            self._operand(operands[2], "b32"),
        )

        def do(group):
            self._converged(group, mask)
            write(np.repeat(source.reshape(-1, WARP).sum(1, dtype=np.uint32), WARP), group)

        return do


def _half(format, pair, i):
    return from_16((pair >> np.uint32(16 * i)).astype(np.uint16), format)


def _min_pairs(a, b):
    a, b = a.view(np.int32), b.view(np.int32)
    high, low = np.minimum(a >> 16, b >> 16), np.minimum(a << 16 >> 16, b << 16 >> 16)
    return (high << 16 | low & 0xFFFF).view(np.uint32)


def _add_pairs(format, a, b):
    to = {"f16": to_f16, "bf16": to_bf16}[format]
    low, high = (to(_half(format, a, i) + _half(format, b, i)).astype(np.uint32) for i in (0, 1))
    return high << np.uint32(16) | low


def _equal_pairs(result, format, a, b):
    """set.eq: 1 in the format where the halves are equal; u32: all ones if both are. A NaN equals nothing."""
    equal = [_half(format, a, i) == _half(format, b, i) for i in (0, 1)]
    one = np.uint32(0xFFFF if result == "u32" else {"f16": 0x3C00, "bf16": 0x3F80}[format])
    return np.where(equal[1], one << np.uint32(16), np.uint32(0)) | np.where(equal[0], one, np.uint32(0))


def launch(kernel, grid, threads, parameters, shared_bytes, memory):
    """Runs a launch of `grid` blocks. parameters: their bytes, u8. shared_bytes: beside what the kernel declares
    itself."""
    done = 0
    with np.errstate(all="ignore"):
        while done < grid:
            n = min(grid - done, max(1, LANES // threads))
            if (n, threads) not in kernel.decoded:
                kernel.decoded[n, threads] = Threads(kernel, n, threads)
            some = kernel.decoded[n, threads]
            try:
                some.run(done, grid, parameters, shared_bytes, memory)
            except Trap as trap:
                raise Trap(f"{trap}, at instruction {some.at} of {kernel.name}: {kernel.code[some.at]}") from None
            done += n
