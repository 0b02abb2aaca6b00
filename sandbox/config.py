"""Where an instance lives and what its host configuration says.

Precedence: flag, then environment, then ``/etc/sandbox/config.toml``, then the default. Unknown keys are errors.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from sandbox.errors import UsageError
from sandbox.names import host_id
from sandbox.units import show

CONFIG_FILE = "/etc/sandbox/config.toml"
STATE_DIR = "/var/lib/sandbox"
RUN_DIR = "/run/sandbox"
DOCKER_HOST = "unix:///var/run/docker.sock"
# systemd's uid table (UIDS-GIDS) leaves 0x70000000..0x7FFFFFFF unused; Docker accepts user ids below 2^31.
UID_BASE = 0x70000000
UID_SLOTS = 4096

# Docker's own address pools begin at 172.17.0.0; Heroku's dynos have a /30 of 172.16.0.0/12.
POOL = "172.16.0.0/16"

_KEYS = {
    "state_dir": str,
    "run_dir": str,
    "docker_host": str,
    "uid_base": int,
    "uid_slots": int,
    "pool": str,
    "deny": list,
    "permit": list,
    "linger_s": int,
}


class Config(NamedTuple):
    """One instance: all its state below ``state_dir``, all that a reboot may lose below ``run_dir``."""

    state_dir: str
    run_dir: str
    docker_host: str = DOCKER_HOST
    uid_base: int = UID_BASE
    uid_slots: int = UID_SLOTS
    pool: str = POOL  # the dynos' addresses
    deny: tuple[str, ...] = ()  # networks that no dyno may reach, beyond those that none ever may
    linger_s: int = 60  # how long the router outlives the last dyno
    permit: tuple[str, ...] = ()  # local networks that an app's allow list may name

    @property
    def host(self) -> str:
        return host_id(self.state_dir)

    @property
    def journal_dir(self) -> str:
        return f"{self.state_dir}/journal"

    @property
    def disks_dir(self) -> str:
        return f"{self.state_dir}/disks"

    @property
    def slugs_dir(self) -> str:
        return f"{self.state_dir}/slugs"

    @property
    def stack_dir(self) -> str:
        return f"{self.state_dir}/stack"

    @property
    def layers_dir(self) -> str:
        return f"{self.run_dir}/layers"

    @property
    def dynos_dir(self) -> str:
        return f"{self.run_dir}/dynos"

    @property
    def runtime_dir(self) -> str:
        """The OCI runtime's own state."""
        return f"{self.run_dir}/runtime"

    def make_folders(self) -> None:
        """Creates what is missing. 0711: a dyno's ids must be able to pass through, nobody may list."""
        for path in (self.state_dir, self.run_dir, self.dynos_dir, self.layers_dir, self.slugs_dir):
            os.makedirs(path, mode=0o711, exist_ok=True)
        for path in (self.journal_dir, self.disks_dir, self.runtime_dir, self.stack_dir):
            os.makedirs(path, mode=0o700, exist_ok=True)


def load(
    *,
    state_dir: str | None = None,
    run_dir: str | None = None,
    docker_host: str | None = None,
    environ: dict[str, str] | None = None,
    file: str | None = None,
) -> Config:
    """The instance that flags, environment and host file describe."""
    env = os.environ if environ is None else environ
    file = file or env.get("SANDBOX_CONFIG") or CONFIG_FILE
    values = _host_file(file)
    chosen = {
        "state_dir": state_dir or env.get("SANDBOX_STATE_DIR") or values.get("state_dir", STATE_DIR),
        "run_dir": run_dir or env.get("SANDBOX_RUN_DIR") or values.get("run_dir", RUN_DIR),
    }
    for key, value in chosen.items():
        if not os.path.isabs(str(value)) or any(c in ',:\\"' or c.isspace() for c in str(value)):
            raise UsageError(
                f"{key} {show(str(value))} is not an absolute path free of , : \\ quotes and spaces.",
                hint=f"--{key.replace('_', '-')} /some/where",
            )
    docker = docker_host or env.get("SANDBOX_DOCKER_HOST") or values.get("docker_host", DOCKER_HOST)
    base, slots = values.get("uid_base", UID_BASE), values.get("uid_slots", UID_SLOTS)
    if not (isinstance(base, int) and isinstance(slots, int) and base >= 100_000 and slots >= 1):
        raise UsageError(f"{file}: uid_base must be at least 100000 and uid_slots at least 1.")
    if base % 65536 or base + slots * 65536 > 2**31:
        raise UsageError(f"{file}: uid_base must be a multiple of 65536, and the last id below 2147483648.")
    # One spelling each: mounts and journals are found by comparing paths.
    state, run = (os.path.realpath(str(chosen[key])) for key in ("state_dir", "run_dir"))
    pool = _pool(str(env.get("SANDBOX_POOL") or values.get("pool", POOL)), file)
    lists = {key: tuple(str(item) for item in _list(values, key, file)) for key in ("deny", "permit")}
    return Config(state, run, str(docker), base, slots, pool, linger_s=int(values.get("linger_s", 60)), **lists)


def _list(values: dict[str, Any], key: str, file: str) -> list[str]:
    items = values.get(key, [])
    if not all(isinstance(item, str) for item in items):
        raise UsageError(f"{file}: {key} must be a list of networks as text.", hint=f'{key} = ["10.1.2.0/24:5432"]')
    return list(items)


def _pool(text: str, file: str) -> str:
    """The pool of addresses: private, and large enough for the uplink, the resolver's neighbourhood and a dyno."""
    import ipaddress  # only a pool that is not the default one has to be checked

    if text == POOL:
        return text
    try:
        pool = ipaddress.IPv4Network(text)
    except ValueError as error:
        raise UsageError(f"{file}: the pool {show(text)} is not an IPv4 network: {show(str(error))}.") from error
    private = (ipaddress.IPv4Network(net) for net in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"))
    if not any(pool.subnet_of(net) for net in private) or not 8 <= pool.prefixlen <= 29:
        raise UsageError(
            f"{file}: the pool {pool} must be a private network of /8 to /29.", hint='pool = "172.16.0.0/16"'
        )
    return str(pool)


def _host_file(path: str) -> dict[str, Any]:
    if not os.path.exists(path):
        return {}
    import tomllib  # only hosts with a configuration file pay for the parser

    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: {error}") from error
    for key, value in values.items():
        kind = _KEYS.get(key)
        if kind is None:
            raise UsageError(f"{path}: unknown key {show(key)}.", hint="keys: " + ", ".join(_KEYS))
        if type(value) is not kind:
            raise UsageError(f"{path}: {key} must be of type {kind.__name__}.")
    return values
