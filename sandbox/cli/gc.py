"""``sandbox gc``."""

from __future__ import annotations

import json

import click

from sandbox.cli.main import Context
from sandbox.supervisor.reclaim import reclaim, sweep


@click.command("gc", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def command(context: Context, *, as_json: bool) -> None:
    """Remove what crashed runs left behind, and say what.

    Living dynos and everything that is not this instance's are left alone.
    """
    from sandbox.report.twin import forsaken

    config = context.config
    config.make_folders()
    done, swept = reclaim(config), [*sweep(config), *forsaken(config)]
    if as_json:
        click.echo(
            json.dumps(
                {"reclaimed": [{"id": name, "undone": undone} for name, undone in done], "swept": swept}, indent=2
            )
        )
        return
    for name, undone in done:
        click.echo(f"{name}: removed {', '.join(undone) or 'its journal'}")
    for what in swept:
        click.echo(f"removed {what}, which no journal knew")
    if not done and not swept:
        click.echo("Nothing was left behind.")
