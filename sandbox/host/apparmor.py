"""Whether AppArmor is on, and our profile in the kernel."""

from __future__ import annotations

from sandbox import hostcmd
from sandbox.errors import HostError
from sandbox.policy import apparmor

_PROFILES = "/sys/kernel/security/apparmor/profiles"


def enabled() -> bool:
    """Whether this kernel labels processes by AppArmor."""
    try:
        with open("/sys/module/apparmor/parameters/enabled", encoding="ascii") as file:
            return file.read(1) == "Y"
    except FileNotFoundError:
        return False


def ensure() -> str:
    """The name of the dynos' profile, loaded and enforced; an empty name where AppArmor is off. Raises HostError."""
    if not enabled():
        return ""
    name = apparmor.name()
    if not loaded(name):
        parser = hostcmd.require("apparmor_parser", "apparmor")
        # No cache: what is loaded is what this text says. --replace: two dynos may load it at once.
        hostcmd.run([parser, "--replace", "--skip-cache", "--quiet"], stdin=apparmor.profile().encode("ascii"))
        if not loaded(name):
            raise HostError(f"AppArmor does not enforce the profile {name}.", hint="sandbox doctor")
    return name


def loaded(name: str) -> bool:
    """Whether the kernel has a profile of that name and enforces it."""
    try:
        with open(_PROFILES, encoding="utf-8") as file:
            return f"{name} (enforce)\n" in file
    except FileNotFoundError as error:
        raise HostError(
            "securityfs is not mounted: AppArmor cannot be asked.", hint="mount -t securityfs none /sys/kernel/security"
        ) from error
