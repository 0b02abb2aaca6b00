"""``sandbox ps``."""

from __future__ import annotations

import json
import time

import click

from sandbox import names
from sandbox.cli.main import Context
from sandbox.host import journal as journals
from sandbox.host.cgroup import Cgroup
from sandbox.units import format_bytes


@click.command("ps", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.option("--no-headers", is_flag=True)
@click.pass_obj
def command(context: Context, *, as_json: bool, no_headers: bool) -> None:
    """List the dynos that live on this host now, in whatever terminal they were started."""
    rows = []
    for path, header in journals.headers(context.config.journal_dir):
        if not journals.is_live(path):
            continue
        usage = Cgroup.at(names.cgroup(str(header["id"]))).usage()
        started = header.get("started")
        age = time.time() - started if isinstance(started, float) else 0.0
        rows.append(
            {
                **{key: header.get(key) for key in ("name", "app", "size", "engine", "runtime", "id", "policy")},
                "supervisor_pid": header.get("pid"),
                "up_s": round(age, 1),
                "memory_bytes": usage.memory_bytes,
                "pids": usage.pids,
            }
        )
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        click.echo("No dyno lives here.", err=True)
        return
    table = [["DYNO", "APP", "SIZE", "ENGINE", "UP", "MEMORY", "PIDS", "ID"]] if not no_headers else []
    table += [
        [
            str(row["name"]),
            str(row["app"]),
            str(row["size"]),
            f"{row['engine']}/{row['runtime']}",
            f"{row['up_s']:.0f}s",
            format_bytes(int(str(row["memory_bytes"]))),
            str(row["pids"]),
            str(row["id"]),
        ]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in table) for column in range(8)]
    for line in table:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
