"""The live wall in words, from what the kernel says now and what was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sandbox.config import Config
from sandbox.firewall import router, ruleset
from sandbox.firewall.layout import MARK, RULE_PRIORITY, Layout
from sandbox.host.nft import Nft
from sandbox.policy import egress
from sandbox.policy.egress import RESOLVER


def document(config: Config) -> dict[str, Any]:
    """Everything that ``sandbox firewall show`` says, as JSON. ``standing`` is false when there is no router."""
    layout = Layout(config)
    if not router.standing(layout):
        return {"standing": False, "faults": [], "dynos": []}
    with router.locked(layout, shared=True):
        records = router.records(layout)
        forwarding = any(record["egress"]["mode"] != "none" for record in records)
        faults = router.faults(layout, forwarding=forwarding)
        denied = router.denied(layout)
        hosts = router.read_state(layout)["hosts"]
        with router.inside(layout):
            nft = Nft()
        host_nft = Nft()
        text = {
            "router": "\n".join(nft.text(what) for what in (f"table {ruleset.TABLE}", "table arp sandbox")),
            "host": host_nft.text(f"table inet {layout.host_table}") if "host table" not in faults else "",
        }
        nft.close()
        host_nft.close()
    return {
        "standing": True,
        "faults": faults,
        "guard": router.guarded(layout),
        "pool": str(layout.pool),
        "host_address": str(layout.host_address),
        "link": layout.host_link,
        "forwarding_devices": sorted(router.read_state(layout)["sysctls"]),
        "denied": [
            *({"range": address, "rule": "host"} for address in hosts),
            *({"range": egress.cidrs(item.first, item.last), "rule": item.reason.rule} for item in denied),
        ],
        "dynos": [
            {key: record[key] for key in ("name", "app", "id", "address", "port", "egress", "traffic", "link")}
            for record in records
        ],
        "text": text,
    }


def words(found: dict[str, Any]) -> Iterator[str]:
    """The document as lines for people."""
    if not found["standing"]:
        yield "There is no router: no dyno has needed a network, and nothing of ours is on this host."
        return
    if found["faults"]:
        yield f"NOT AS IT WAS MADE: {', '.join(found['faults'])}. The next command that starts a dyno repairs it."
    yield f"The router is a network namespace of its own, linked to this host by {found['link']}."
    yield f"Its guard {'lives' if found['guard'] else 'does not live: names do not resolve until the next start'}."
    yield ""
    yield "What every packet of a dyno has to pass, in this order:"
    yield "  1. it is IPv4, from the dyno's own address on the dyno's own link      else denied: ipv6, spoofed"
    yield "  2. it is within the dyno's bandwidth                                   else dropped: bandwidth"
    yield f"  3. an answer to {found['host_address']} (this host) from its $PORT passes"
    yield f"  4. a question to the resolver {RESOLVER}:53, 50 a second                else denied: dns, dns-rate"
    yield "  5. what the operator permitted and the app lists passes"
    yield "  6. it is not for anything local (the list below)                       else denied: by that name"
    yield "  7. it is TCP or UDP, and not to port 25 unless the app opted in         else denied: protocol, smtp"
    yield "  8. a new flow is what the app's egress allows                  else denied: not-listed, egress-none"
    yield "  9. a new flow is within the dyno's rate and number of flows            else denied: new-rate, connections"
    yield f" 10. only what passed carries mark {MARK:#x}, and only marked packets have a route"
    yield "Into a dyno: only this host, only to the $PORT of a web process."
    yield f"On the host, routing rule {RULE_PRIORITY} leads its own packets to {found['pool']}; no others get there."
    if found["forwarding_devices"]:
        devices = ", ".join(found["forwarding_devices"])
        yield f"Forwarding was switched on for {devices}; it goes back when the router goes."
    yield ""
    yield "Always denied:"
    for item in found["denied"]:
        yield f"  {item['range']:<34} {item['rule']}"
    yield ""
    yield f"Admitted dynos: {len(found['dynos'])}"
    for dyno in found["dynos"]:
        wish, traffic = dyno["egress"], dyno["traffic"]
        listed = [*wish["networks"], *wish["names"]]
        reach = wish["mode"] + (f" ({', '.join(listed)})" if listed else "") + (", smtp" if wish["smtp"] else "")
        inbound = f"host may ask port {dyno['port']}" if dyno["port"] else "nobody may ask it"
        yield f"  {dyno['name']:<14} {dyno['address']:<15} egress {reach}; {inbound};"
        speed = traffic["bytes_per_s"] * 8 // 1_000_000
        flows = f"{traffic['flows']} flows, {traffic['flows_per_s']} new a second"
        yield f"  {'':<14} at most {flows}, {speed} Mbit/s each way"
