"""Reads SASS: loops of a kernel, and the instructions that one trip through a loop executes."""

import collections
import heapq
import itertools
import pathlib
import re
import shutil
import subprocess

# The pipes of an SM; how many instructions each takes a cycle is in gpus.py. "uniform": computed once a warp, beside
# the others.
PIPES = {
    "FMA": r"FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2|HSET2|IMAD(?!\.WIDE|\.HI)",
    "IMAD.WIDE": r"IMAD\.(WIDE|HI)",
    "ALU": r"LOP3|SHF|IADD|LEA|ISETP|FSETP|HSETP2|PRMT|I2FP|F2FP|SEL|FSEL|FMNMX|IMNMX|VIMNMX|MOV|PLOP3|SGXT|BMSK|POPC"
    r"|IABS|VIADD|CS2R|FCHK",
    "MUFU": r"MUFU|I2F(?!P)|F2I|F2F",
    "LSU": r"LDG|STG|LDS|STS|LDL|STL|LD\b|ST\b|ATOM|RED|SHFL",
    "uniform": r"U[A-Z]|R2UR|S2UR|S2R|LDC",
    "control": r"BRA|BSSY|BSYNC|CALL|RET|EXIT|BAR|WARPSYNC|NOP|BREAK|YIELD|DEPBAR|VOTE|P2R|R2P|BMOV|ERRBAR|MEMBAR"
    r"|NANOSLEEP",
}
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([^;]+);")

Instruction = collections.namedtuple("Instruction", "address predicate text")


def tool(name):
    """Path of cuobjdump or nvdisasm: of the toolkit, or of the triton wheel, which carries both."""
    path = shutil.which(name)
    if not path:
        try:
            import triton

            candidate = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin" / name
            path = str(candidate) if candidate.exists() else None
        except ImportError:
            pass
    if not path:
        raise SystemExit(f"{name} was not found: install the CUDA toolkit or triton")
    return path


def functions(binary, arch):
    """{demangled name: [Instruction]} of a cubin or of a shared library's code for `arch` ("sm_90")."""
    dump = subprocess.run(
        [tool("cuobjdump"), "-sass", "-arch", arch, str(binary)], capture_output=True, text=True, check=True
    ).stdout
    names = (
        subprocess.run(["c++filt"], input=dump, capture_output=True, text=True, check=True).stdout
        if shutil.which("c++filt")
        else dump
    )
    by_name, current = {}, None
    for line in names.splitlines():
        if "Function :" in line:
            current = by_name.setdefault(line.split("Function :")[1].strip(), [])
        elif current is not None and (m := _LINE.search(line)):
            current.append(Instruction(int(m[1], 16), (m[2] or "").strip(), m[3].strip()))
    return by_name


def resources(binary, arch=None):
    """{demangled name: registers and spilled bytes of a thread} of a cubin, or of a shared library's code for
    `arch`."""
    only = ["-arch", arch] if arch else []
    dump = subprocess.run(
        [tool("cuobjdump"), "-res-usage", *only, str(binary)], capture_output=True, text=True, check=True
    ).stdout
    dump = (
        subprocess.run(["c++filt"], input=dump, capture_output=True, text=True, check=True).stdout
        if shutil.which("c++filt")
        else dump
    )
    by_name = {}
    for name, usage in re.findall(r"Function (.+?):\n\s+(REG:.*)", dump):
        numbers = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        by_name[name.strip()] = {"registers": numbers["REG"], "spill_bytes": numbers["STACK"] + numbers["LOCAL"]}
    return by_name


def loops(code):
    """Innermost loops as lists of instructions that one trip executes. Of several paths the shortest counts: the others
    handle NaNs."""
    index = {i.address: k for k, i in enumerate(code)}
    back = []
    for k, i in enumerate(code):
        target = branch_target(i)
        if target is not None and target in index and index[target] < k:
            back.append((index[target], k))
    innermost = [(a, b) for a, b in back if not any((c, d) != (a, b) and a <= c and d <= b for c, d in back)]
    return [trip for a, b in innermost if (trip := _shortest_trip(code, index, a, b))]


def branch_target(i):
    """Address that an instruction branches to; None for others. On sm_80 a call under a predicate leaves a loop."""
    branch = r"(?:BRA|CALL\.REL\.NOINC)" if i.predicate else "BRA"
    m = re.match(branch + r"(?:\.\w+)*\s+(?:!?U?P\w+,\s*)*`?\(?0x([0-9a-f]+)", i.text)
    return int(m[1], 16) if m else None


def outer_loops(code):
    """(first, last) of every loop, by the numbers of its instructions."""
    index = {i.address: k for k, i in enumerate(code)}
    return [(index[t], k) for k, i in enumerate(code) if (t := branch_target(i)) in index and index[t] < k]


def path(code, *stops):
    """The shortest way through the code that takes these instructions, given by their numbers, in this order; None if
    there is none."""
    index = {i.address: k for k, i in enumerate(code)}
    taken = [code[stops[0]]]
    for start, end in itertools.pairwise(stops):
        trip = _shortest_trip(code, index, start, end)
        if trip is None:
            return None
        taken += trip[1:]
    return taken


def _shortest_trip(code, index, start, end):
    """Dijkstra over instructions from one to another: from a loop's head to its back edge."""
    queue, best, came = [(1, start)], {start: 1}, {}
    while queue:
        length, k = heapq.heappop(queue)
        if k == end:
            path = [k]
            while path[-1] != start:
                path.append(came[path[-1]])
            return [code[p] for p in reversed(path)]
        target = branch_target(code[k])
        following = (
            []
            if target is not None and not code[k].predicate and not re.search(r"BRA.*\bU?P", code[k].text)
            else [k + 1]
        )
        if re.match(r"EXIT|RET", code[k].text) and not code[k].predicate:
            following = []
        if target in index:
            following.append(index[target])
        for n in following:
            if n < len(code) and best.get(n, 1 << 30) > length + 1:
                best[n], came[n] = length + 1, k
                heapq.heappush(queue, (length + 1, n))
    return None


def by_pipe(instructions):
    count = collections.Counter()
    for i in instructions:
        count[next((pipe for pipe, pattern in PIPES.items() if re.match(pattern, i.text)), "other")] += 1
    return dict(count)


def normals(instructions):
    """Normals made: each pair takes two int -> float conversions, so each normal one."""
    return sum(bool(re.match(r"I2FP?\b", i.text)) for i in instructions)


def cost(trip, values):
    """Instructions a value, in all and by pipe, and the widths of global accesses, of one trip through a loop over so
    many values."""
    accesses = collections.Counter(m[0] for i in trip if (m := re.match(r"(LDG|STG)\S*", i.text)))
    per_value = {pipe: round(count / values, 3) for pipe, count in sorted(by_pipe(trip).items())}
    return {
        "values": values,
        "instructions_per_value": round(len(trip) / values, 2),
        "per_value": per_value,
        "accesses": dict(accesses),
    }
