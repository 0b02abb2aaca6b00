"""Fixtures of every tier: an instance of its own per session, a Docker daemon of its own, and the command."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from sandbox.names import host_id
from tests.world import World

# A job in the background of a script starts with SIGINT ignored, and so would every command we start; it honours that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
MUTANT = ROOT / "tests" / "mutant.py"


@dataclasses.dataclass(frozen=True)
class Done:
    """What a finished command left: status, both outputs as text."""

    status: int
    out: str
    err: str

    def json(self) -> dict:
        return json.loads(self.out)


@dataclasses.dataclass
class Instance:
    """One separable instance, and the command that works on it."""

    state: Path
    run_dir: Path
    docker_host: str = ""
    world: World | None = None  # None: the machine's own network, for measurements that send nothing
    pool: str = ""
    config: str = ""

    def argv(self, *arguments: str, mutant: str = "") -> list[str]:
        options = [f"--state-dir={self.state}", f"--run-dir={self.run_dir}"]
        if self.docker_host:
            options.append(f"--docker-host={self.docker_host}")
        command = [sys.executable, str(MUTANT), mutant or "none", *options, *arguments]
        named = {"SANDBOX_POOL": self.pool, "SANDBOX_CONFIG": self.config}
        # On the command line, so that no test can forget it.
        command = ["env", *(f"{name}={value}" for name, value in named.items() if value), *command]
        return self.world.host.argv(*command) if self.world is not None else command

    def __call__(
        self,
        *arguments: str,
        stdin: str | bytes = "",
        mutant: str = "",
        timeout: float = 90,
        text: bool = True,
        **environ: str,
    ) -> Done:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(
            self.argv(*arguments, mutant=mutant),
            input=data,
            capture_output=True,
            timeout=timeout,
            env={**os.environ, **environ},
            check=False,
            cwd=ROOT,
        )
        return Done(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))

    def remove_network(self) -> None:
        """The router of an instance outlives its dynos by a minute; the tests do not wait for that."""
        if (self.run_dir / "net" / "router").exists():
            done = self("firewall", "remove")
            assert done.status == 0, done

    def start(self, *arguments: str, mutant: str = "", **more: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.argv(*arguments, mutant=mutant),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            **more,
        )

    def attack(self, engine: str, code: str, *options: str, mutant: str = "", timeout: float = 90) -> dict:
        """Runs a Python program inside a dyno; it prints one JSON document, which is returned."""
        done = self(
            "run", "--raw", "-q", "--engine", engine, *options, str(EXAMPLES / "shell"), "--", "python3", "-",
            stdin=code, mutant=mutant, timeout=timeout,
        )  # fmt: skip
        assert done.status == 0, f"the probe itself failed: {done}"
        return json.loads(done.out.splitlines()[-1])


def default_state() -> Path:
    return Path(os.environ.get("SANDBOX_STATE_DIR") or "/var/lib/sandbox")


@pytest.fixture(scope="session")
def home() -> Iterator[Path]:
    """A folder for a session's instances, short enough for Unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="sbt-"))
    path.chmod(0o711)
    with World(path / "world"):
        yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def world(home: Path) -> World:
    """The namespaces in which the product runs and its packets end. No test runs it in the machine's own."""
    return World.current


@pytest.fixture(scope="session")
def docker_host(home: Path, world: World) -> Iterator[str]:
    """A Docker daemon of our own, from Debian's docker.io: own data, own state, own socket, no bridge, no iptables.

    In a guest the guest's own: an emulated processor takes minutes to hand a daemon the stack image.
    """
    if there := os.environ.get("SANDBOX_TEST_DOCKER"):
        yield there
        return
    base = home / "docker"
    base.mkdir()
    socket = f"unix://{base}/docker.sock"
    log = (base / "log").open("wb")
    daemon = subprocess.Popen(
        [
            *world.host.argv(), "dockerd", "--data-root", str(base / "data"), "--exec-root", str(base / "exec"), "-H", socket,
            "-p", str(base / "pid"), "--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false",
        ],
        stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (base / "docker.sock").exists() or "API listen" not in (base / "log").read_text():
        assert daemon.poll() is None, (base / "log").read_text()
        assert time.monotonic() < deadline, (base / "log").read_text()
        time.sleep(0.1)
    yield socket
    daemon.send_signal(signal.SIGTERM)
    daemon.wait(30)
    log.close()
    unmount_below(base)


def unmount_below(folder: Path) -> None:
    """What a Docker daemon leaves mounted in its own folders: a network namespace, and its data when it was killed."""
    targets = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for target in sorted((t for t in targets if t.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "-l", target], check=True)


def make_instance(home: Path, name: str, docker_host: str = "") -> Instance:
    """An instance of its own that borrows the stack images of the default one, with an address pool of its own."""
    state, run_dir = home / name / "state", home / name / "run"
    state.mkdir(parents=True, mode=0o711)
    run_dir.mkdir(mode=0o711)
    (home / name).chmod(0o711)
    (state / "stack").symlink_to(default_state() / "stack")
    number = zlib.crc32(str(home / name).encode()) % 200
    instance = Instance(state, run_dir, docker_host, World.current, "" if name == "main" else f"10.{number}.0.0/20")
    World.current.on_close.append(instance.remove_network)
    return instance


@pytest.fixture(scope="session")
def sandbox(home: Path, docker_host: str) -> Iterator[Instance]:
    """The session's instance, for both engines; at the end nothing of it may be left."""
    instance = make_instance(home, "main", docker_host)
    if os.environ.get("SANDBOX_TEST_DOCKER"):
        # The image that the guest's own instance imported, under this one's name: it is the same stack.
        listing = ["docker", "-H", docker_host, "images", "--format", "{{.Repository}}:{{.Tag}}"]
        done = subprocess.run(listing, capture_output=True, text=True, check=True)
        for name in (line for line in done.stdout.split() if line.startswith("sandbox-stack-")):
            own = f"sandbox-stack-{host_id(str(instance.state))}:{name.partition(':')[2]}"
            subprocess.run(["docker", "-H", docker_host, "tag", name, own], check=True)
    yield instance
    left = census(instance)
    assert left == [], left


# In a guest each runtime has a session of its own: SANDBOX_RUNTIME says which of the embedded engine's.
@pytest.fixture(params=os.environ.get("SANDBOX_TEST_ENGINES", "oci docker").split())
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def app(tmp_path: Path):
    """Makes an app's folder from file names and contents; a name that ends in ! is executable."""
    return lambda **files: make_app(tmp_path, files)


def make_app(base: Path, files: dict[str, str]) -> str:
    folder = base / "app"
    folder.mkdir(exist_ok=True)
    base.chmod(0o755)
    for name, content in files.items():
        path = folder / name.rstrip("!")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        if name.endswith("!"):
            path.chmod(0o755)
    return str(folder)


def census(instance: Instance) -> list[str]:
    """Everything of that instance that is on this machine now: what a finished or reclaimed run must not leave."""
    from sandbox.config import Config
    from sandbox.host import cgroup

    config = Config(str(instance.state), str(instance.run_dir), instance.docker_host)
    mine = f"sbx-{config.host}-"
    found = [
        f"mount {line.split()[4]}"
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if str(instance.run_dir) in line and line.split()[4] != str(instance.run_dir / "net" / "router")
    ]
    found += [f"address {path.name}" for path in instance.run_dir.glob("net/dynos/*")]
    if (instance.run_dir / "net" / "router").exists():
        links = subprocess.run(
            ["nsenter", f"--net={instance.run_dir}/net/router", "ip", "-o", "link"], capture_output=True, text=True, check=False
        ).stdout  # fmt: skip
        found += [f"link {line.split()[1]}" for line in links.splitlines() if "sbx-" in line]
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if str(instance.state) in backing.read_text():
                found.append(f"loop {backing.parts[3]}")
        except OSError:
            continue
    for path in set(cgroup.Cgroup.at("").paths.values()):
        found += [f"cgroup {path}/{name}" for name in os.listdir(path) if name.startswith(mine)]
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                arguments = Path(f"/proc/{name}/cmdline").read_bytes()
            except OSError:
                continue
            if mine.encode() in arguments and b"sandbox.firewall.guard" not in arguments:
                found.append(f"process {name} {arguments[:80]!r}")
    for folder in (config.dynos_dir, config.layers_dir, config.runtime_dir, config.journal_dir):
        if os.path.isdir(folder):
            # crun keeps a cache of compiled filters beside its containers.
            found += [f"{folder}/{name}" for name in os.listdir(folder) if name != ".cache"]
    if os.path.isdir(config.disks_dir):
        found += [f"disk {name}" for name in os.listdir(config.disks_dir) if name.startswith("sbx-")]
    if os.path.isdir("/run/sandbox-uids"):
        for name in os.listdir("/run/sandbox-uids"):
            if name.isdigit() and str(instance.state) in Path(f"/run/sandbox-uids/{name}").read_text():
                found.append(f"uid range {name}")
    if instance.docker_host:
        listing = subprocess.run(
            ["docker", "-H", instance.docker_host, "ps", "-a", "--filter", f"label=sandbox.host={config.host}", "-q"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        found += [f"container {line}" for line in listing.stdout.split()]
    return found


def wait_for(condition, timeout: float = 30.0, what: str = "the condition"):
    """Waits for a condition and returns its value."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come true within {timeout} s"
        time.sleep(0.02)
    return value


def files(**named: str) -> dict[str, str]:
    return named


def lines(done: Done, source: str = "app") -> Sequence[str]:
    """The messages of one source in Heroku's format."""
    return [line.split("]: ", 1)[1] for line in done.out.splitlines() if f" {source}[" in line]
