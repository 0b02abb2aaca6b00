"""Classic BPF, as seccomp uses it: decides what installed filters do to a call, without making the call. Pure.

``decide`` walks a program once for any number of cases. Jumps only go forward (the kernel refuses others), so one
pass from the first instruction to the last sees every path; the cases that are at an instruction are the bits of
one integer, kept apart by what their accumulator holds. 4,000 cases through a filter of 1,500 instructions take
about 20 ms; one by one they take three seconds.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sandbox.errors import PolicyError

X86_64, I386 = 0xC000003E, 0x40000003  # linux/audit.h
X32_BIT = 0x40000000

# include/uapi/linux/seccomp.h
KILL_PROCESS, KILL_THREAD, TRAP, ERRNO = 0x80000000, 0x00000000, 0x00030000, 0x00050000
USER_NOTIF, TRACE, LOG, ALLOW = 0x7FC00000, 0x7FF00000, 0x7FFC0000, 0x7FFF0000
_ACTION = 0xFFFF0000
# With several filters the strictest result wins, see seccomp(2).
_STRICTEST = {a: n for n, a in enumerate((KILL_PROCESS, KILL_THREAD, TRAP, ERRNO, USER_NOTIF, TRACE, LOG, ALLOW))}

Expression = tuple[object, ...]


class Case(NamedTuple):
    """One call: what struct seccomp_data holds."""

    number: int
    arguments: tuple[int, ...] = ()
    arch: int = X86_64

    def word(self, offset: int) -> int:
        """The 32 bits at that offset of struct seccomp_data (little endian): nr, arch, instruction pointer, args."""
        if offset == 0:
            return self.number & 0xFFFFFFFF
        if offset == 4:
            return self.arch
        if offset in (8, 12):
            return 0
        index, high = divmod(offset - 16, 8)
        value = self.arguments[index] if index < len(self.arguments) else 0
        return (value >> (32 if high else 0)) & 0xFFFFFFFF


class Instruction(NamedTuple):
    code: int
    jt: int
    jf: int
    k: int


def parse(program: bytes) -> list[Instruction]:
    """The instructions of struct sock_filter[]. PolicyError when the length is not a multiple of eight."""
    if len(program) % 8 or not program:
        raise PolicyError(f"{len(program)} bytes are no BPF program.")
    return [Instruction(*fields) for fields in struct.iter_unpack("<HBBI", program)]


def decide(programs: Sequence[bytes], cases: Sequence[Case]) -> list[int]:
    """What the filters together do to each case, as a seccomp return value; no filter allows everything.

    Raises PolicyError for an instruction that the kernel would not accept in a seccomp filter.
    """
    results = [ALLOW] * len(cases)
    for program in programs:
        for mask, value in _Walk(parse(program), cases).run():
            for index in _bits(mask):
                if _STRICTEST.get(value & _ACTION, 0) < _STRICTEST.get(results[index] & _ACTION, 0):
                    results[index] = value
    return results


def name(value: int) -> str:
    """``ERRNO(1)``, ``ALLOW``, …"""
    words = {
        KILL_PROCESS: "KILL_PROCESS",
        KILL_THREAD: "KILL_THREAD",
        TRAP: "TRAP",
        USER_NOTIF: "USER_NOTIF",
        TRACE: "TRACE",
        LOG: "LOG",
        ALLOW: "ALLOW",
    }
    action = value & _ACTION
    return f"ERRNO({value & 0xFFFF})" if action == ERRNO else words.get(action, hex(value))


def _bits(mask: int) -> Iterable[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


_JUMPS = {0x10: "eq", 0x20: "gt", 0x30: "ge", 0x40: "set"}
_ALU = {0x00, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x80, 0xA0}


class _Walk:
    """One program. A state is (accumulator, index register, scratch memory), each an expression over the case."""

    def __init__(self, program: list[Instruction], cases: Sequence[Case]) -> None:
        self._program, self._cases = program, cases
        self._values: dict[Expression, dict[int, int]] = {}

    def run(self) -> Iterable[tuple[int, int]]:
        """(cases as bits, return value), every case exactly once."""
        zero: Expression = ("k", 0)
        pending: dict[int, dict[tuple[Expression, Expression, tuple[tuple[int, Expression], ...]], int]] = {
            0: {(zero, zero, ()): (1 << len(self._cases)) - 1}
        }
        for pc, ins in enumerate(self._program):
            for (a, x, memory), mask in pending.pop(pc, {}).items():
                for target, state, part in self._step(pc, ins, a, x, memory, mask):
                    if target < 0:
                        for value, group in self._split(state[0], part):
                            yield group, value
                    elif target >= len(self._program):
                        raise PolicyError(f"instruction {pc} jumps out of the program.")
                    else:
                        states = pending.setdefault(target, {})
                        states[state] = states.get(state, 0) | part

    def _step(
        self,
        pc: int,
        ins: Instruction,
        a: Expression,
        x: Expression,
        memory: tuple[tuple[int, Expression], ...],
        mask: int,
    ) -> Iterable[tuple[int, tuple[Expression, Expression, tuple[tuple[int, Expression], ...]], int]]:
        code, kind = ins.code, ins.code & 7
        mode = code & 0xE0
        if kind in (0, 1):  # LD, LDX
            value = self._load(pc, ins, mode, memory)
            yield pc + 1, ((value, x, memory) if kind == 0 else (a, value, memory)), mask
        elif kind in (2, 3):  # ST, STX
            yield pc + 1, (a, x, (*(m for m in memory if m[0] != ins.k), (ins.k, a if kind == 2 else x))), mask
        elif kind == 4:
            operand = x if code & 8 else ("k", ins.k)
            if code & 0xF0 not in _ALU:
                raise PolicyError(f"instruction {pc}: unknown operation {code:#x}.")
            yield pc + 1, (("alu", code & 0xF0, a, operand), x, memory), mask
        elif kind == 5:
            if code & 0xF0 == 0:
                yield pc + 1 + ins.k, (a, x, memory), mask
                return
            yes = self._holds(pc, code, a, x if code & 8 else ("k", ins.k), mask)
            if yes:
                yield pc + 1 + ins.jt, (a, x, memory), yes
            if mask & ~yes:
                yield pc + 1 + ins.jf, (a, x, memory), mask & ~yes
        elif kind == 6:
            yield -1, ((a if code & 0x18 == 0x10 else ("k", ins.k)), x, memory), mask
        else:  # MISC: TAX, TXA
            yield pc + 1, ((x, x, memory) if code & 0x80 else (a, a, memory)), mask

    def _load(self, pc: int, ins: Instruction, mode: int, memory: tuple[tuple[int, Expression], ...]) -> Expression:
        if mode == 0x20 and ins.code & 0x18 == 0 and ins.k % 4 == 0 and ins.k < 64:
            return ("word", ins.k)
        if mode == 0x00:
            return ("k", ins.k)
        if mode == 0x60:
            return next((value for slot, value in memory if slot == ins.k), ("k", 0))
        if mode == 0x80:
            return ("k", 64)
        raise PolicyError(f"instruction {pc}: unknown load {ins.code:#x}.")

    def _holds(self, pc: int, code: int, a: Expression, operand: Expression, mask: int) -> int:
        test = _JUMPS.get(code & 0xF0)
        if test is None:
            raise PolicyError(f"instruction {pc}: unknown jump {code:#x}.")
        if operand[0] != "k":
            return sum(
                group & other
                for value, group in self._split(a, mask)
                for against, other in self._split(operand, mask)
                if _compare(test, value, against)
            )
        against = operand[1]
        assert isinstance(against, int)  # noqa: S101 - for the type checker
        groups = self._groups(a)
        if test == "eq":
            return groups.get(against, 0) & mask
        found = 0
        for value, group in groups.items():
            if group & mask and _compare(test, value, against):
                found |= group
        return found & mask

    def _split(self, expression: Expression, mask: int) -> Iterable[tuple[int, int]]:
        for value, group in self._groups(expression).items():
            if group & mask:
                yield value, group & mask

    def _groups(self, expression: Expression) -> dict[int, int]:
        """Every value that the expression has over the cases, and the cases that have it."""
        known = self._values.get(expression)
        if known is not None:
            return known
        known = self._values[expression] = {}
        match expression:
            case ("alu", int(operation), tuple(left), ("k", int(constant))):
                # By values, of which there are few, and not by cases.
                for value, group in self._groups(left).items():
                    result = _calculate(operation, value, constant)
                    known[result] = known.get(result, 0) | group
            case _:
                members: dict[int, list[int]] = {}
                for index, case in enumerate(self._cases):
                    members.setdefault(_value(expression, case), []).append(index)
                for value, indexes in members.items():
                    known[value] = _mask(indexes)
        return known


def _mask(indexes: list[int]) -> int:
    """The integer with those bits, made in one step: setting them one by one copies it each time."""
    data = bytearray(max(indexes) // 8 + 1)
    for index in indexes:
        data[index // 8] |= 1 << index % 8
    return int.from_bytes(data, "little")


def _compare(test: str, value: int, against: int) -> bool:
    match test:
        case "eq":
            return value == against
        case "gt":
            return value > against
        case "ge":
            return value >= against
        case _:
            return value & against != 0


def _value(expression: Expression, case: Case) -> int:
    match expression:
        case ("k", int(value)):
            return value
        case ("word", int(offset)):
            return case.word(offset)
        case ("alu", int(operation), tuple(left), tuple(right)):
            return _calculate(operation, _value(left, case), _value(right, case))
    raise PolicyError(f"no expression: {expression!r}")


def _calculate(operation: int, a: int, s: int) -> int:
    match operation:
        case 0x00:
            result = a + s
        case 0x10:
            result = a - s
        case 0x20:
            result = a * s
        case 0x30:
            result = a // s if s else 0
        case 0x40:
            result = a | s
        case 0x50:
            result = a & s
        case 0x60:
            result = a << s if s < 32 else 0
        case 0x70:
            result = a >> s if s < 32 else 0
        case 0x80:
            result = -a
        case _:
            result = a ^ s
    return result & 0xFFFFFFFF
