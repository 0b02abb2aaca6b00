"""The emulator of filters, against a second one that takes one case at a time, and the policy against itself."""

from __future__ import annotations

import errno
import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.errors import PolicyError
from sandbox.policy import cbpf, seccomp
from sandbox.policy.cbpf import Case

RET, LD, JEQ, JGT, JGE, JSET, AND = 0x06, 0x20, 0x15, 0x25, 0x35, 0x45, 0x54


def program(*instructions: tuple[int, int, int, int]) -> bytes:
    return b"".join(struct.pack("<HBBI", *item) for item in instructions)


def one_by_one(code: bytes, case: Case) -> int:
    """As the kernel does it: one instruction after the other, for the few kinds that a filter has."""
    ins, pc, a = [struct.unpack_from("<HBBI", code, at) for at in range(0, len(code), 8)], 0, 0
    while True:
        op, jt, jf, k = ins[pc]
        pc += 1
        if op == LD:
            a = case.word(k)
        elif op == AND:
            a &= k
        elif op == RET:
            return k
        else:
            test = {JEQ: a == k, JGT: a > k, JGE: a >= k, JSET: a & k != 0}[op]
            pc += jt if test else jf


@st.composite
def programs(draw):
    size = draw(st.integers(1, 12))
    body = []
    for index in range(size):
        left = size - index - 1
        op = draw(st.sampled_from([LD, AND, JEQ, JGT, JGE, JSET]))
        k = (
            draw(st.sampled_from([0, 16, 20, 24, 4]))
            if op == LD
            else draw(st.sampled_from([0, 1, 2, 41, 0xFF, 1 << 31]))
        )
        jump = st.integers(0, left)
        body.append((op, draw(jump), draw(jump), k) if op not in (LD, AND) else (op, 0, 0, k))
    return program(*body, (RET, 0, 0, draw(st.sampled_from([cbpf.ALLOW, cbpf.ERRNO | 1]))))


def with_returns(code: bytes) -> bytes:
    """Every third instruction returns: paths end in many places."""
    parts = [code[at : at + 8] for at in range(0, len(code), 8)]
    return b"".join(
        struct.pack("<HBBI", RET, 0, 0, cbpf.ERRNO | index) if index % 3 == 2 else part
        for index, part in enumerate(parts)
    )


@settings(max_examples=150)
@given(
    programs(),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 500), st.integers(0, 2**64 - 1)), min_size=1, max_size=20),
)
def test_all_cases_at_once_are_the_same_as_one_by_one(code, returns, inputs):
    code = with_returns(code) if returns else code
    cases = [Case(number, (argument, number)) for number, argument in inputs]
    assert cbpf.decide([code], cases) == [one_by_one(code, case) for case in cases]


def test_the_strictest_of_several_filters_wins():
    allow, refuse = program((RET, 0, 0, cbpf.ALLOW)), program((RET, 0, 0, cbpf.ERRNO | 1))
    kill = program((RET, 0, 0, cbpf.KILL_PROCESS))
    assert cbpf.decide([allow, refuse], [Case(0)]) == [cbpf.ERRNO | 1]
    assert cbpf.decide([kill, refuse, allow], [Case(0)]) == [cbpf.KILL_PROCESS]
    assert cbpf.decide([], [Case(0)]) == [cbpf.ALLOW], "no filter lets everything pass"


@pytest.mark.parametrize(
    "code",
    [b"", b"1234567", program((0x28, 0, 0, 0)), program((JEQ, 200, 200, 0)), program((0xF5, 0, 0, 0), (RET, 0, 0, 0))],
)
def test_what_no_filter_may_hold_is_refused(code):
    with pytest.raises(PolicyError):
        cbpf.decide([code], [Case(0)])


def test_high_words_are_words_of_their_own():
    code = program((LD, 0, 0, 20), (JEQ, 0, 1, 1), (RET, 0, 0, cbpf.ERRNO | 1), (RET, 0, 0, cbpf.ALLOW))
    assert cbpf.decide([code], [Case(41, (1 << 32 | 40,)), Case(41, (40,))]) == [cbpf.ERRNO | 1, cbpf.ALLOW]


@pytest.mark.parametrize(
    ("call", "arguments", "verdict"),
    [
        ("read", (), None),
        ("mount", (), errno.EPERM),
        ("clone3", (), errno.ENOSYS),
        ("sync", (), 0),
        ("socket", (2, 1, 6), None),
        ("socket", (40, 1, 0), errno.EAFNOSUPPORT),
        ("socket", (1 << 32 | 40, 1, 0), errno.EAFNOSUPPORT),
        ("socket", (16, 3, 6), errno.EPERM),
        ("clone", (0x10000000,), errno.EPERM),
        ("clone", (0x11,), None),
        ("ioctl", (0, 0x5412), errno.EPERM),
        ("ioctl", (0, 0x5401), None),
        ("no_such_call", (), errno.EPERM),
    ],
)
def test_the_policy_says_what_becomes_of_a_call(call, arguments, verdict):
    assert seccomp.verdict(call, arguments) == verdict


@pytest.mark.parametrize("action", [cbpf.LOG, cbpf.TRACE, cbpf.USER_NOTIF, cbpf.ALLOW])
def test_what_lets_a_call_run_is_no_refusal(action, tmp_path):
    from sandbox.config import Config
    from sandbox.host.filters import Filters
    from sandbox.report import filter as filters
    from sandbox.report import rows
    from sandbox.report.facts import Facts

    code = program((RET, 0, 0, action))
    config = Config(str(tmp_path), str(tmp_path))
    reading = filters._reading(config, Filters((code,), 0.0), rows.CALLS)
    assert reading.unknown > 0
    assert reading.differences
    facts = Facts.__new__(Facts)
    facts.__dict__["filter"] = reading
    found = list(facts.emulated(rows.BY_ID["KRN-07"]))
    assert found
    assert not any(fact.holds for fact in found)


def test_what_another_version_made_of_a_filter_is_not_read(tmp_path, monkeypatch):
    from sandbox.config import Config
    from sandbox.host.filters import Filters
    from sandbox.report import filter as filters

    config, found, calls = (
        Config(str(tmp_path), str(tmp_path)),
        Filters((program((RET, 0, 0, cbpf.ALLOW)),), 0.0),
        (("mount", ()),),
    )
    right = filters._reading(config, found, calls)
    (known,) = (tmp_path / "reports" / "filters").iterdir()
    known.write_text(
        json.dumps({**json.loads(known.read_text()), "verdicts": {"mount": "as another version spelled it"}})
    )
    # The control: this version reads what it wrote.
    assert filters._reading(config, found, calls) != right
    (tmp_path / "cbpf.py").write_text("# another emulator\n")
    monkeypatch.setattr(cbpf, "__file__", str(tmp_path / "cbpf.py"))
    filters._version.cache_clear()
    try:
        assert filters._reading(config, found, calls) == right
    finally:
        filters._version.cache_clear()
