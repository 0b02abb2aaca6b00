"""What a dyno sees as its file system, mount by mount: one plan for every engine, and the list to verify against."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Source(Enum):
    """Where a mount comes from."""

    STACK = "stack"  # the read-only stack image
    PROC = "proc"
    DEV = "dev"  # a tmpfs with the six harmless devices
    DEVPTS = "devpts"
    SHM = "shm"
    APP = "app"  # overlay: the slug below, the dyno's disk image above
    DISK = "disk"  # a folder of the dyno's disk image
    FIXED = "fixed"  # a file or folder of the disk image that the dyno may only read


class Mount(NamedTuple):
    """One mount inside the dyno. ``path`` is relative to the source, where it is a folder of the disk image."""

    target: str
    source: Source
    path: str = ""
    read_only: bool = True
    exec: bool = False


# No sysfs: /sys is a folder of the disk image with the few files that runtimes read (cpu/online, the memory limit at
# its cgroup-v1 path). No mqueue file system either: mq_open works without it, and Docker would mount one otherwise.
PLAN = (
    Mount("/", Source.STACK, exec=True),
    Mount("/proc", Source.PROC, read_only=False),
    Mount("/dev", Source.DEV, read_only=False),
    Mount("/dev/pts", Source.DEVPTS, read_only=False),
    Mount("/dev/shm", Source.SHM, read_only=False),
    Mount("/dev/mqueue", Source.FIXED, "empty"),
    Mount("/sys", Source.FIXED, "sys"),
    Mount("/sys/fs/cgroup", Source.FIXED, "sys/fs/cgroup"),
    Mount("/run/gate", Source.FIXED, "gate"),
    Mount("/etc/passwd", Source.FIXED, "etc/passwd"),
    Mount("/etc/group", Source.FIXED, "etc/group"),
    Mount("/etc/hosts", Source.FIXED, "etc/hosts"),
    Mount("/etc/hostname", Source.FIXED, "etc/hostname"),
    Mount("/etc/resolv.conf", Source.FIXED, "etc/resolv.conf"),
    Mount("/app", Source.APP, read_only=False, exec=True),
    Mount("/tmp", Source.DISK, "tmp", read_only=False, exec=True),
    Mount("/var/tmp", Source.DISK, "vartmp", read_only=False, exec=True),
)

# Files read as empty (/dev/null bound over them), folders as an empty read-only tmpfs: kernel addresses, the host's
# hardware, its block devices and the neighbours' activity. What is absent from this kernel is skipped by the runtime.
MASKED = tuple(
    f"/proc/{name}"
    for name in """
    acpi asound bootconfig buddyinfo bus cgroups cmdline config.gz crypto diskstats dma driver dynamic_debug
    execdomains fb fs interrupts iomem ioports irq kallsyms kcore key-users keys kmsg kpagecgroup kpagecount
    kpageflags latency_stats locks mdstat misc modules mtrr pagetypeinfo partitions pressure sched_debug schedstat
    scsi slabinfo softirqs swaps timer_list timer_stats tty vmallocinfo zoneinfo
    """.split()
)
READ_ONLY = ("/proc/sys", "/proc/sysrq-trigger")

# Character devices: name, major, minor (Documentation/admin-guide/devices.txt). ptmx is a link to pts/ptmx.
MAX_TERMINALS = 64
DEVICES = (("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0))
