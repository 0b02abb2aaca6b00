"""The AppArmor profile of a dyno: a second wall that does not know of mounts, namespaces or system-call numbers.

It repeats promises that other clauses keep, by other code of the kernel: no capability, no mount, no raw sockets, no
way to another profile, and no write to the kernel's switches even if a mask over /proc is missing.
"""

from __future__ import annotations

import hashlib

# What a program needs is allowed as a whole and kernel switches are denied by path: a deny wins, whatever the order.
# Netlink as a whole: the C library asks for addresses on a raw netlink socket. Named in neither: capability, raw and
# packet sockets, mount, umount, pivot_root, change_profile, and so denied. A peer is named twice: where the runtime has
# a profile of its own and no-new-privileges is set, the kernel stacks ours on it, and the label reads crun//&ours.
_BODY = """
  file,
  network inet stream,
  network inet dgram,
  network inet6 stream,
  network inet6 dgram,
  network unix,
  network netlink,
  unix,
  signal (receive),
  signal (send) peer=@{profile_name},
  signal (send) peer=*//&@{profile_name},
  ptrace (read, readby) peer=@{profile_name},
  ptrace (read, readby) peer=*//&@{profile_name},
  deny @{PROC}/sys/** wkl,
  deny @{PROC}/sysrq-trigger rwkl,
  deny @{PROC}/kcore rwkl,
  deny @{PROC}/mem rwkl,
  deny /sys/** wkl,
"""


def name() -> str:
    """Its name in the kernel. The digest is part of it: another release has another profile."""
    return f"sandbox-dyno-{hashlib.sha256(_BODY.encode()).hexdigest()[:12]}"


def profile() -> str:
    """The text for apparmor_parser(8)."""
    flags = "attach_disconnected,mediate_deleted"
    body = _BODY.replace("@{profile_name}", name()).replace("@{PROC}", "/proc")
    return f"abi <abi/3.0>,\nprofile {name()} flags=({flags}) {{{body}}}\n"
