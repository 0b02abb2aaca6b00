"""``sandbox report``."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

from sandbox.cli.main import Context, say
from sandbox.errors import SandboxError, UsageError
from sandbox.units import show

if TYPE_CHECKING:
    from sandbox.config import Config
    from sandbox.dyno.record import Record
    from sandbox.report.document import Made
    from sandbox.report.twin import Wanted

Document = dict[str, Any]
_HELP = {"help_option_names": ["-h", "--help"]}
FORMATS = ("text", "json", "html", "sarif", "junit")
_SUFFIXES = {".txt": "text", ".json": "json", ".html": "html", ".htm": "html", ".sarif": "sarif", ".xml": "junit"}


class _Default(click.Group):
    """``sandbox report web.1``: a word that is no command names a dyno or an app."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = next((arg for arg in args if not arg.startswith("-")), None)
        if not (first in self.commands or set(args) & {"-h", "--help"}):
            args = ["make", *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Those of making a report are what people look for here."""
        with formatter.section("Options"):
            records = (
                option.get_help_record(ctx) for option in make_command.params if isinstance(option, click.Option)
            )
            formatter.write_dl([record for record in records if record is not None])
        self.format_commands(ctx, formatter)


@click.group("report", cls=_Default, context_settings=_HELP)
def command() -> None:
    """Prove the wall around a dyno, with evidence from the kernel.

    \b
    sandbox report run.4821              a live dyno: what the kernel says now
    sandbox report --all                 every live dyno, one line each
    sandbox report ./app                 attack a twin with the app's policy
    sandbox report --full ./app          and take every clause out of twins once
    sandbox report --format html -o FILE --format sarif -o FILE ./app

    \b
    Exit codes: 0 all pass; 1 something is open, or the exposure is above
    --threshold; 2 something is unproven, with --strict; 3 our own error.
    """  # noqa: D301 - click's mark for "as it is" is a backspace
    if os.geteuid() != 0:
        raise UsageError("sandbox report needs root: it reads the kernel's state.", hint="sudo sandbox report ...")


def _options(function: Any) -> Any:
    for option in reversed(
        (
            click.option("--full", is_flag=True, help="Attack a twin, and take every clause out of twins once."),
            click.option("--format", "formats", multiple=True, type=click.Choice(FORMATS), help="Repeatable."),
            click.option("-o", "--output", "outputs", multiple=True, metavar="FILE", help="Where it goes."),
            click.option("--threshold", type=float, metavar="N", help="Exit code 1 above that exposure."),
            click.option("--strict", is_flag=True, help="Exit code 2 when something is unproven."),
            click.option("--engine", default="auto", show_default=True, metavar="auto|oci|docker"),
            click.option("--runtime", envvar="SANDBOX_RUNTIME", metavar="runc|crun|runsc"),
            click.option("-s", "--size", default="standard-1x", show_default=True, help="The dyno size of a twin."),
            click.option("--egress", metavar="WHAT", help="The egress of a twin; default: the app's own."),
            click.option("--smtp", is_flag=True, help="The twin may reach port 25."),
            click.option("--waive", multiple=True, metavar="CLAUSE", help="The twin may lack it (repeatable)."),
            click.option("-q", "--quiet", is_flag=True, help="No progress."),
        )
    ):  # fmt: skip
        function = option(function)
    return function


@command.command("make", hidden=True, context_settings=_HELP)
@click.argument("what", nargs=-1)
@click.option("--all", "every", is_flag=True, help="Every live dyno of this host, one line each.")
@_options
@click.pass_obj
def make_command(context: Context, /, what: tuple[str, ...], *, every: bool, **options: Any) -> int:
    """Report on a live dyno, or on a twin of an app."""
    if every == bool(what):
        raise UsageError("name a dyno or an app, or say --all.", hint="sandbox ps lists the dynos.")
    if every or len(what) > 1:
        if options["formats"] or options["outputs"] or options["full"]:
            raise UsageError("--format, -o and --full go with one dyno or app.", hint="name one.")
        return _guarded(lambda: _many(context, what, options))
    return _guarded(lambda: _make(context, what[0], options))


def _many(context: Context, names: tuple[str, ...], options: dict[str, Any]) -> int:
    """Several live dynos: what they have in common is read once; each gets a report of its own, and a line here."""
    from sandbox.dyno import record as records
    from sandbox.report import make, seal

    config = context.config
    config.make_folders()
    chosen = [records.find(config, name) for name in names] if names else records.live(config)
    if not chosen:
        say("No dyno lives here.")
        return 0
    worst = 0
    for made in make.many(config, chosen):
        document, path = seal.keep(config, make.finish(config, made, with_host=False))
        code = status(document, threshold=options["threshold"], strict=options["strict"])
        worst = max(worst, code)
        counts = document["summary"]["counts"]
        words = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in counts.items() if number)
        exposure = document["summary"]["exposure"] * 10
        click.echo(f"{made.record.name:<14} exposure {exposure:.1f} {document['summary']['word']:<8} {words}  {path}")
    return worst


def _guarded(action: Any) -> int:
    """Our own errors are exit code 3 here: 1 and 2 speak about the wall. Bad usage stays 2, before anything ran."""
    try:
        result = action()
    except UsageError:
        raise
    except SandboxError as error:
        error.exit_code = 3
        raise
    return int(result)


def _make(context: Context, what: str, options: dict[str, Any]) -> int:
    from sandbox.report import make, seal

    targets = _targets(options["formats"], options["outputs"])
    config = context.config
    config.make_folders()
    _writable(targets)
    progress = _progress(quiet=options["quiet"])
    if os.path.isdir(what):
        made = _twin(context, what, options, progress)
    elif "/" in what or os.path.exists(what):
        raise UsageError(f"{show(what)} is not a folder with an app.", hint="sandbox report ./app, or a dyno's name.")
    else:
        record = make.of_dyno(config, what)
        if options["full"]:
            made = make.twin(config, _wanted_of(config, record), lambda _: record, full=True, progress=progress)
        else:
            made = make.live(config, record)
    progress.close()
    document, path = seal.keep(config, make.finish(config, made, with_host=made.mode != "live"))
    write(document, targets)
    if not options["quiet"]:
        say(f"sandbox: report kept as {path}")
    return status(document, threshold=options["threshold"], strict=options["strict"])


class AtStart:
    """The report of a dyno that this very command runs: read behind its gate, finished with what became of it."""

    def __init__(self, config: Config, path: str) -> None:
        self._config = config
        self._targets = _targets((), (path,))
        self._made: Made | None = None
        _writable(self._targets)

    def examine(self, container_id: str) -> None:
        from sandbox.dyno import record
        from sandbox.report import make

        self._made = make.live(self._config, record.read(self._config, container_id), mode="start")

    def finish(self, ended: Document) -> None:
        from sandbox.report import document as documents
        from sandbox.report import make, seal

        if self._made is None:
            return
        policy = self._made.record.spec.policy
        usage = {name: ended[name] for name in ("memory_peak_bytes", "pids_peak")}
        events = {
            **self._made.events,
            "processes refused": ended["pids_refused"],
            "ended": f"{ended['reason']}: {ended['message']}",
        }
        made = self._made._replace(measured=documents.bars(policy, {}, usage), events=events)
        document, path = seal.keep(self._config, make.finish(self._config, made, with_host=False))
        write(document, self._targets)
        say(f"sandbox: isolation report in {self._targets[0][1]}, kept as {path}")


def _progress(*, quiet: bool) -> Any:
    from sandbox.cli.progress import Progress

    return Progress(quiet=quiet)


def _targets(formats: tuple[str, ...], outputs: tuple[str, ...]) -> list[tuple[str, str]]:
    """Which format goes where. A file's ending says its format; one without a known ending gets the next that is left.

    What is left then goes to stdout, which takes one.
    """
    left = list(formats)
    found: list[tuple[str, str]] = []
    for path in outputs:
        ending = _SUFFIXES.get(os.path.splitext(path)[1].lower())
        chosen = ending if ending in left or (ending and not formats) else left[0] if left else None
        if chosen is None:
            raise UsageError(
                f"no format is left for {show(path)}.", hint="--format " + "|".join(FORMATS) + " for each -o."
            )
        if chosen in left:
            left.remove(chosen)
        found.append((chosen, path))
    found += [(name, "-") for name in left]
    if sum(path == "-" for _, path in found) > 1:
        raise UsageError("more than one format wants stdout.", hint="-o FILE for each --format but one.")
    return found or [("text", "-")]


def _writable(targets: list[tuple[str, str]]) -> None:
    """Before minutes of work, not after."""
    for _, path in targets:
        if path != "-":
            folder = os.path.dirname(os.path.abspath(path))
            if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
                raise UsageError(f"{show(path)} cannot be written.", hint="-o FILE in a folder that exists.")


def write(document: Document, targets: list[tuple[str, str]]) -> None:
    """Each format to its place; a file appears whole or not at all."""
    from sandbox.report.render import formats, text

    for name, path in targets:
        if path == "-":
            if name == "text":
                colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
                width = os.get_terminal_size().columns if sys.stdout.isatty() else 100
                content = text.render(document, colour=colour or bool(os.environ.get("FORCE_COLOR")), width=width)
            else:
                content = formats()[name](document)
            sys.stdout.write(content)
            sys.stdout.flush()
            continue
        draft = f"{path}.{os.getpid()}.new"
        try:
            with open(draft, "w", encoding="utf-8") as file:
                file.write(formats()[name](document))
            os.replace(draft, path)
        except OSError as error:
            if os.path.exists(draft):
                os.unlink(draft)
            raise SandboxError(
                f"{show(path)} cannot be written: {error.strerror}.", hint="sandbox report list says where it is kept."
            ) from error  # fmt: skip


def status(document: Document, *, threshold: float | None, strict: bool) -> int:
    """The exit code that a report amounts to."""
    summary = document["summary"]
    counts = summary["counts"]
    if counts["error"]:
        return 3
    if counts["fail"] or (threshold is not None and summary["exposure"] * 10 > threshold + 1e-9):
        return 1
    return 2 if strict and counts["unproven"] else 0


def _twin(context: Context, path: str, options: dict[str, Any], progress: Any) -> Any:
    from sandbox.report import make

    wanted = wanted_for(context, path, options)
    return make.twin(context.config, wanted, _twin_record(wanted), full=options["full"], progress=progress)


def wanted_for(context: Context, path: str, options: dict[str, Any]) -> Wanted:
    """What a twin of the app is: the policy that `sandbox run` would give it, on the engine that it would take."""
    from sandbox.policy.clauses import parse_waivers
    from sandbox.report.twin import Wanted
    from sandbox.supervisor import embed, engines

    request = embed.Request(
        path=path,
        size=options["size"],
        engine=options["engine"],
        runtime=options["runtime"],
        waived=parse_waivers(options["waive"]),
        egress=options["egress"] or "",
        smtp=options["smtp"],
    )
    promised = embed.promised(context.config, request)
    engine, _ = engines.choose(context.config, request.engine, request.runtime, request.waived)
    return Wanted(promised.app, promised.policy, engine.name, engine.runtime, promised.stack, promised.env_names)


def _twin_record(wanted: Wanted) -> Any:
    """The record of a twin that is gone, for the head of its report."""
    from sandbox.dyno.record import Record
    from sandbox.host import observe
    from sandbox.policy.spec import ContainerSpec, SlotPaths

    def make(_: Any) -> Record:
        spec = ContainerSpec("twin", "twin-1", (), wanted.policy, SlotPaths("", "", "", ""), 0, "", "")
        return Record(
            name=f"a twin of {wanted.app}",
            app=wanted.app,
            engine=wanted.engine,
            runtime=wanted.runtime,
            user_namespace=wanted.engine == "oci",
            spec=spec,
            place=None,
            port=5000,
            pid=0,
            start_ticks=0,
            started=0.0,
            boot_id=observe.boot_id(),
            stack_digest=wanted.stack.digest,
            stack_manifest=wanted.stack.manifest,
            slug_digest="",
            env_names=wanted.env_names,
            descriptors=(),
            mounts=(),
        )

    return make


def _wanted_of(config: Any, record: Record) -> Wanted:
    from sandbox.host import stack
    from sandbox.report.twin import Wanted

    found = stack.find(config, stack.Variant.RUNTIME)
    return Wanted(record.app, record.spec.policy, record.engine, record.runtime, found, record.env_names)


@command.command("list", context_settings=_HELP)
@click.pass_obj
def list_command(context: Context) -> int:
    """List the reports that are kept."""

    def action() -> int:
        from sandbox.report import seal

        paths = seal.kept(context.config)
        for path in paths:
            click.echo(path)
        if not paths:
            say("No report is kept here.")
        return 0

    return _guarded(action)


@command.command("show", context_settings=_HELP)
@click.argument("file")
@click.option("--format", "formats", multiple=True, type=click.Choice(FORMATS))
@click.option("-o", "--output", "outputs", multiple=True, metavar="FILE")
@click.pass_obj
def show_command(_: Context, file: str, formats: tuple[str, ...], outputs: tuple[str, ...]) -> int:
    """Show a report from its JSON file, in any format. It is not verified: see verify."""

    def action() -> int:
        from sandbox.report import seal

        targets = _targets(formats, outputs)
        _writable(targets)
        write(seal.load(file), targets)
        return 0

    return _guarded(action)


@command.command("verify", context_settings=_HELP)
@click.argument("file")
@click.option("--key", "key", metavar="FILE", default="", help="The public key (PEM) that must have signed it.")
@click.pass_obj
def verify_command(context: Context, file: str, key: str) -> int:
    """Say whether a report was altered since its host signed it. Exit code 3 when it was."""

    def action() -> int:
        from sandbox.report import seal

        found = seal.verify(context.config, file, public_key=key)
        whose = (
            "this host's key" if found.ours and not key else "the given key" if key else "a key that is not known here"
        )
        click.echo(f"intact: signed by {whose}, ed25519:{found.key[:16]}; {found.chained}.")
        if not found.ours:
            say("Hint: --key FILE names the key that must have signed it; without one, anybody's would do.")
            return 3
        return 0

    return _guarded(action)


@command.command("diff", context_settings=_HELP)
@click.argument("old")
@click.argument("new")
@click.pass_obj
def diff_command(_: Context, old: str, new: str) -> int:
    """Say what changed between two reports. Exit code 1 when something new is open."""

    def action() -> int:
        from sandbox.report import seal
        from sandbox.report.render import text

        first, second = seal.load(old), seal.load(new)
        lines = list(text.differences(first, second))
        for line in lines:
            click.echo(line)
        return int(any(line.startswith("NEW") for line in lines))

    return _guarded(action)


@command.command("parity", context_settings=_HELP)
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@_options
@click.pass_obj
def parity_command(context: Context, /, path: str, *, as_json: bool, **options: Any) -> int:
    """Attack a twin on every engine and runtime of this host, side by side."""
    if not os.path.isdir(path):
        raise UsageError(f"{show(path)} is not a folder with an app.", hint="sandbox report parity ./app")
    return _guarded(lambda: _parity(context, path, options, as_json=as_json))


def _parity(context: Context, path: str, options: dict[str, Any], *, as_json: bool) -> int:
    import json

    from sandbox import hostcmd
    from sandbox.engine.oci import RUNTIMES
    from sandbox.report import make

    progress = _progress(quiet=options["quiet"])
    columns: dict[str, Document | str] = {}
    places = [("oci", runtime) for runtime in RUNTIMES if hostcmd.which(runtime)] + [("docker", None)]
    for engine, runtime in places:
        name = f"{engine}/{runtime or 'runc'}"
        try:
            chosen = {**options, "engine": engine, "runtime": runtime}
            made = _twin(context, path, chosen, progress)
            columns[name] = make.finish(context.config, made, with_host=False)
        except SandboxError as error:
            columns[name] = error.message
    progress.close()
    if as_json:
        click.echo(json.dumps(columns, sort_keys=True))
    else:
        from sandbox.report.render import parity

        for line in parity.lines(columns):
            click.echo(line)
    documents = [column for column in columns.values() if isinstance(column, dict)]
    return max((status(document, threshold=None, strict=False) for document in documents), default=3)
