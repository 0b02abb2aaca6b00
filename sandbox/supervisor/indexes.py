"""Where packages come from: the index of the build tools or of the operator's environment, as addresses."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from sandbox.app.detect import Kind
from sandbox.config import Config
from sandbox.errors import BuildError
from sandbox.host.netlink import Netlink
from sandbox.host.stack import Stack
from sandbox.policy import egress as policy
from sandbox.policy.egress import Egress, Mode, Network, Reason
from sandbox.units import show

# The operator may run an index at such an address. Never at the host itself, a metadata service, or what the
# operator denies.
_MAY_BE_LOCAL = (Reason.PRIVATE, Reason.SHARED, Reason.RESERVED)
_VARIABLES = {
    Kind.PYTHON: ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"),
    Kind.NODE: ("npm_config_registry",),
}
_PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
_PORTS = {"http": 80, "https": 443}


def addresses(kind: Kind, stack: Stack, env: dict[str, str]) -> list[tuple[str, int]]:
    """Host and port of everything that the fetch step has to reach. ``env``: what the operator's environment says."""
    urls: list[str] = []
    own = " ".join(env.get(name, "") for name in _VARIABLES.get(kind, ())).split()
    # An index of the operator's own replaces the tool's, except where it only adds to it.
    if not any(env.get(name) for name in _VARIABLES.get(kind, ())[:1]):
        urls += dict(stack.indexes).get(kind.value, "").split()
    urls += own + [env[name] for name in _PROXIES if env.get(name)]
    found = []
    for url in urls:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port or _PORTS.get(parts.scheme, 0)
        except ValueError:
            port = 0
        if parts.hostname and port:
            found.append((parts.hostname, port))
    return list(dict.fromkeys(found))


def egress(config: Config, wanted: list[tuple[str, int]]) -> Egress:
    """The internet, and those of the hosts that this host's resolver places at a local address.

    Raises BuildError for an index at an address that no dyno may reach.
    """
    deny = [policy.parse_network(text, where="deny") for text in config.deny]
    net = Netlink()
    hosts = [address for _, address in net.addresses() if not address.startswith("127.")]
    net.close()
    ranges = policy.denied_ranges(pool=config.pool, hosts=hosts, deny=deny)
    networks, pinned = [], []
    for host, port in wanted:
        try:
            answers = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)
        except OSError:
            continue  # pip or npm will say it, in its own words
        for address in sorted({str(answer[4][0]) for answer in answers}):
            reason = policy.reason_of(address, ranges)
            if reason is None:
                continue
            if reason not in _MAY_BE_LOCAL:
                raise BuildError(
                    f"the package index {show(host)} is at {address}, which no dyno may reach ({reason.rule}).",
                    hint="give the index an address of its own; loopback and the host itself are never reached.",
                )
            value = int.from_bytes(socket.inet_aton(address))
            networks.append(Network(value, value, ((port, port),)))
            pinned.append((host, address))
    return Egress(Mode.PUBLIC, permitted=policy.disjoint(networks), pinned=tuple(dict.fromkeys(pinned)))
