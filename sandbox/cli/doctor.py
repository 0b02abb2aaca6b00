"""``sandbox doctor``."""

from __future__ import annotations

import json

import click

from sandbox.cli.main import Context
from sandbox.host import doctor
from sandbox.host.doctor import Verdict
from sandbox.units import escape

_SYMBOLS = {Verdict.OK: ("✓", "green"), Verdict.ADVICE: ("!", "yellow"), Verdict.MISSING: ("✗", "red")}


@click.command("doctor", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def command(context: Context, *, as_json: bool) -> int:
    """Say what this host can enforce, what it cannot, and what mends it.

    Exit code 1 when a promise cannot be kept here.
    """
    found = list(doctor.examine(context.config))
    counts = doctor.summary(found)
    if as_json:
        click.echo(json.dumps(doctor.document(found), indent=2))
    else:
        topic = ""
        for finding in sorted(found, key=lambda f: [g.topic for g in found].index(f.topic)):
            if finding.topic != topic:
                topic = finding.topic
                click.echo(f"\n  {topic.upper()}")
            symbol, colour = _SYMBOLS[finding.verdict]
            click.echo(f"  {click.style(symbol, fg=colour)} {finding.statement:<34} {escape(finding.evidence)}")
            if finding.mend and finding.verdict is not Verdict.OK:
                click.echo(f"      → {finding.mend}")
        click.echo(f"\n{counts['ok']} ok, {counts['advice']} advice, {counts['missing']} missing.")
    return 1 if counts["missing"] else 0
