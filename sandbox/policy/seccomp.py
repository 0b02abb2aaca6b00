"""The system-call policy: what a web app needs is listed, everything else is refused.

The rules are data; ``document()`` turns them into the JSON that runc, crun and Docker share. Four kernel and
library facts shape them:

- An ``int`` argument arrives in a 64-bit register whose high half the kernel ignores, and the plain comparisons of
  libseccomp look at all 64 bits: ``socket(1<<32 | AF_VSOCK)`` passes them. Every comparison here therefore masks
  the low word.
- libseccomp lets an unconditional allow of a call beat every conditional denial of it. A call that is partly
  allowed is allowed **by values** only; "all but these" is written as the masks that cover the complement.
- runc drops rules whose action equals the default action, so nothing here relies on such a rule.
- A filter that lists one architecture kills every other ABI: int 0x80 and x32 end the process that tries.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

_LOW_WORD = 0xFFFFFFFF


class Arg(NamedTuple):
    """One condition: the call's argument ``position`` (from 0), masked, equals ``value``."""

    position: int
    mask: int
    value: int


class Rule(NamedTuple):
    """Calls, and what happens to them when all of ``args`` hold; ``refuse`` is the errno, None means allowed."""

    calls: tuple[str, ...]
    args: tuple[Arg, ...] = ()
    refuse: int | None = None


ALLOWED = tuple(
    """
    accept accept4 access alarm bind brk capget capset chdir chown clock_getres clock_gettime clock_nanosleep close
    close_range connect copy_file_range dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2
    epoll_wait eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 fallocate fchdir fchown
    fchownat fcntl fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat fstatfs fsync ftruncate futex
    futex_waitv futimesat getcpu getcwd getdents getdents64 getegid geteuid getgid getgroups getitimer getpeername
    getpgid getpgrp getpid getppid getpriority getrandom getresgid getresuid getrlimit get_robust_list getrusage getsid
    getsockname getsockopt get_thread_area gettid gettimeofday getuid getxattr inotify_add_watch inotify_init
    inotify_init1 inotify_rm_watch ioprio_get ioprio_set kill landlock_add_rule landlock_create_ruleset
    landlock_restrict_self lchown lgetxattr link linkat listen listxattr llistxattr lremovexattr lseek lsetxattr lstat
    madvise membarrier mincore mkdir mkdirat mlock mlock2 mlockall mprotect mq_getsetattr mq_notify
    mq_open mq_timedreceive mq_timedsend mq_unlink mremap msgctl msgget msgrcv msgsnd msync munlock munlockall munmap
    nanosleep newfstatat pause pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll
    pread64 preadv preadv2 prlimit64 process_mrelease pselect6 pwrite64 pwritev pwritev2 read readahead readlink
    readlinkat readv recvfrom recvmmsg recvmsg removexattr rename renameat renameat2 restart_syscall rmdir rseq
    rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
    rt_tgsigqueueinfo sched_getaffinity sched_getattr sched_getparam sched_get_priority_max sched_get_priority_min
    sched_getscheduler sched_rr_get_interval sched_setaffinity sched_setattr sched_setparam sched_setscheduler
    sched_yield select semctl semget semop semtimedop sendfile sendmmsg sendmsg sendto setfsgid setfsuid setgid
    setgroups setitimer setpgid setpriority setregid setresgid setresuid setreuid setrlimit set_robust_list setsid
    set_tid_address setuid setxattr shmat shmctl shmdt shutdown sigaltstack signalfd signalfd4 splice stat
    statfs statx symlink symlinkat syncfs sync_file_range sysinfo tee tgkill time timer_create timer_delete
    timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime times tkill truncate
    umask uname unlink unlinkat utime utimensat utimes vfork wait4 waitid write writev
    """.split()
)

# A runtime that probes for these falls back when they do not exist; EPERM would make it give up. glibc tries clone3
# at each thread start and its flags are behind a pointer, out of a filter's sight; so are openat2's.
ABSENT = (
    "clone3",
    "openat2",
    "memfd_secret",
    "io_uring_setup",
    "io_uring_enter",
    "io_uring_register",
)

# include/uapi/linux/sched.h: NEWNS NEWCGROUP NEWUTS NEWIPC NEWUSER NEWPID NEWNET.
NAMESPACE_FLAGS = 0x7E020000
_SET_ID = 0o6000
_FILE_TYPE = 0o170000
_O_CREAT, _O_TMPFILE_BIT = 0o100, 0o20000000

UNIX, INET, INET6, NETLINK = 1, 2, 10, 16
FAMILIES = (UNIX, INET, INET6, NETLINK)
# SOCK_STREAM with IPPROTO_IP or TCP, SOCK_DGRAM with IPPROTO_IP or UDP: no SCTP, DCCP, UDP-Lite, MPTCP, ICMP, raw.
SOCKET_TYPES = {1: (0, 6), 2: (0, 17)}
# Huge pages come from a host-wide pool that no memory limit counts (there is no hugetlb limit on every host).
_MAP_HUGETLB, _MFD_HUGETLB, _SHM_HUGETLB = 0x40000, 4, 0o4000

# ioctl requests: terminals (0x54..) but three, sockets' read-outs (0x89..), and the file ones that tools use.
# asm-generic/ioctls.h: TIOCSTI types into the terminal's reader, TIOCLINUX pastes, TIOCSETD autoloads line disciplines.
TERMINAL, TERMINAL_REFUSED = 0x5400, (0x12, 0x1C, 0x23)
SOCKET_IOCTLS = 0x8900
IOCTLS = (
    *(
        0x80045430,
        0x40045431,
        0x802C542A,
        0x402C542B,
        0x402C542C,
        0x402C542D,
    ),  # TIOCGPTN, TIOCSPTLCK, TCGETS2, TCSETS2..
    *(0x40049409, 0x4020940D, 0xC020660B, 0x80086601),  # FICLONE, FICLONERANGE, FS_IOC_FIEMAP, FS_IOC_GETFLAGS
)
# linux/prctl.h: below 128 all but PR_SET_MM, PR_SET_SPECULATION_CTRL, PR_SET_IO_FLUSHER; PR_SET_VMA, PR_SET_PTRACER.
PRCTLS_REFUSED = (35, 53, 57)
PRCTLS = (0x53564D41, 0x59616D61)
# asm/prctl.h: ARCH_SET_GS SET_FS GET_FS GET_GS, ARCH_CET_STATUS, ARCH_SHSTK_ENABLE..STATUS.
ARCH_PRCTLS = (0x1001, 0x1002, 0x1003, 0x1004, 0x3001, 0x5001, 0x5002, 0x5003, 0x5005)
# level: (options below 2^bits are allowed, but these). SOL_SOCKET: SO_ATTACH_FILTER, SO_ATTACH_BPF,
# SO_ATTACH_REUSEPORT_CBPF and _EBPF. IPPROTO_IP, IPPROTO_IPV6: XFRM_POLICY; multicast routing (MRT_*) begins at 200.
# IPPROTO_TCP: TCP_ULP (kTLS, espintcp). IPPROTO_UDP: UDP_ENCAP (100) and above are out of range.
SOCKET_OPTIONS = {1: (7, (26, 50, 51, 52)), 0: (6, (17,)), 41: (7, (35,)), 6: (6, (31,)), 17: (2, ())}
_SECCOMP_NEW_LISTENER = 8


def equals(index: int, value: int) -> Arg:
    return Arg(index, _LOW_WORD, value & _LOW_WORD)


def clear(index: int, bits: int) -> Arg:
    """None of ``bits`` is set."""
    return Arg(index, bits, 0)


def all_but(index: int, values: Iterable[int], *, bits: int = 32, above: int = 0) -> tuple[Arg, ...]:
    """Conditions of which exactly one holds for each ``bits``-wide number that is not in ``values``; else none holds.

    ``above``: what the bits above those must be.

    Walks the bits from the top: wherever the walk leaves the last path to a refused value, the whole subtree is
    one mask: ``bits`` conditions for one value, a few more for each further one.
    """
    conditions: list[Arg] = []

    def walk(bit: int, prefix: int, refused: list[int]) -> None:
        if not refused:
            conditions.append(Arg(index, _LOW_WORD & ~((1 << (bit + 1)) - 1), prefix))
        elif bit >= 0:
            one = 1 << bit
            walk(bit - 1, prefix, [v for v in refused if not v & one])
            walk(bit - 1, prefix | one, [v for v in refused if v & one])

    walk(bits - 1, above, sorted({(above | value) & _LOW_WORD for value in values}))
    return tuple(conditions)


def rules() -> tuple[Rule, ...]:
    """The whole policy, in the order in which it is written down."""
    allow: list[Rule] = [Rule(ALLOWED)]

    def partly(calls: str, *conditions: Sequence[Arg], refuse: int | None = None) -> None:
        allow.extend(Rule(tuple(calls.split()), tuple(args), refuse) for args in conditions)

    partly("clone", [clear(0, NAMESPACE_FLAGS)])
    partly("chmod fchmod", [clear(1, _SET_ID)])
    partly("fchmodat", [clear(2, _SET_ID)])
    partly("creat", [clear(1, _SET_ID)])
    # The mode register holds rubbish unless a file may be created.
    partly("open", [clear(1, _O_CREAT | _O_TMPFILE_BIT)], [clear(2, _SET_ID)])
    partly("openat", [clear(2, _O_CREAT | _O_TMPFILE_BIT)], [clear(3, _SET_ID)])
    for kind in (0, 0o100000, 0o010000, 0o140000):  # plain (twice), FIFO, socket
        partly("mknod", [Arg(1, _FILE_TYPE | _SET_ID, kind)])
        partly("mknodat", [Arg(2, _FILE_TYPE | _SET_ID, kind)])
    partly("socket", [equals(0, UNIX)], [equals(0, NETLINK), equals(2, 0)])
    # The type too: protocol 0 means SCTP with SOCK_SEQPACKET, DCCP with SOCK_DCCP, AF_PACKET with SOCK_PACKET.
    for family in (INET, INET6):
        for kind, protocols in SOCKET_TYPES.items():
            partly("socket", *([equals(0, family), Arg(1, 0xF, kind), equals(2, p)] for p in protocols))
    # What a program expects from a kernel that was built without the family.
    partly("socket", *([arg] for arg in all_but(0, FAMILIES, bits=6)), refuse=errno.EAFNOSUPPORT)
    partly("socketpair", [equals(0, UNIX)])
    for level, (bits, options) in SOCKET_OPTIONS.items():
        partly("setsockopt", *([equals(1, level), arg] for arg in all_but(2, options, bits=bits)))
    partly("ioctl", *([arg] for arg in all_but(1, TERMINAL_REFUSED, bits=8, above=TERMINAL)))
    partly("ioctl", [Arg(1, 0xFFFFFF00, SOCKET_IOCTLS)], *([equals(1, request)] for request in IOCTLS))
    partly("prctl", *([arg] for arg in all_but(0, PRCTLS_REFUSED, bits=7)), *([equals(0, option)] for option in PRCTLS))
    partly("arch_prctl", *([equals(0, code)] for code in ARCH_PRCTLS))
    partly("mmap", [clear(3, _MAP_HUGETLB)])
    partly("memfd_create", [clear(1, _MFD_HUGETLB)])
    partly("shmget", [clear(2, _SHM_HUGETLB)])
    partly("personality", [equals(0, 0)], [equals(0, 0xFFFFFFFF)])
    partly("seccomp", [clear(1, _SECCOMP_NEW_LISTENER)])
    allow.append(Rule(ABSENT, refuse=errno.ENOSYS))
    # sync(2) flushes every file system of the host: a stall for all. It has no way to fail, so it does nothing.
    allow.append(Rule(("sync",), refuse=0))
    return tuple(allow)


def verdict(call: str, arguments: Sequence[int] = ()) -> int | None:
    """What the policy does to a call of x86-64: the errno with which it is refused, or None when it is allowed.

    Where a call is partly allowed by values, any rule whose conditions all hold decides; they never contradict.
    """
    for rule in _rules_of().get(call, ()):
        if all(((arguments[a.position] if a.position < len(arguments) else 0) & a.mask) == a.value for a in rule.args):
            return rule.refuse
    return errno.EPERM


@cache
def _rules_of() -> dict[str, tuple[Rule, ...]]:
    found: dict[str, list[Rule]] = {}
    for rule in rules():
        for call in rule.calls:
            found.setdefault(call, []).append(rule)
    return {call: tuple(mine) for call, mine in found.items()}


def document() -> dict[str, object]:
    """The policy as the seccomp object of an OCI configuration, which is also Docker's profile format."""
    return {
        "defaultAction": "SCMP_ACT_ERRNO",  # EPERM
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [_entry(rule) for rule in rules()],
    }


def _entry(rule: Rule) -> dict[str, object]:
    entry: dict[str, object] = {"names": list(rule.calls), "action": "SCMP_ACT_ALLOW"}
    if rule.refuse is not None:
        entry |= {"action": "SCMP_ACT_ERRNO", "errnoRet": rule.refuse}
    if rule.args:
        # MASKED_EQ: "value" is the mask and "valueTwo" the datum (libseccomp's SCMP_A*_MASKED_EQ).
        entry["args"] = [
            {"index": arg.position, "value": arg.mask, "valueTwo": arg.value, "op": "SCMP_CMP_MASKED_EQ"}
            for arg in rule.args
        ]
    return entry
