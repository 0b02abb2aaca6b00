"""``sandbox firewall``."""

from __future__ import annotations

import json
import os

import click

from sandbox.cli.main import Context, say
from sandbox.errors import NotFound, UsageError

_HELP = {"help_option_names": ["-h", "--help"]}


@click.group("firewall", context_settings=_HELP)
def command() -> None:
    """Explain the network wall, say what it denied, change it, remove it."""
    if os.geteuid() != 0:
        raise UsageError("sandbox firewall needs root: it reads the kernel's rules.", hint="sudo sandbox firewall ...")


@command.command("show", context_settings=_HELP)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.option("--raw", is_flag=True, help="The rules' own text as well.")
@click.pass_obj
def show_command(context: Context, *, as_json: bool, raw: bool) -> None:
    """Explain the live rules in words; exit code 1 when they are not as they were made."""
    from sandbox.firewall import explain

    found = explain.document(context.config)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        for line in explain.words(found):
            click.echo(line)
        if raw and found["standing"]:
            for place, text in found["text"].items():
                click.echo(f"\n# in the {place}")
                click.echo(text)
        elif found["standing"]:
            click.echo("\n--raw shows the rules themselves.")
    if found["faults"]:
        raise SystemExit(1)


@command.command("denied", context_settings=_HELP)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.argument("dyno", required=False)
@click.pass_obj
def denied_command(context: Context, dyno: str | None, *, as_json: bool) -> None:
    """Say what was denied, from the kernel's counters: destinations of the last 15 minutes, and totals."""
    from sandbox.firewall import denied

    denials, totals = denied.read(context.config)
    if dyno is not None:
        denials = [item for item in denials if dyno in (item.dyno, item.id)]
        totals = [item for item in totals if dyno in (item.dyno, item.id)]
    if as_json:
        document = {"denied": [d._asdict() for d in denials], "totals": [t._asdict() for t in totals]}
        click.echo(json.dumps(document, indent=2))
        return
    if not denials and not totals:
        click.echo("Nothing was denied.")
        return
    click.echo(f"{'DYNO':<14} {'PACKETS':>8}  DENIED")
    for item in denials:
        where = item.address if item.port is None else f"{item.address}:{item.port}"
        arrow = "from" if item.direction == "in" else "to"
        click.echo(f"{item.dyno or item.id:<14} {item.packets:>8}  {item.protocol} {arrow} {where} rule={item.rule}")
    click.echo("")
    for total in totals:
        click.echo(f"{total.dyno or total.id:<14} {total.packets:>8}  in all rule={total.rule}")


@command.command("set", context_settings=_HELP)
@click.argument("dyno")
@click.option("--egress", required=True, metavar="WHAT", help="public, none, or allow:LIST.")
@click.option("--smtp", is_flag=True, help="Let it reach port 25.")
@click.pass_obj
def set_command(context: Context, dyno: str, egress: str, *, smtp: bool) -> None:
    """Give a live dyno another egress. Its open flows are cut; those that the new one allows can come back."""
    from sandbox.firewall import admit, router
    from sandbox.firewall.layout import Layout
    from sandbox.supervisor.egress import wish

    found = [r for r in router.records(Layout(context.config)) if dyno in (r["name"], r["id"], r["address"])]
    if not found:
        raise NotFound(f"no dyno {dyno!r} has a network here.", hint="sandbox ps lists the dynos.")
    if len(found) > 1:
        ids = ", ".join(str(record["id"]) for record in found)
        raise UsageError(f"{len(found)} dynos are called {dyno!r}.", hint=f"name one by its id: {ids}")
    wanted = wish(context.config, egress, smtp=smtp)
    router.ensure(context.config, forwarding=wanted.mode.value != "none")
    admit.change(context.config, found[0], wanted)
    say(f"sandbox: {found[0]['name']} has egress {egress}; its flows were cut.")


@command.command("remove", context_settings=_HELP)
@click.pass_obj
def remove_command(context: Context) -> None:
    """Remove the router, the resolver and the host's rules of this instance; the host is as it was before.

    It goes by itself a minute after the last dyno has left. Refused while a dyno lives.
    """
    from sandbox.firewall import guard, router
    from sandbox.firewall.layout import Layout
    from sandbox.supervisor.reclaim import reclaim

    config = context.config
    config.make_folders()
    reclaim(config)
    layout = Layout(config)
    with router.locked(layout):
        live = [str(record["name"]) for record in router.records(layout)]
        if live:
            raise UsageError(f"dynos still use the network: {', '.join(live)}.", hint="stop them first.")
        guard.stop(layout)
        router.remove(layout)
    say("sandbox: the network wall is removed.")
