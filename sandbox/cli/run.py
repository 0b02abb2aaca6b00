"""``sandbox run``."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import click

from sandbox import names, units
from sandbox.cli.main import Context, say
from sandbox.cli.progress import Progress
from sandbox.errors import UsageError
from sandbox.policy.clauses import parse_waivers
from sandbox.supervisor import embed
from sandbox.units import show

if TYPE_CHECKING:
    from sandbox.dyno.watch import Voice

# Heroku's limit on all config vars of an app together is 64 kB (unconfirmed there; a bound here in any case).
MAX_ENV_BYTES = 64 * 1024


@click.command("run", context_settings={"help_option_names": ["-h", "--help"]}, options_metavar="[OPTIONS]")
@click.argument("path", metavar="PATH")
@click.argument("words", nargs=-1, metavar="[TYPE] [-- CMD...]", type=click.UNPROCESSED)
@click.option("-s", "--size", default="standard-1x", show_default=True, help="The dyno size.")
@click.option("--memory", metavar="SIZE", help="Lower the memory quota, such as 256M.")
@click.option("--cpus", type=float, metavar="N", help="Lower the CPU cap, such as 0.5.")
@click.option("--pids", type=int, metavar="N", help="Lower the limit on processes and threads.")
@click.option("--disk", metavar="SIZE", help="Lower the limit on what is written.")
@click.option("-e", "--env", "env", multiple=True, metavar="K=V", help="A config var of this run (repeatable).")
@click.option("--env-file", metavar="FILE", help="Config vars, one K=V a line.")
@click.option("--engine", default="auto", show_default=True, metavar="auto|oci|docker")
@click.option("--runtime", envvar="SANDBOX_RUNTIME", metavar="runc|crun|runsc", help="The OCI runtime.")
@click.option(
    "--waive", multiple=True, metavar="CLAUSE", help="Start although this clause is not enforced (repeatable)."
)
@click.option("--timeout", metavar="TIME", help="End the dyno after that time, exit code 124.")
@click.option("--grace", default="30s", show_default=True, metavar="TIME", help="Between SIGTERM and SIGKILL.")
@click.option(
    "--boot-timeout", default="60s", show_default=True, metavar="TIME", help="For a web process to bind $PORT."
)
@click.option(
    "--sample", default="20s", show_default=True, metavar="TIME", help="Between two looks at the memory quota."
)
@click.option(
    "--tty/--no-tty",
    "want_tty",
    default=None,
    help="A terminal for the app; default: a command of yours on a terminal.",
)
@click.option(
    "--egress",
    metavar="WHAT",
    help="public, none, or allow:LIST of networks[:ports] and names; default: the app's sandbox.toml, then public.",
)
@click.option("--smtp", is_flag=True, help="Let the app reach port 25.")
@click.option(
    "--report",
    "report_file",
    metavar="FILE",
    help="Write the isolation report of this dyno: .html .json .sarif .xml .txt.",
)
@click.option("--get", metavar="/PATH", help="Once the web process is up, fetch PATH inside the dyno, then stop it.")
@click.option("--raw", is_flag=True, help="The app's bytes as they are, stdout and stderr apart.")
@click.option("--json", "as_json", is_flag=True, help="One document on stdout; the app's output on stderr.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, and no word on a clean end.")
@click.pass_obj
def command(
    context: Context,
    path: str,
    words: tuple[str, ...],
    size: str,
    memory: str | None,
    cpus: float | None,
    pids: int | None,
    disk: str | None,
    env: tuple[str, ...],
    env_file: str | None,
    engine: str,
    runtime: str | None,
    waive: tuple[str, ...],
    timeout: str | None,
    grace: str,
    boot_timeout: str,
    sample: str,
    egress: str | None,
    report_file: str | None,
    get: str | None,
    *,
    want_tty: bool | None,
    smtp: bool,
    raw: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Run an app as a dyno, in the foreground.

    \b
    Examples:
      sandbox run ./app
      sandbox run ./app worker
      sandbox run --size standard-2x --env K=V --timeout 30s --json ./app -- python3 -c 'print(1)'

    \b
    Exit codes: the app's own; 124 our timeout; 125 not started; 126 not executable;
    127 not found; 128+N ended by signal N. The reason is on stderr and in --json.
    """  # noqa: D301 - click's mark for "as it is" is a backspace
    if os.geteuid() != 0:
        raise UsageError(
            "sandbox run needs root: it makes namespaces, mounts and cgroups.", hint="sudo sandbox run ..."
        )
    if raw and as_json:
        raise UsageError("--raw and --json both want stdout.", hint="choose one.")
    if get is not None and (not get.startswith("/") or not get.isprintable() or " " in get):
        raise UsageError(f"--get {show(get)} is not a path.", hint="--get /")
    process_type, argv = _words(words)
    if not all(word.isascii() or word.encode("utf-8", "replace").decode() == word for word in argv):
        raise UsageError("the command is not UTF-8.", hint="pass such bytes on stdin or in a file.")
    interactive = want_tty if want_tty is not None else bool(argv) and os.isatty(0) and os.isatty(1) and not as_json
    if interactive and not (os.isatty(0) and os.isatty(1)):
        raise UsageError("--tty needs a terminal on stdin and stdout.", hint="leave --tty away.")
    request = embed.Request(
        path=path,
        process_type=process_type,
        command=argv,
        size=size,
        memory_bytes=None if memory is None else units.parse_bytes(memory, what="--memory"),
        cpus=cpus,
        pids=pids,
        disk_bytes=None if disk is None else units.parse_bytes(disk, what="--disk"),
        env=_environment(env, env_file),
        engine=engine,
        runtime=runtime,
        waived=parse_waivers(waive),
        tty=interactive,
        stdin_fd=_stdin(has_command=bool(argv)),
        timeout_s=None if timeout is None else units.parse_duration(timeout, what="--timeout"),
        grace_s=units.parse_duration(grace, what="--grace"),
        sample_s=units.parse_duration(sample, what="--sample"),
        boot_timeout_s=units.parse_duration(boot_timeout, what="--boot-timeout"),
        egress=egress or "",
        smtp=smtp,
        get=get or "",
    )

    reporter = None
    if report_file is not None:
        from sandbox.cli.report import AtStart

        reporter = AtStart(context.config, report_file)
    signals = _Signals(resize=interactive)
    progress, terminal = Progress(quiet=quiet), _Terminal()

    def make_voice(name: str) -> Voice:
        from sandbox.cli.output import LineVoice, QuietVoice, RawVoice

        if interactive:
            # Not before: during a build Ctrl-C is for us.
            terminal.make_raw()
        if as_json:
            return QuietVoice(name)
        return RawVoice(name) if raw or interactive else LineVoice(name)

    try:
        report = embed.run(
            context.config,
            request,
            make_voice=make_voice,
            progress=progress,
            signals=signals.fd,
            hold=signals.hold,
            meanwhile=_load_voices,
            examine=reporter.examine if reporter is not None else lambda _: None,
        )
    finally:
        terminal.restore()
        progress.close()
    if reporter is not None:
        reporter.finish(report.document)
    if as_json:
        sys.stdout.write(json.dumps(report.document, indent=2) + "\n")
    if not (quiet and report.exit.code == 0):
        lost = report.document["undelivered_bytes"]
        more = f"; {lost} bytes of its output were not delivered" if lost else ""
        say(f"sandbox: {report.document['dyno']} {report.exit.message}{more}")
    return report.exit.code


def _load_voices() -> None:
    import sandbox.cli.output  # noqa: F401 - loaded while the engine works


def _words(words: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """``[TYPE] [-- CMD...]``. click drops the ``--``; the command line still has it."""
    arguments = sys.argv[1:]
    if "--" in arguments:
        count = len(arguments) - arguments.index("--") - 1
        before, argv = words[: len(words) - count], words[len(words) - count :]
        if not argv:
            raise UsageError("nothing follows --.", hint="sandbox run PATH -- CMD...")
    else:
        before, argv = words, ()
    if len(before) > 1:
        raise UsageError(f"{show(before[1])} is one word too many.", hint="sandbox run PATH [TYPE] [-- CMD...]")
    return (before[0] if before else ""), argv


def _environment(pairs: tuple[str, ...], env_file: str | None) -> tuple[tuple[str, str], ...]:
    found: list[tuple[str, str]] = []
    if env_file is not None:
        try:
            with open(env_file, encoding="utf-8") as file:
                lines = file.read().split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise UsageError(f"--env-file {show(env_file)} cannot be read: {reason}; nothing was started.") from error
        for number, line in enumerate(lines, 1):
            if line.strip() and not line.lstrip().startswith("#"):
                found.append(_pair(line.strip().removeprefix("export "), f"{env_file}:{number}"))
    found += [_pair(pair, "--env") for pair in pairs]
    if sum(len(name) + len(value.encode("utf-8", "surrogateescape")) for name, value in found) > MAX_ENV_BYTES:
        raise UsageError(f"the config vars have more than {MAX_ENV_BYTES} bytes; nothing was started.")
    return tuple(found)


def _pair(text: str, where: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    # The text may be a secret: only the name is ever shown.
    if not equals:
        raise UsageError(f"{where}: there is no = in it; nothing was started.", hint="write NAME=value.")
    if not names.is_env_name(name):
        raise UsageError(f"{where}: {show(name)} is not a variable name; nothing was started.")
    if "\0" in value:
        raise UsageError(f"{where}: the value of {name} holds a NUL byte; nothing was started.")
    return name, value


def _stdin(*, has_command: bool) -> int:
    """Our stdin for a command of the user's own; for a process type only when it is a pipe or a file."""
    try:
        os.fstat(0)
    except OSError:
        return -1
    if os.isatty(0):
        return 0 if has_command else -1
    return 0


class _Signals:
    """Signals as bytes on a descriptor, so that one loop sees everything; until ``hold``, they interrupt us."""

    def __init__(self, *, resize: bool) -> None:
        self.fd, self._write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._held = False
        signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # What our caller ignores stays ignored: nohup, and "&" in a script.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._arrived)
        if resize:
            signal.signal(signal.SIGWINCH, lambda *_: None)
            os.write(self._write_end, bytes([signal.SIGWINCH]))

    def _arrived(self, number: int, _: object) -> None:
        if not self._held:
            raise KeyboardInterrupt(number)

    def hold(self) -> None:
        """From here on there is something to take down."""
        self._held = True


class _Terminal:
    """Our terminal, raw while the app has one of its own on the other side, and given back as it was."""

    def __init__(self) -> None:
        self._saved: list[Any] | None = None

    def make_raw(self) -> None:
        import termios
        import tty

        self._saved = termios.tcgetattr(0)
        tty.setraw(0)

    def restore(self) -> None:
        if self._saved is None:
            return
        import termios

        try:
            termios.tcsetattr(0, termios.TCSADRAIN, self._saved)
        except (OSError, termios.error):
            return  # it hung up
