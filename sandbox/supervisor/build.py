"""From an app's folder to its slug: staged, built inside a dyno behind the wall, packed, cached by content.

A build has two steps, each a dyno of its own. **Fetch** runs pip or npm of our build stack on a list that was
checked, through the host firewall and with nothing of the app: wheels only, no install scripts. **Install** runs the
app's own build with the fetched packages and no network.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable

from sandbox.app import slug as slugs
from sandbox.app import source as sources
from sandbox.app.detect import Dependencies, Kind, Plan
from sandbox.app.slug import Slug
from sandbox.app.source import Source
from sandbox.config import Config
from sandbox.dyno.dyno import Dyno, Launch
from sandbox.dyno.logs import Framer
from sandbox.dyno.outlet import Outlet
from sandbox.dyno.watch import Watch, Wishes
from sandbox.engine.base import Engine, Stream
from sandbox.errors import AppError, BuildError
from sandbox.host import stack as stacks
from sandbox.host.facts import Host
from sandbox.host.oom import KernelLog
from sandbox.host.stack import Stack, Variant
from sandbox.policy import policy as policies
from sandbox.policy import sizes
from sandbox.policy.egress import NOTHING, Egress
from sandbox.policy.spec import APP_UID
from sandbox.supervisor.reclaim import destroy_container
from sandbox.units import escape

# Heroku ends a compile after 15 minutes.
BUILD_TIMEOUT_S = 900.0
_BUILD_SIZE = "standard-2x"
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
# What an operator's environment may say about mirrors and proxies, in the words of pip and npm.
_PASSED_ON = (
    *("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "npm_config_registry"),
    *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
)
_FETCH = {
    Kind.PYTHON: "pip download --only-binary=:all: --no-cache-dir --disable-pip-version-check -q "
    "-d /tmp/depot/wheels -r requirements.txt",
    Kind.NODE: "npm install --ignore-scripts --omit=dev --no-audit --no-fund --no-update-notifier "
    "--cache /tmp/depot/npm --loglevel=error",
}
Progress = Callable[[str], None]


class Builder:
    """Builds slugs on one engine."""

    def __init__(self, config: Config, engine: Engine, *, host: Host, progress: Progress, signals: int) -> None:
        self._config, self._engine = config, engine
        self._host, self._progress, self._signals = host, progress, signals

    def slug(self, source: Source, plan: Plan, key: str) -> Slug:
        """Builds the app's slug and caches it under ``key``. Raises AppError, BuildError, and what a start raises."""
        build_stack = stacks.find(self._config, Variant.BUILD) if plan.install else None
        # Beside the slugs, not in a temporary folder: it can hold as much as a slug does.
        with tempfile.TemporaryDirectory(prefix=f".work.{os.getpid()}.", dir=self._config.slugs_dir) as work:
            os.chmod(work, 0o755)  # noqa: S103 - mksquashfs reads it as nobody
            staged = f"{work}/staged"
            os.mkdir(staged, 0o755)
            if sources.scan(source.path, copy_to=staged).digest != source.digest:
                raise AppError(f"{source.path} changed while it was read; nothing was started.", hint="run it again.")
            if build_stack is None:
                self._progress("packing the slug")
                return slugs.pack(self._config, staged, key)
            packed = slugs.pack(self._config, staged, hashlib.sha256(f"source\0{source.digest}".encode()).hexdigest())
            depot = self._fetch(plan, build_stack, work) if plan.dependencies else None
            return self._install(plan, build_stack, packed, depot, work, key)

    def _fetch(self, plan: Plan, stack: Stack, work: str) -> str:
        """Runs the fetch dyno; returns the folder with what it fetched."""
        self._progress(f"fetching {plan.kind.value} packages")
        empty = f"{work}/empty"
        os.mkdir(empty, 0o755)
        with open(f"{empty}/.keep", "wb"):
            pass
        nothing = slugs.pack(self._config, empty, hashlib.sha256(b"nothing").hexdigest())
        env = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        if os.path.exists(_CERTIFICATES):
            name = "/tmp/fetch/ca.pem"
            env |= {"PIP_CERT": name, "SSL_CERT_FILE": name, "NODE_EXTRA_CA_CERTS": name}
        dependencies = plan.dependencies
        depot = f"{work}/depot"
        os.mkdir(depot, 0o700)

        def fill(disk: str, uid: int) -> None:
            _write_files(f"{disk}/tmp/fetch", dependencies, uid)

        def take(disk: str) -> None:
            if os.path.lexists(f"{disk}/tmp/depot"):
                sources.scan(f"{disk}/tmp/depot", copy_to=depot, built=True)

        command = f"cd /tmp/fetch && {_FETCH[plan.kind]}"
        self._run("fetch", command, nothing, stack, self._reach(plan.kind, stack, env), env, fill, take)
        return depot

    def _reach(self, kind: Kind, stack: Stack, env: dict[str, str]) -> Egress:
        """The internet, and the package index where the operator's own resolver says it is, even if that is local.

        Which index is asked is the operator's choice, never the app's. An index at a local address opens that
        address, its port and its name, for this one step.
        """
        from sandbox.supervisor import indexes

        found = indexes.egress(self._config, indexes.addresses(kind, stack, env))
        for name, address in found.pinned:
            self._progress(f"the package index {escape(name)} is at {address}: this step may reach it")
        return found

    def _install(self, plan: Plan, stack: Stack, packed: Slug, depot: str | None, work: str, key: str) -> Slug:
        self._progress(f"building the {plan.kind.value} app")
        built = f"{work}/built"
        os.mkdir(built, 0o755)

        def fill(disk: str, uid: int) -> None:
            if depot is not None:
                shutil.copytree(depot, f"{disk}/tmp/depot", symlinks=True)
                _chown(f"{disk}/tmp/depot", uid)

        def take(disk: str) -> None:
            sources.scan(f"{os.path.dirname(disk)}/app", copy_to=built, built=True)

        command = plan.install
        if plan.kind is Kind.PYTHON:
            # Times in a slug are fixed, so byte code must not depend on them.
            compile_all = "python3 -m compileall -q --invalidation-mode unchecked-hash /app/.sandbox"
            command = f"{plan.install} && {{ {compile_all}; true; }}"
        self._run("build", command, packed, stack, NOTHING, {}, fill, take)
        self._progress("packing the slug")
        return slugs.pack(self._config, built, key)

    def _run(
        self,
        name: str,
        command: str,
        slug: Slug,
        stack: Stack,
        egress: Egress,
        env: dict[str, str],
        fill: Callable[[str, int], None],
        take: Callable[[str], None],
    ) -> None:
        """One step in a dyno of its own; ``fill`` and ``take`` see its disk before the start and after the end."""
        policy = policies.for_build(
            sizes.find(_BUILD_SIZE), host_memory_bytes=self._host.memory_bytes, swap=self._host.swap, egress=egress
        )
        launch = Launch(
            name=f"{name}.1",
            app=name,
            policy=policy,
            stack=stack,
            slug_image=slug.image,
            command=("/bin/bash", "-c", command),
            env={"HOME": "/tmp/home", "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", **env},
        )
        dyno = Dyno(self._config, self._engine, launch)
        voice = _Lines(name, self._progress)
        log = KernelLog()
        try:
            slot = dyno.prepare()
            fill(slot.paths.disk, slot.uid_base + APP_UID)
            started = dyno.start()
            result = Watch(
                engine=self._engine,
                container=started.container,
                attachment=started.attachment,
                cgroup=started.cgroup,
                totals=started.totals,
                policy=policy,
                wishes=Wishes(timeout_s=BUILD_TIMEOUT_S),
                voice=voice,
                kernel_log=log,
                signals=self._signals,
                notices=dyno.notices,
            ).run()
            facts = result.facts
            if facts.status != 0 or facts.oom or facts.stopped or facts.timed_out_s is not None:
                why = (
                    *(["ran out of memory"] if facts.oom else []),
                    *([f"took longer than {BUILD_TIMEOUT_S:.0f} s"] if facts.timed_out_s is not None else []),
                    *(["was stopped"] if facts.stopped else []),
                    f"failed with status {facts.status}",
                )[0]
                raise BuildError(
                    f"the {name} step {why}; nothing was started.",
                    hint="the last lines above are its own." if voice.tail else "sandbox doctor",
                    details="\n".join(voice.tail),
                )
            take(slot.paths.disk)
        finally:
            log.close()
            dyno.close(destroy_container(self._config, self._engine))


class _Lines:
    """The voice of a build: its lines as progress, the last of them kept for the error."""

    def __init__(self, name: str, progress: Progress) -> None:
        self._framer, self._progress = Framer(name), progress
        self.outlets: list[Outlet] = []
        self.tail: list[str] = []

    def output(self, stream: Stream, data: bytes) -> None:
        self._say(self._framer.feed(stream, data))

    def _say(self, lines: bytes) -> None:
        for line in lines.decode("utf-8", "replace").splitlines():
            text = line.partition("]: ")[2]
            self.tail = [*self.tail[-29:], text]

    def event(self, message: str) -> None:
        self._progress(message)

    def warning(self, message: str) -> None:
        self.tail = [*self.tail[-29:], escape(message)]

    def notice(self, part: str, message: str) -> None:
        self.warning(f"sandbox[{part}]: {message}")

    def finish(self) -> None:
        self._say(self._framer.flush())


def _write_files(folder: str, dependencies: Dependencies | None, uid: int) -> None:
    os.mkdir(folder, 0o755)
    for name, text in dependencies.files if dependencies else ():
        with open(f"{folder}/{name}", "w", encoding="utf-8") as file:
            file.write(text)
    if os.path.exists(_CERTIFICATES):
        shutil.copyfile(_CERTIFICATES, f"{folder}/ca.pem")
    _chown(folder, uid)


def _chown(folder: str, uid: int) -> None:
    os.chown(folder, uid, uid)
    for path, folders, names in os.walk(folder):
        for name in (*folders, *names):
            os.lchown(f"{path}/{name}", uid, uid)
