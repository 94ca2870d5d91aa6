"""Faults planted in a kernel's PTX, of the kinds that a compiler or an edit could make."""

import copy
import re

_OTHER = {
    "add": "sub",
    "sub": "add",
    "and": "or",
    "or": "and",  # `xor` would be the same wherever two halves of a word are joined
    "xor": "or",
    "min": "max",
    "max": "min",
    "shl": "shr",
    "shr": "shl",
}
_OPPOSITE = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le", "eq": "ne", "ne": "eq", "num": "nan", "nan": "num"}


def executed(kernel):
    """The numbers of the instructions that ran since kernel.decoded was empty: each is decoded when it is met."""
    blocks = [(at, steps) for threads in kernel.decoded.values() for at, (steps, _) in threads.decoded.items()]
    # And the branch or barrier behind the steps
    return sorted({pc for at, steps in blocks for pc in range(at, at + len(steps) + 1)})


def faults(instruction, rng):
    """[(what, faulty instruction)], one for each kind of fault that this instruction can have; None: it is left out."""
    op, operands, guard = instruction
    name, *modifiers = op.split(".")
    found = []
    if op == "shr.s64" and operands[-1] == "63":
        return found  # a sign, by which Triton's signed divisions round: of numbers that are never negative

    def add(what, **changes):
        found.append((what, instruction._replace(**changes)))

    def with_operand(i, text):
        return [*operands[:i], text, *operands[i + 1 :]]

    if name == "bar":
        found.append(("barrier left out", None))
    if guard:
        add("predicate negated", guard=(guard[0], not guard[1]))
    if name in _OTHER and "x2" not in op:
        add("another operation", op=re.sub(r"^shl\.[us]", "shl.b", _OTHER[name] + op[len(name) :]))
    if name == "setp":
        add("comparison negated", op=op.replace(modifiers[0], _OPPOSITE[modifiers[0]], 1))
    if name in ("sub", "shf", "prmt", "selp", "fma"):
        a, b = (2, 3) if name == "fma" else (1, 2)
        if operands[a] != operands[b]:
            add("operands swapped", operands=with_operand(a, operands[b])[:b] + [operands[a]] + operands[b + 1 :])
    if name in ("ld", "st"):
        at = 1 if name == "ld" else 0
        base, offset = re.fullmatch(r"\[([^+]+)\+?(.*)\]", operands[at]).groups()
        add("address 4 bytes further", operands=with_operand(at, f"[{base}+{int(offset or '0', 0) + 4}]"))
    if "rn" in modifiers:
        add("rounded towards zero", op=op.replace(".rn", ".rz"))
    for i, text in enumerate(operands[1:], 1):
        if name in ("shl", "shr", "shf") and i == len(operands) - 1 and text.isdigit():
            add("shifted by one more", operands=with_operand(i, str(int(text) + 1)))
        elif re.fullmatch(r"-?\d+|0x[0-9A-F]+U?|0f[0-9A-F]{8}", text) and not _of_no_effect(name, i, text):
            value = (int(text[2:], 16) if text[:2] == "0f" else int(text.rstrip("U"), 0)) & (
                1 << (64 if op.endswith("64") else 32)
            ) - 1
            value ^= 1 << int(rng.integers(max(1, value.bit_length())))
            add("a bit of a constant", operands=with_operand(i, f"0f{value:08X}" if text[:2] == "0f" else str(value)))
    return found


def _of_no_effect(name, operand, constant):
    """A barrier's number; the table of a lop3, of whose eight entries two are never asked for where mask and constant
    have no bit in common; and what Triton has a register hold before a load that some lanes take no part in, which do
    nothing with it."""
    return name in ("bar", "shfl") or (name, operand) == ("lop3", 4) or (name, constant) == ("mov", "0x0")


def plant(kernel, pc, faulty):
    """A copy of the kernel with this instruction at `pc`. It must end soon."""
    mutant = copy.copy(kernel)
    mutant.code, mutant.labels, mutant.decoded, mutant.budget = (
        list(kernel.code),
        {**kernel.labels, "$next": pc + 1},
        {},
        20_000,
    )
    mutant.code[pc] = faulty or kernel.code[pc]._replace(op="bra.uni", operands=["$next"], guard=None)
    return mutant
