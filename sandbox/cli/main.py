"""The command group, loaded lazily, and the one place where an error becomes words and an exit code."""

from __future__ import annotations

import importlib
import json
import os
from typing import NamedTuple

import click

from sandbox import __version__, config
from sandbox.cli.entry import COMMANDS, HELP
from sandbox.config import Config
from sandbox.errors import BuildError, ClauseError, SandboxError
from sandbox.units import show


class Context(NamedTuple):
    """What every command gets: the instance, and how much to say."""

    config: Config
    verbose: bool = False
    debug: bool = False


class LazyGroup(click.Group):
    """Imports a command's module when that command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = importlib.import_module(f"sandbox.cli.{name}").command
        assert isinstance(command, click.Command)  # noqa: S101 - our own module, for the type checker
        return command

    def get_help(self, ctx: click.Context) -> str:
        return HELP.rstrip()


_FLAGS: dict[str, bool] = {"verbose": False, "debug": False}


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--state-dir", metavar="PATH")
@click.option("--run-dir", metavar="PATH")
@click.option("--docker-host", metavar="URL")
@click.option("-v", "--verbose", is_flag=True)
@click.option("--debug", is_flag=True)
@click.version_option(__version__, message="sandbox %(version)s")
@click.pass_context
def cli(
    ctx: click.Context,
    state_dir: str | None,
    run_dir: str | None,
    docker_host: str | None,
    *,
    verbose: bool,
    debug: bool,
) -> None:
    """Runs untrusted apps as dynos."""
    _FLAGS.update(verbose=verbose or debug, debug=debug)
    if os.environ.get("NO_COLOR"):
        ctx.color = False
    elif os.environ.get("FORCE_COLOR") or os.environ.get("CLICOLOR_FORCE"):
        ctx.color = True
    ctx.obj = Context(config.load(state_dir=state_dir, run_dir=run_dir, docker_host=docker_host), verbose, debug)


def run_cli(arguments: list[str]) -> int:
    """Runs the command line and returns its exit code; every error becomes a message with the next action."""
    try:
        result = cli.main(args=arguments, prog_name="sandbox", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("sandbox: interrupted; nothing was started.", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return _not_started(arguments, error.exit_code)
    except SandboxError as error:
        code = _not_started(arguments, error.exit_code)
        show_error(error)
        if "run" in arguments and "--json" in arguments[: _end_of_options(arguments)]:
            click.echo(json.dumps(_document(error, code), indent=2))
        return code
    except BrokenPipeError:
        # Our reader went away; Python would complain once more when it flushes.
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
        return 141
    except OSError as error:
        where = f" {show(str(error.filename))}" if error.filename else ""
        say(f"Error: the host: {error.strerror or error}{where}.")
        say("Hint: sandbox doctor; --debug shows where it happened.")
        _trace(error)
        return _not_started(arguments, 1)
    except Exception as error:  # noqa: BLE001 - the last line of defence: a bug of ours, said as such
        click.echo(f"Error: {type(error).__name__}: {error}", err=True)
        click.echo("Hint: this is a bug of sandbox; run it again with --debug and report what it prints.", err=True)
        _trace(error)
        return _not_started(arguments, 1)
    return result if isinstance(result, int) else 0


def _end_of_options(arguments: list[str]) -> int:
    return arguments.index("--") if "--" in arguments else len(arguments)


def _document(error: SandboxError, code: int) -> dict[str, object]:
    """The same fields as on stderr, where a document was asked for."""
    clauses = error.clauses if isinstance(error, ClauseError) else ()
    return {"status": code, "reason": "not-started", "error": error.message, "hint": error.hint, "clauses": clauses}


def _not_started(arguments: list[str], code: int) -> int:
    """``run`` keeps the app's own codes apart from ours: 125 when nothing was started, 2 for bad usage."""
    return 125 if "run" in arguments and code == 1 else code


def show_error(error: SandboxError) -> None:
    """The three lines of an error; foreign text in it was escaped where it entered."""
    if error.details and (_FLAGS["verbose"] or isinstance(error, BuildError)):
        say(error.details)
    say(f"Error: {error.message}")
    if error.hint:
        say(f"Hint: {error.hint}")
    _trace(error)


def say(text: str) -> None:
    """One line on stderr, for whoever still reads it."""
    try:
        click.echo(text, err=True)
    except OSError:
        return


def _trace(error: BaseException) -> None:
    if _FLAGS["debug"]:
        import traceback

        traceback.print_exception(error)
