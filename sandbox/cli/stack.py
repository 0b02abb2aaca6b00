"""``sandbox stack``: build and check the stack image."""

from __future__ import annotations

import json
import os

import click

from sandbox.cli.main import Context
from sandbox.cli.progress import Progress
from sandbox.errors import UsageError
from sandbox.host import stack as stacks
from sandbox.host.stack import Variant


@click.group("stack", invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_context
def command(ctx: click.Context, *, as_json: bool) -> None:
    """Build and check the stack image; alone: show what is built."""
    if ctx.invoked_subcommand is not None:
        return
    config = ctx.obj.config
    rows = [stacks.find(config, variant) for variant in Variant if stacks.is_current(config, variant)]
    if as_json:
        click.echo(
            json.dumps([{"variant": row.variant.value, "digest": row.digest, "image": row.image} for row in rows])
        )
        return
    for row in rows:
        click.echo(f"{row.variant.value:<8} SHA256:{row.digest}  {os.path.getsize(row.image) >> 20} MiB  {row.image}")
    if len(rows) < len(Variant):
        click.echo("Not every variant of today's recipe is built. Hint: sandbox stack build", err=True)


@command.command("build")
@click.option("--force", is_flag=True, help="Build anew, even if today's recipe is built.")
@click.option("--variant", type=click.Choice([v.value for v in Variant]), help="Only this one.")
@click.pass_obj
def build(context: Context, variant: str | None, *, force: bool) -> None:
    """Build the stack image from this host's own package mirror."""
    if os.geteuid() != 0:
        raise UsageError("sandbox stack build needs root: it runs mmdebstrap.", hint="sudo sandbox stack build")
    context.config.make_folders()
    progress = Progress()
    for wanted in Variant:
        if variant not in (None, wanted.value):
            continue
        if not force and stacks.is_current(context.config, wanted):
            stack = stacks.find(context.config, wanted)
            click.echo(f"{wanted.value} stack SHA256:{stack.digest} is built already.")
            continue
        try:
            stack = stacks.build(context.config, wanted, progress=progress)
        finally:
            progress.close()
        click.echo(f"{wanted.value} stack SHA256:{stack.digest}")
