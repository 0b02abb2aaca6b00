"""A hostile program calls the kernel directly. Each refusal is compared with the same call without the filter."""

from __future__ import annotations

import pytest

# name: (number, arguments, the exact refusal). Numbers are x86-64. Strings are passed as pointers.
CALLS = {
    "unshare(NEWUSER)": (272, [0x10000000], "EPERM"),
    "unshare(NEWNS)": (272, [0x20000], "EPERM"),
    "setns": (308, [-1, 0], "EPERM"),
    "mount": (165, ["none", "/tmp", "tmpfs", 0, 0], "EPERM"),
    "umount2": (166, ["/tmp", 0], "EPERM"),
    "pivot_root": (155, ["/tmp", "/tmp"], "EPERM"),
    "chroot": (161, ["/tmp"], "EPERM"),
    "open_tree": (428, [-100, "/", 0], "EPERM"),
    "fsopen": (430, ["tmpfs", 0], "EPERM"),
    "ptrace(TRACEME)": (101, [0, 0, 0, 0], "EPERM"),
    "process_vm_readv": (310, [0, 0, 0, 0, 0, 0], "EPERM"),
    "kcmp": (312, [1, 1, 0, 0, 0], "EPERM"),
    "io_uring_setup": (425, [1, 0], "ENOSYS"),
    "bpf": (321, [0, 0, 0], "EPERM"),
    "perf_event_open": (298, [0, 0, -1, -1, 0], "EPERM"),
    "keyctl": (250, [0, -3, 1], "EPERM"),
    "add_key": (248, ["user", "x", "y", 1, -2], "EPERM"),
    "request_key": (249, ["user", "x", 0, 0], "EPERM"),
    "userfaultfd": (323, [1], "EPERM"),
    "memfd_secret": (447, [0], "ENOSYS"),
    "vmsplice": (278, [-1, 0, 0, 0], "EPERM"),
    "name_to_handle_at": (303, [-100, "/", 0, 0, 0], "EPERM"),
    "open_by_handle_at": (304, [-1, 0, 0], "EPERM"),
    "modify_ldt": (154, [0, 0, 0], "EPERM"),
    "personality(ADDR_NO_RANDOMIZE)": (135, [0x40000], "EPERM"),
    "personality(high bits)": (135, [(1 << 32) | 0x40000], "EPERM"),
    "io_setup": (206, [1, 0], "EPERM"),
    "init_module": (175, [0, 0, 0], "EPERM"),
    "kexec_load": (246, [0, 0, 0, 0], "EPERM"),
    "reboot(bad magic)": (169, [0, 0, 0, 0], "EPERM"),
    "swapon": (167, ["/x", 0], "EPERM"),
    "sethostname": (170, ["x", 1], "EPERM"),
    "fanotify_init": (300, [0, 0], "EPERM"),
    "clone(NEWUSER)": (56, [0x10000000 | 17, 0, 0, 0, 0], "EPERM"),
    "clone3": (435, [0, 0], "ENOSYS"),
    "openat2": (437, [-100, "/", 0, 0], "ENOSYS"),
    "call 600": (600, [], "ENOSYS"),
    "socket(VSOCK)": (41, [40, 1, 0], "EAFNOSUPPORT"),
    "socket(high bit | VSOCK)": (41, [(1 << 32) | 40, 1, 0], "EAFNOSUPPORT"),
    "socket(ALG)": (41, [38, 5, 0], "EAFNOSUPPORT"),
    "socket(PACKET)": (41, [17, 3, 0], "EAFNOSUPPORT"),
    "socket(NETLINK, XFRM)": (41, [16, 3, 6], "EPERM"),
    "socket(NETLINK, NETFILTER)": (41, [16, 3, 12], "EPERM"),
    "socket(NETLINK, high bit | AUDIT)": (41, [16, 3, (1 << 32) | 9], "EPERM"),
    "socket(INET, SCTP)": (41, [2, 1, 132], "EPERM"),
    "socket(INET, MPTCP)": (41, [2, 1, 262], "EPERM"),
    "socketpair(NETLINK)": (53, [16, 3, 0, 0], "EPERM"),
    "setsockopt(TCP_ULP)": (54, ["tcp", 6, 31, "tls", 4], "EPERM"),
    "setsockopt(ATTACH_FILTER)": (54, ["tcp", 1, 26, 0, 0], "EPERM"),
    "setsockopt(high bit | ATTACH_BPF)": (54, ["tcp", 1, (1 << 32) | 50, 0, 0], "EPERM"),
    "ioctl(TIOCSTI)": (16, [0, 0x5412, "x"], "EPERM"),
    "ioctl(high bit | TIOCSTI)": (16, [0, (1 << 32) | 0x5412, "x"], "EPERM"),
    "ioctl(TIOCLINUX)": (16, [0, 0x541C, "x"], "EPERM"),
    "ioctl(TIOCSETD)": (16, [0, 0x5423, "x"], "EPERM"),
    "prctl(SET_MM)": (157, [35, 0, 0, 0, 0], "EPERM"),
    "chmod(04755)": (90, ["/tmp/f", 0o4755], "EPERM"),
    "fchmodat(02755)": (268, [-100, "/tmp/f", 0o2755], "EPERM"),
    "open(O_CREAT, 04755)": (2, ["/tmp/new", 0o101, 0o4755], "EPERM"),
    "mknod(char)": (133, ["/tmp/null", 0o020666, 0x103], "EPERM"),
    "mknodat(block)": (259, [-100, "/tmp/disk", 0o060666, 0x800], "EPERM"),
}

# Refused by a second layer too (no capability, a sysctl, no CONFIG), or absent here: without the filter the answer is
# the same errno on this kernel, so these prove the filter only through its bytes, not by a flip.
SECOND_LAYER = {
    "mount", "umount2", "pivot_root", "chroot", "open_tree", "fsopen", "bpf", "init_module", "kexec_load",
    "reboot(bad magic)", "swapon", "sethostname", "fanotify_init", "setns", "unshare(NEWNS)", "call 600",
    "socket(ALG)", "mknod(char)", "mknodat(block)", "memfd_secret", "perf_event_open", "userfaultfd",
    "ioctl(TIOCLINUX)", "prctl(SET_MM)", "open_by_handle_at", "socketpair(NETLINK)",
}  # fmt: skip

PROGRAM = """
import ctypes, errno, json, os, socket
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
open("/tmp/f", "w").write("positive control: writing works")
tcp = socket.socket()
out = {}
for name, (number, arguments, _) in CALLS.items():
    values = []
    for a in arguments:
        if a == "tcp": values.append(ctypes.c_long(tcp.fileno()))
        elif isinstance(a, str): values.append(ctypes.c_char_p(a.encode()))
        else: values.append(ctypes.c_ulong(a & 0xFFFFFFFFFFFFFFFF))
    # Each in a child of its own: without the filter some of them change the caller for good.
    pid = os.fork()
    if pid == 0:
        r = libc.syscall(ctypes.c_long(number), *values)
        os._exit(0 if r >= 0 else ctypes.get_errno())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    out[name] = "ok" if code == 0 else errno.errorcode.get(code, code)
print(json.dumps(out))
"""


def program() -> str:
    return f"CALLS = {CALLS!r}\n{PROGRAM}"


def test_refused_calls_answer_with_the_policys_errno(sandbox, engine):
    results = sandbox.attack(engine, program())
    assert results == {name: refusal for name, (_, _, refusal) in CALLS.items()}


def test_control_without_the_filter_the_calls_reach_the_kernel(sandbox, engine):
    results = sandbox.attack(engine, program(), "--waive", "seccomp", mutant="no-seccomp")
    reached = {name for name, (_, _, refusal) in CALLS.items() if results[name] != refusal}
    assert set(CALLS) - SECOND_LAYER <= reached, set(CALLS) - SECOND_LAYER - reached
    assert len(reached) >= 25


FOREIGN = """
import ctypes, json, mmap, os, signal
def killed(code):
    pid = os.fork()
    if pid == 0:
        memory = mmap.mmap(-1, 4096, prot=7)
        memory.write(code)
        ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "ran"
print(json.dumps({
    "i386 getpid": killed(bytes.fromhex("b814000000cd80c3")),          # mov eax,20; int 0x80; ret
    "i386 socketcall": killed(bytes.fromhex("b866000000cd80c3")),      # mov eax,102; int 0x80; ret
    "x32 getpid": killed(bytes.fromhex("b827000040" + "0f05c3")),      # mov eax,0x40000027; syscall; ret
}))
"""


def test_foreign_abis_are_killed(sandbox, engine):
    results = sandbox.attack(engine, FOREIGN)
    assert results["i386 getpid"] == results["i386 socketcall"] == "SIGSYS"
    # This kernel has no x32; the filter (or the runtime's own ENOSYS stub in front of it) answers first.
    assert results["x32 getpid"] in ("SIGSYS", "ran")


def test_control_without_the_filter_the_32_bit_abi_works(sandbox, engine):
    results = sandbox.attack(engine, FOREIGN, "--waive", "seccomp", mutant="no-seccomp")
    assert results["i386 getpid"] == "ran"


@pytest.mark.parametrize("what", ["threads", "sockets", "subprocess", "signals", "mmap"])
def test_ordinary_things_work(sandbox, engine, what):
    """A wall that refuses everything would pass every other test of this file."""
    code = {
        "threads": "import threading\nt=[threading.Thread(target=lambda: None) for _ in range(20)]\n[x.start() for x in t]\n[x.join() for x in t]",
        "sockets": "import socket\ns=socket.socket(); s.bind(('127.0.0.1',0)); s.listen(); c=socket.create_connection(s.getsockname()); c.setsockopt(6,1,1); socket.socket(socket.AF_INET6)\nsocket.getaddrinfo('localhost',80)",
        "subprocess": "import subprocess\nassert subprocess.check_output(['sh','-c','echo hi | tr a-z A-Z'])==b'HI\\n'",
        "signals": "import signal,os\nsignal.signal(10,lambda *_:None); os.kill(os.getpid(),10)",
        "mmap": "import mmap,ctypes\nmmap.mmap(-1,1<<20); open('/dev/shm/x','w').write('x'); open('/app/x','w').write('x'); open('/var/tmp/x','w').write('x')",
    }[what]
    assert sandbox.attack(engine, f"{code}\nprint('1')") == 1
