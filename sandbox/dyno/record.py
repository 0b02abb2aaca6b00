"""What was promised to one dyno, written into its folder when it starts, for whoever examines it while it lives.

The file is root's own. It says what was declared; nothing in it is evidence. Evidence is read from the kernel.
"""

from __future__ import annotations

import json
import os
from ipaddress import IPv4Address
from typing import Any, NamedTuple

from sandbox.config import Config
from sandbox.errors import HostError, NotFound
from sandbox.firewall.layout import Place
from sandbox.host import journal, observe
from sandbox.policy import policy as policies
from sandbox.policy.clauses import Clause
from sandbox.policy.egress import Egress, Mode, Network
from sandbox.policy.policy import Policy, Rlimit
from sandbox.policy.sizes import Traffic
from sandbox.policy.spec import ContainerSpec, SlotPaths

_FILE = "record.json"


class Record(NamedTuple):
    """``pid``, ``start_ticks``: the dyno's init, pinned against a reused number. ``env_names``: of its config vars.

    ``descriptors``: what each process held at the gate, as "pid fd: what". ``mounts``: its mount table there, by the
    kernel's own numbers (``observe.identity``): the app cannot change it, so it is the same for as long as it lives.
    """

    name: str
    app: str
    engine: str
    runtime: str
    user_namespace: bool
    spec: ContainerSpec
    place: Place | None
    port: int
    pid: int
    start_ticks: int
    started: float
    boot_id: str
    stack_digest: str
    stack_manifest: str
    slug_digest: str
    env_names: tuple[str, ...]
    descriptors: tuple[str, ...]
    mounts: tuple[str, ...]


def write(folder: str, record: Record) -> None:
    spec, place = record.spec, record.place
    document = {
        **record._asdict(),
        "version": policies.VERSION,
        "spec": {**spec._asdict(), "policy": policy_document(spec.policy), "paths": spec.paths._asdict()},
        "place": None if place is None else [place.number, str(place.gateway), str(place.address)],
    }
    draft = f"{folder}/.{_FILE}"
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        # dumps, not dump: only the former uses the C encoder.
        file.write(json.dumps(document))
    os.rename(draft, f"{folder}/{_FILE}")


def read(config: Config, container_id: str) -> Record:
    """The record of a live dyno. NotFound when it has none (any more), HostError when another version wrote it."""
    path = f"{config.dynos_dir}/{container_id}/{_FILE}"
    try:
        with open(path, encoding="utf-8") as file:
            values: dict[str, Any] = json.load(file)
        if values.pop("version") != policies.VERSION:
            raise HostError(
                f"{container_id} was started by another version of sandbox, with another policy.",
                hint="restart it, then ask again.",
            )
        spec, place = values["spec"], values["place"]
        spec |= {
            "policy": _policy(spec["policy"]),
            "paths": SlotPaths(**spec["paths"]),
            "command": tuple(spec["command"]),
        }
        values["spec"] = ContainerSpec(**spec)
        values["place"] = None if place is None else Place(place[0], IPv4Address(place[1]), IPv4Address(place[2]))
        values |= {key: tuple(values[key]) for key in ("env_names", "descriptors", "mounts")}
        return Record(**values)
    except FileNotFoundError as error:
        raise NotFound(f"{container_id} has no record: it has ended, or has not started yet.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise HostError(f"{path} is damaged: {error}.", hint="restart the dyno, then ask again.") from error


def find(config: Config, wanted: str) -> Record:
    """The live dyno of that name or id. NotFound says which there are."""
    names: list[str] = []
    matches = []
    for path, header in journal.headers(config.journal_dir):
        if not journal.is_live(path):
            continue
        names.append(str(header.get("name")))
        if wanted in (header.get("name"), header.get("id")):
            matches.append(str(header["id"]))
    if len(matches) > 1:
        raise NotFound(f"{len(matches)} dynos are called {wanted!r}.", hint="name one by its id: " + ", ".join(matches))
    if not matches:
        known = ", ".join(sorted(names)) if names else "none lives here"
        raise NotFound(f"there is no dyno {wanted!r}.", hint=f"dynos: {known}; sandbox ps lists them.")
    return read(config, matches[0])


def live(config: Config) -> list[Record]:
    """Every dyno with a record whose supervisor lives; one that starts or ends meanwhile has none. Raises HostError."""
    found = []
    for path, header in journal.headers(config.journal_dir):
        if journal.is_live(path):
            try:
                found.append(read(config, str(header["id"])))
            except NotFound:
                continue
    return found


def still(record: Record) -> bool:
    """Whether the record's init is the process that has its number now."""
    try:
        return observe.start_ticks(record.pid) == record.start_ticks
    except HostError:
        return False


def policy_document(policy: Policy) -> dict[str, Any]:
    """The policy as JSON, complete: ``_policy`` makes the same value of it."""
    egress = policy.egress
    return {
        **policy._asdict(),
        "rlimits": [list(limit) for limit in policy.rlimits],
        "traffic": list(policy.traffic),
        "waived": sorted(clause.value for clause in policy.waived),
        "egress": {
            "mode": egress.mode.value,
            "networks": [list(network) for network in egress.networks],
            "names": list(egress.names),
            "smtp": egress.smtp,
            "permitted": [list(network) for network in egress.permitted],
            "pinned": [list(pair) for pair in egress.pinned],
        },
    }


def _policy(values: dict[str, Any]) -> Policy:
    egress = values["egress"]
    return Policy(
        **{
            **values,
            "rlimits": tuple(Rlimit(*limit) for limit in values["rlimits"]),
            "traffic": Traffic(*values["traffic"]),
            "waived": frozenset(Clause(name) for name in values["waived"]),
            "egress": Egress(
                Mode(egress["mode"]),
                _networks(egress["networks"]),
                tuple(egress["names"]),
                egress["smtp"],
                _networks(egress["permitted"]),
                tuple((pair[0], pair[1]) for pair in egress["pinned"]),
            ),
        }
    )


def _networks(rows: list[Any]) -> tuple[Network, ...]:
    return tuple(Network(first, last, tuple((a, b) for a, b in ports)) for first, last, ports in rows)
