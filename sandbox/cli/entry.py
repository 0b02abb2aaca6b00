"""The program's first instruction. Help and version answer from here: click alone takes three times as long."""

from __future__ import annotations

import gc
import os
import sys

COMMANDS = {
    "run": "Run an app as a dyno, in the foreground.",
    "ps": "List the dynos that live on this host now.",
    "report": "Prove the wall around a dyno, with evidence from the kernel.",
    "gc": "Remove what crashed runs left behind, and say what.",
    "firewall": "Explain the network wall, say what it denied, change it, remove it.",
    "doctor": "Say what this host can enforce, what it cannot, and what mends it.",
    "stack": "Build and check the stack image.",
}

HELP = f"""Usage: sandbox [OPTIONS] COMMAND [ARGS]...

  Runs untrusted apps as dynos: one walled Linux container each, whose wall is
  read back from the kernel before the app's first instruction.

  Examples:
    sandbox run ./app                     the Procfile's web process
    sandbox run ./app worker              another process type
    sandbox run ./app -- python3 -c 'print(1)'
    sandbox doctor

Options:
  --state-dir PATH    State: stack, slugs, disks, journal [SANDBOX_STATE_DIR;
                      default: /var/lib/sandbox]
  --run-dir PATH      What a reboot may lose [SANDBOX_RUN_DIR; default:
                      /run/sandbox]
  --docker-host URL   The Docker daemon [SANDBOX_DOCKER_HOST; default:
                      unix:///var/run/docker.sock]
  -v, --verbose       Show details of errors.
  --debug             Show our own traceback too.
  --version           Show the version and exit.
  -h, --help          Show this message and exit.

Commands:
{chr(10).join(f"  {name:<9} {text}" for name, text in COMMANDS.items())}

Exit codes:
  the app's own from run; 0 done, 1 failed, 2 usage error; 124 our timeout,
  125 not started, 126 not executable, 127 not found, 128+N ended by signal N
"""


def _hold_standard_descriptors() -> None:
    """Opens /dev/null on 0, 1 and 2 where our caller closed them.

    Otherwise the next socket or pipe gets that number, and the app's output would be written into it: into Docker's
    control connection, for one.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest free number: 0, 1 and 2 are looked at in this order.
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(0, closefd=False, encoding="utf-8")  # noqa: SIM115 - lives as long as we do
    sys.stdout = sys.stdout or open(1, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False, encoding="utf-8")  # noqa: SIM115


def main() -> None:
    """The console script."""
    _hold_standard_descriptors()
    arguments = sys.argv[1:]
    if arguments in (["--help"], ["-h"], []):
        sys.stdout.write(HELP)
        return
    if arguments == ["--version"]:
        from sandbox import __version__

        sys.stdout.write(f"sandbox {__version__}\n")
        return
    # Imports make thousands of long-lived objects and no garbage; a collection every 700 of them takes a tenth of
    # the start. Watch switches it on again.
    gc.disable()
    from sandbox.cli.main import run_cli

    status = run_cli(arguments)
    # All that had to be undone is undone; taking the interpreter apart would take another 10 ms.
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)
