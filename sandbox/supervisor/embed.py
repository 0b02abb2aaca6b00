"""``sandbox run`` without a daemon: the same supervisor, embedded, for one dyno."""

from __future__ import annotations

import hashlib
import os
import select
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from sandbox import names
from sandbox.app import detect
from sandbox.app import slug as slugs
from sandbox.app import source as sources
from sandbox.app.detect import Plan
from sandbox.config import Config
from sandbox.dyno.dyno import Dyno, Launch, Phases, Started
from sandbox.engine.base import Engine
from sandbox.errors import ClauseError, SandboxError, UsageError
from sandbox.host import facts
from sandbox.host import journal as journals
from sandbox.host import stack as stacks
from sandbox.host.oom import KernelLog
from sandbox.host.stack import Stack, Variant
from sandbox.policy import policy as policies
from sandbox.policy import sizes
from sandbox.policy.clauses import Clause
from sandbox.policy.egress import Egress
from sandbox.policy.policy import Policy
from sandbox.supervisor import engines
from sandbox.units import MIB, show

if TYPE_CHECKING:
    from sandbox.dyno.exits import Exit
    from sandbox.dyno.watch import Result, Voice

PORT = 5000
_GET_TIMEOUT_S = 10
SLUG_FORMAT = "1"  # a change here makes every cached slug stale


class Request(NamedTuple):
    """Everything that ``sandbox run`` was asked for. ``command`` empty: the process type's."""

    path: str
    process_type: str = ""
    command: tuple[str, ...] = ()
    size: str = sizes.DEFAULT
    memory_bytes: int | None = None
    cpus: float | None = None
    pids: int | None = None
    disk_bytes: int | None = None
    env: tuple[tuple[str, str], ...] = ()
    engine: str = "auto"
    runtime: str | None = None
    waived: frozenset[Clause] = frozenset()
    tty: bool = False
    stdin_fd: int = -1
    timeout_s: float | None = None
    grace_s: float = 30.0
    sample_s: float = 20.0
    boot_timeout_s: float = 60.0
    egress: str = ""  # a mode, or "allow:" and a list; empty: the app's own wish, then public
    smtp: bool = False
    get: str = ""  # a path: once the web process is up, fetch it from inside, then stop


class Report(NamedTuple):
    """What happened, for ``--json``."""

    document: dict[str, object]
    exit: Exit


MakeVoice = Callable[[str], "Voice"]


class Progress(Protocol):
    """Who says what takes long. ``close``: nothing more will be said."""

    def __call__(self, message: str) -> None: ...

    def close(self) -> None: ...


def run(
    config: Config,
    request: Request,
    *,
    make_voice: MakeVoice,
    progress: Progress,
    signals: int,
    hold: Callable[[], None] = lambda: None,
    meanwhile: Callable[[], None] = lambda: None,
    examine: Callable[[str], None] = lambda _: None,
) -> Report:
    """Runs one dyno from the app's folder to the end of its process, and takes everything down again.

    ``signals``: a descriptor from which signal numbers come. ``hold`` is called once there is something to take
    down: from then on a signal must not interrupt us, but come through that descriptor. ``meanwhile`` loads what the
    caller needs later. ``examine`` is called with the dyno's id, behind the gate. Raises SandboxError before the
    start; afterwards the result says how it ended.
    """
    phases = Phases()
    os.umask(0o022)
    config.make_folders()
    if journals.paths(config.journal_dir):
        _reclaim(config, progress)
    phases.mark("reclaim")
    host = facts.read()
    source = sources.scan(request.path)
    policy = _policy(config, request, source)
    plan = _plan(source, request)
    command, process_type = _command(plan, request)
    if request.get and process_type != "web":
        raise UsageError(f"--get asks a web process, not {show(process_type)}.", hint="leave --get away.")
    engine, why = engines.choose(config, request.engine, request.runtime, request.waived)
    if request.engine == "auto":
        progress(f"engine {engine.name} ({engine.runtime}): {why}")
    stack = stacks.find(config, Variant.RUNTIME)
    phases.mark("plan")
    hold()
    leftovers = ""
    key = slug_key(config, source, plan, stack)
    slug = slugs.find(config, key)
    if slug is None:
        from sandbox.supervisor.build import Builder

        slug = Builder(config, engine, host=host, progress=progress, signals=signals).slug(source, plan, key)
    progress.close()
    phases.mark("slug")
    name = f"{process_type}.1" if process_type != "run" else _run_name(config)
    app = names.app_name(request.path)
    launch = Launch(
        name=name,
        app=app,
        policy=policy,
        stack=stack,
        slug_image=slug.image,
        command=command,
        env=_environment(name, process_type, policy, request, plan),
        tty=request.tty,
        stdin=request.stdin_fd >= 0,
        port=PORT if process_type == "web" else 0,
        slug_digest=slug.digest,
    )
    dyno = Dyno(config, engine, launch, phases=phases)
    dyno.examine = lambda: examine(dyno.container_id)
    log = KernelLog()
    words = " ".join(request.command) or plan.process_types().get(process_type, "")
    try:
        _stop_if_interrupted(signals)
        dyno.prepare()
        started = dyno.start(meanwhile=lambda: _load(meanwhile))
        voice = make_voice(name)
        voice.event(f"Starting process with command `{words}`")
        result = _watch(engine, dyno, started, request, voice, log, signals)
        phases.mark("run")
        written = dyno.written()
    except ClauseError as error:
        from sandbox.host.eventlog import record

        record(
            config,
            "start refused",
            dyno=name,
            app=app,
            engine=engine.name,
            clauses=error.clauses,
            message=error.message,
        )
        raise
    finally:
        from sandbox.supervisor.reclaim import destroy_container

        log.close()
        try:
            dyno.close(destroy_container(config, engine))
        except SandboxError as error:
            # How the dyno ended, or why it did not start, is what was asked for; this comes on top.
            leftovers = error.message
            progress(f"warning: {leftovers} (sandbox gc tries again)")
        phases.mark("teardown")
    from sandbox.dyno import exits

    end = exits.describe(result.facts, policy)
    if request.get and result.answered and end.reason is exits.Reason.STOPPED:
        end = exits.Exit(0, exits.Reason.STOPPED, "answered, and was stopped with SIGTERM")
    elif request.get and not result.answered and end.code == 0:
        end = exits.Exit(1, exits.Reason.NO_ANSWER, f"did not answer GET {request.get}; it exited with status 0")
    usage = result.usage
    document: dict[str, object] = {
        "dyno": name,
        "app": app,
        "id": dyno.container_id,
        "engine": engine.name,
        "runtime": engine.runtime,
        "size": policy.size,
        "policy_digest": policy.digest(),
        "stack_digest": stack.digest,
        "slug_digest": slug.digest,
        "waived": sorted(clause.value for clause in policy.waived),
        "status": end.code,
        "reason": end.reason.value,
        "message": end.message,
        "memory_peak_bytes": usage.memory_peak_bytes,
        "memory_quota_bytes": policy.memory_quota_bytes,
        "memory_kill_bytes": policy.memory_kill_bytes,
        "over_quota_samples": result.over_quota_samples,
        "cpu_us": usage.cpu_us,
        "pids_peak": usage.pids_peak,
        "pids_max": policy.pids_max,
        "pids_refused": usage.pids_refused,
        "pids_limit_reached": result.pids_limit_reached,
        "disk_written_bytes": written[0],
        "disk_written_inodes": written[1],
        "up_after_ms": None if result.up_after_s is None else round(result.up_after_s * 1000, 1),
        "undelivered_bytes": result.undelivered_bytes,
        "egress": policy.egress.document(),
        "address": str(dyno.place.address) if dyno.place is not None else None,
        "url": f"http://{dyno.place.address}:{launch.port}" if dyno.place is not None and launch.port else None,
        "leftovers": leftovers,
        "phases_ms": phases.ms,
    }
    return Report(document, end)


class Promised(NamedTuple):
    """What a run of a request would promise, without running it."""

    app: str
    policy: Policy
    stack: Stack
    env_names: tuple[str, ...]


def promised(config: Config, request: Request) -> Promised:
    """The policy that ``run`` would give that request, and what else its dyno would get."""
    source = sources.scan(request.path)
    policy = _policy(config, request, source)
    plan = _plan(source, request)
    _, process_type = _command(plan, request)
    env = _environment(f"{process_type}.1", process_type, policy, request, plan)
    stack = stacks.find(config, Variant.RUNTIME)
    return Promised(names.app_name(request.path), policy, stack, tuple(sorted(env)))


def _policy(config: Config, request: Request, source: sources.Source) -> Policy:
    host = facts.read()
    return policies.make(
        sizes.find(request.size),
        host_memory_bytes=host.memory_bytes,
        swap=host.swap,
        memory_bytes=request.memory_bytes,
        cpus=request.cpus,
        pids=request.pids,
        disk_bytes=request.disk_bytes,
        waived=request.waived,
        egress=_egress(config, request, source),
    )


def _stop_if_interrupted(signals: int) -> None:
    """A signal that came while we could not be interrupted, before anything was started."""
    if signals >= 0 and select.select([signals], [], [], 0)[0] and set(os.read(signals, 64)) - {signal.SIGWINCH}:
        raise KeyboardInterrupt


def _reclaim(config: Config, progress: Progress) -> None:
    """Takes down what dead runs left. What cannot be removed now is said, and does not stop this run."""
    from sandbox.supervisor.reclaim import reclaim

    try:
        for container_id, undone in reclaim(config):
            progress(f"reclaimed {container_id}: {len(undone)} leftovers of a run that was killed")
    except SandboxError as error:
        progress(f"warning: {error.message} (sandbox gc tries again)")


def _load(more: Callable[[], None]) -> None:
    """Imports what is needed after the container was made, while the engine makes it: a fifth of the start."""
    import sandbox.dyno.exits
    import sandbox.dyno.record
    import sandbox.dyno.verify
    import sandbox.dyno.watch
    import sandbox.engine.conmon
    import sandbox.supervisor.reclaim  # noqa: F401 - all loaded, none used here

    more()


def slug_key(config: Config, source: sources.Source, plan: Plan, runtime: Stack) -> str:
    """What a slug depends on: the app's content, its install step, and the images it is built and run with."""
    builder = stacks.find(config, Variant.BUILD).digest if plan.install else ""
    # The list that is fetched is read after the digest was taken: it is part of the key by itself.
    fetched = repr(plan.dependencies)
    inputs = (SLUG_FORMAT, source.digest, plan.install, fetched, runtime.digest, builder)
    return hashlib.sha256("\0".join(inputs).encode()).hexdigest()


def _egress(config: Config, request: Request, source: sources.Source) -> Egress:
    """What the operator asked for on the command line, else what the app asks for, else the internet."""
    from sandbox.app import appconfig
    from sandbox.supervisor import egress

    asked = appconfig.read(source)
    if request.egress:
        return egress.wish(config, request.egress, smtp=request.smtp)
    smtp = request.smtp or asked.smtp
    where = f"{source.path}/{appconfig.FILE}"
    return egress.make(config, asked.egress or "public", asked.allow, smtp=smtp, where=where)


def _watch(
    engine: Engine,
    dyno: Dyno,
    started: Started,
    request: Request,
    voice: Voice,
    log: KernelLog,
    signals: int,
) -> Result:
    """Watches the dyno to its end."""
    policy, port = dyno.launch.policy, dyno.launch.port
    from sandbox.dyno.watch import Watch, Wishes
    from sandbox.host.inside import Fetch

    def ask() -> Fetch | None:
        if not request.get:
            return None
        head = f"GET {request.get} HTTP/1.0\r\nHost: {started.container.container_id}\r\n\r\n"
        return Fetch(started.container.pid, port, head.encode(), timeout_s=_GET_TIMEOUT_S)

    def show(answer: bytes) -> None:
        for line in answer.decode("utf-8", "replace").splitlines()[:40]:
            voice.event(f"GET {request.get}: {line}")
        if not answer:
            voice.warning(f"GET {request.get}: no answer within {_GET_TIMEOUT_S} s")

    def up() -> Fetch | None:
        if dyno.place is not None and engine.networked:
            voice.event(f"Listening at http://{dyno.place.address}:{port} for this host only")
        return ask()

    try:
        return Watch(
            engine=engine,
            container=started.container,
            attachment=started.attachment,
            cgroup=started.cgroup,
            totals=started.totals,
            policy=policy,
            wishes=Wishes(
                timeout_s=request.timeout_s,
                grace_s=request.grace_s,
                sample_s=request.sample_s,
                boot_timeout_s=request.boot_timeout_s,
                port=port,
                stdin_fd=request.stdin_fd,
                tty_fd=request.stdin_fd if request.tty else -1,
            ),
            voice=voice,
            kernel_log=log,
            signals=signals,
            on_up=up,
            notices=dyno.notices,
            on_answer=show,
        ).run()
    finally:
        started.attachment.close()


def _plan(source: sources.Source, request: Request) -> Plan:
    """The app's plan; a command of the user's own replaces the need for a Procfile, not its strictness."""
    return detect.plan(source, need_command=not request.command)


def _command(plan: Plan, request: Request) -> tuple[tuple[str, ...], str]:
    """What runs behind the gate, and its process type.

    A login shell first, as at Heroku: it reads /app/.profile.d. A command of the user's own is passed as arguments
    and never parsed by a shell again.
    """
    types = plan.process_types()
    if request.command:
        return ("/bin/bash", "--login", "-c", 'exec "$@"', "bash", *request.command), request.process_type or "run"
    process_type = request.process_type or ("web" if "web" in types else next(iter(types)))
    if process_type not in types:
        raise UsageError(
            f"{request.path} has no process type {show(process_type)}.", hint="process types: " + ", ".join(types)
        )
    return ("/bin/bash", "--login", "-c", types[process_type]), process_type


def _environment(name: str, process_type: str, policy: Policy, request: Request, plan: Plan) -> dict[str, str]:
    """The app's whole environment. Nothing of ours is inherited. The user's variables win, but not over DYNO."""
    memory_mib = policy.memory_quota_bytes // MIB
    env = {
        "HOME": "/app",
        "PATH": "/app/.sandbox/python/bin:/app/node_modules/.bin:/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
        "MEMORY_AVAILABLE": str(memory_mib),
        # Heroku's buildpacks: one worker per WEB_MEMORY (512 MB; 2048 above 16 GiB).
        "WEB_CONCURRENCY": str(max(1, memory_mib // (512 if memory_mib <= 16384 else 2048))),
        "PS1": r"\w $ ",
    }
    if plan.kind is detect.Kind.PYTHON:
        env["PYTHONPATH"] = detect.SITE
    if plan.kind is detect.Kind.NODE:
        env["NODE_ENV"] = "production"
    if process_type == "web":
        env["PORT"] = str(PORT)
    if request.tty:
        env["TERM"] = os.environ.get("TERM", "xterm")
    return {**env, **dict(request.env), "DYNO": name}


def _run_name(config: Config) -> str:
    """``run.NNNN`` that no live dyno of this instance has."""
    taken = {str(header.get("name")) for _, header in journals.headers(config.journal_dir)}
    while True:
        name = f"run.{1000 + int.from_bytes(os.urandom(4)) % 9000}"
        if name not in taken:
            return name
