"""Which engine runs a dyno: the one asked for, or the one that enforces most of the policy on this host."""

from __future__ import annotations

from sandbox import hostcmd
from sandbox.config import Config
from sandbox.engine.base import Engine
from sandbox.errors import ClauseError, EngineError, SandboxError, UsageError
from sandbox.host import cgroup
from sandbox.policy.clauses import Clause
from sandbox.units import show

NAMES = ("auto", "oci", "docker")


def make(config: Config, name: str, runtime: str | None) -> Engine:
    """The engine of that name (``oci`` or ``docker``). EngineError when it is not there."""
    if name == "docker":
        if runtime not in (None, "runc"):
            raise UsageError(
                f"--runtime {show(str(runtime))} goes with --engine oci; Docker uses its own default runtime."
            )
        from sandbox.engine.docker import DockerEngine  # its package takes 0.2 s to import

        return DockerEngine(config)
    from sandbox.engine.oci import RUNTIMES, OciEngine

    if runtime is None:
        order = ("crun", "runc") if cgroup.unified() else ("runc", "crun")
        runtime = next((r for r in order if hostcmd.which(r)), None)
        if runtime is None:
            raise EngineError("no OCI runtime is installed.", hint="apt-get install runc conmon")
    elif runtime not in RUNTIMES:
        raise UsageError(f"there is no runtime {show(runtime)}.", hint="runtimes: " + ", ".join(RUNTIMES))
    return OciEngine(config, runtime)


def choose(config: Config, name: str, runtime: str | None, waived: frozenset[Clause]) -> tuple[Engine, str]:
    """An engine that enforces the whole policy but the waived clauses, and why it was taken.

    ``auto`` looks at Docker only when the embedded engine leaves a clause open. Raises ClauseError when what was
    asked for cannot enforce a clause that nobody waived.
    """
    if name not in NAMES:
        raise UsageError(f"there is no engine {show(name)}.", hint="engines: " + ", ".join(NAMES))
    if name != "auto" or runtime is not None:
        engine = make(config, "oci" if name == "auto" else name, runtime)
        _refuse_open(engine, waived)
        return engine, "asked for"
    best: Engine | None = None
    open_clauses: dict[Clause, str] = {}
    faults: list[str] = []
    for candidate in ("oci", "docker"):
        try:
            engine = make(config, candidate, None)
            lacking = {clause: why for clause, why in engine.missing().items() if clause not in waived}
        except SandboxError as error:
            faults.append(f"{candidate}: {error.message}")
            continue
        if best is None or len(lacking) < len(open_clauses):
            best, open_clauses = engine, lacking
        if not lacking:
            return engine, "it enforces the whole policy" if engine is best else "it enforces most"
    if best is None:
        raise EngineError("no engine can be used: " + "; ".join(faults), hint="sandbox doctor")
    _refuse_open(best, waived)
    return best, "it enforces most"


def _refuse_open(engine: Engine, waived: frozenset[Clause]) -> None:
    lacking = {clause: why for clause, why in engine.missing().items() if clause not in waived}
    if lacking:
        lines = "; ".join(f"{clause.value}: {why}" for clause, why in lacking.items())
        raise ClauseError(
            f"engine {engine.name} ({engine.runtime}) cannot enforce the policy here: {lines}. Nothing was started.",
            clauses=tuple(clause.value for clause in lacking),
            hint="use another --engine or --runtime, or accept it by name: "
            + " ".join(f"--waive {clause.value}" for clause in lacking),
        )
