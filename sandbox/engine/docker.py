"""The Docker engine (API 1.41 and newer), by explicit address. The only module that imports the docker package."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Callable
from typing import Any

import docker
import docker.errors
import requests.exceptions

from sandbox.config import Config
from sandbox.engine import wire
from sandbox.engine.base import Chunk, Container, Stream
from sandbox.errors import EngineError
from sandbox.host import stack as stacks
from sandbox.policy import docker_body
from sandbox.policy.clauses import Clause
from sandbox.policy.spec import ContainerSpec
from sandbox.units import escape

_MIN_API = (1, 41)
_TIMEOUT_S = 60
_HOST_LABEL = "sandbox.host"
_STREAMS = {1: Stream.STDOUT, 2: Stream.STDERR}
_FAULTS = (docker.errors.DockerException, requests.exceptions.RequestException)


class DockerEngine:
    """A Docker daemon at ``config.docker_host``; its default runtime makes the containers."""

    name = "docker"
    # userns-remap is one range for a whole daemon: it cannot tell dynos apart, so we ask for none and give each
    # dyno an unprivileged uid of its own instead.
    user_namespaces = False
    brings_mounts = True
    networked = True

    def __init__(self, config: Config, runtime: str = "runc") -> None:
        self.runtime = runtime
        self._config = config
        self._info: dict[str, Any] = {}
        self._specs: dict[str, ContainerSpec] = {}
        path = config.docker_host.removeprefix("unix://")
        if config.docker_host.startswith("unix://") and not _is_socket(path):
            raise EngineError(
                f"there is no Docker socket at {path}.", hint="start dockerd, or name its socket with --docker-host."
            )
        try:
            self._api = docker.APIClient(base_url=config.docker_host, version="auto", timeout=_TIMEOUT_S)
        except _FAULTS as error:
            raise EngineError(
                f"the Docker daemon at {config.docker_host} does not answer: {_said(error)}", hint="sandbox doctor"
            ) from error
        if tuple(int(part) for part in self._api.api_version.split(".")) < _MIN_API:
            raise EngineError(f"Docker API {self._api.api_version} is older than 1.41.", hint="upgrade Docker.")

    def version(self) -> str:
        info = self._call(self._api.version)
        return escape(f"Docker {info.get('Version', '?')} (API {info.get('ApiVersion', '?')})")

    def missing(self) -> dict[Clause, str]:
        info = self._host_info()
        lacking = {
            "MemoryLimit": Clause.MEMORY,
            "SwapLimit": Clause.SWAP,
            "PidsLimit": Clause.PIDS,
            "CpuCfsQuota": Clause.CPU,
        }
        reason = "Docker says that this host's kernel has no such control"
        found = {clause: reason for key, clause in lacking.items() if not info.get(key)}
        if not any("name=seccomp" in option for option in info.get("SecurityOptions") or []):
            found[Clause.SECCOMP] = "this Docker was built without seccomp"
        return found

    def prepare(self, stack_digest: str, stack_root: str) -> str:
        name = f"sandbox-stack-{self._config.host}:{stack_digest[:16]}"
        if self._call(self._api.images, name):
            return name
        # One import at a time: two would leave the first one's image without a name.
        lock = os.open(f"{self._config.run_dir}/docker-import.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self._call(self._api.images, name):
                self._import(name, stack_root)
        finally:
            os.close(lock)
        return name

    def _import(self, name: str, stack_root: str) -> None:
        repository, _, tag = name.partition(":")
        tree = stacks.tar_stream(stack_root)
        answer = self._call(self._api.import_image_from_stream, tree, repository=repository, tag=tag)
        if "error" in str(answer):
            raise EngineError(f"Docker did not take the stack image: {escape(str(answer)[-300:])}")

    def document(self, spec: ContainerSpec) -> dict[str, object]:
        """The body of the create request."""
        return docker_body.create_body(spec)

    def create(self, spec: ContainerSpec, folder: str) -> Container:
        body = self.document(spec)
        labels = body["Labels"]
        assert isinstance(labels, dict)  # noqa: S101 - our own literal, for the type checker
        labels[_HOST_LABEL] = self._config.host
        parent = self._cgroup_parent(spec.cgroup)
        host = body["HostConfig"]
        assert isinstance(host, dict)  # noqa: S101 - our own literal, for the type checker
        host["CgroupParent"] = parent
        self._call(self._api.create_container_from_config, body, spec.container_id)
        self._specs[spec.container_id] = spec
        return Container(spec.container_id, 0)

    def _host_info(self) -> dict[str, Any]:
        """What the daemon says of its host; asked once."""
        if not self._info:
            self._info = dict(self._call(self._api.info))
        return self._info

    def _cgroup_parent(self, path: str) -> str:
        """Docker's systemd driver wants a slice, its cgroupfs driver a path."""
        if self._host_info().get("CgroupDriver") == "systemd":
            return path.strip("/").replace("-", "_").replace("/", "-") + ".slice"
        return path

    def attach(self, container: Container) -> DockerAttachment:
        spec = self._specs[container.container_id]
        parameters = {"stdin": int(spec.stdin), "stdout": 1, "stderr": 1, "stream": 1}
        raw = self._call(self._api.attach_socket, container.container_id, params=parameters)
        return DockerAttachment(self._api, container.container_id, raw, tty=spec.tty)

    def start(self, container: Container) -> Container:
        self._call(self._api.start, container.container_id)
        return Container(container.container_id, int(self._inspect(container.container_id)["State"]["Pid"]))

    def _inspect(self, container_id: str) -> dict[str, Any]:
        return dict(self._call(self._api.inspect_container, container_id))

    def signals_itself(self, container: Container, number: int) -> bool:
        return False

    def exit_status(self, container: Container, *, timeout_s: float) -> int | None:
        try:
            answer = self._api.wait(container.container_id, timeout=max(1, round(timeout_s)))
        except _FAULTS:
            return None
        status = answer.get("StatusCode")
        return int(status) if isinstance(status, int) else None

    def lost(self, container: Container) -> bool:
        try:
            self._api.inspect_container(container.container_id)
        except _FAULTS:
            return True
        return False

    def destroy(self, container_id: str, folder: str) -> None:
        try:
            self._api.remove_container(container_id, force=True, v=True)
        except docker.errors.NotFound:
            return
        except docker.errors.APIError as error:
            if error.response is None or error.response.status_code != 409:  # removal already in progress
                raise EngineError(f"Docker did not remove {container_id}: {_said(error)}") from error
        except _FAULTS as error:
            raise EngineError(f"Docker did not remove {container_id}: {_said(error)}") from error

    def remove_strays(self, known: Callable[[], set[str]]) -> list[str]:
        """Removes this instance's containers that no journal knows: a create call may outlive its caller.

        ``known`` is asked after the containers are listed: a dyno that starts meanwhile has a journal by then.
        """
        label = f"{_HOST_LABEL}={self._config.host}"
        removed = []
        found = self._call(self._api.containers, all=True, filters={"label": label})
        keep = known()
        for entry in found:
            name = str(entry["Labels"].get(docker_body.LABEL, ""))
            if name not in keep:
                self.destroy(str(entry["Id"]), "")
                removed.append(name)
        return removed

    def _call(self, function: Any, *arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except _FAULTS as error:
            raise EngineError(f"Docker: {_said(error)}", hint="sandbox doctor") from error


class DockerAttachment:
    """Docker's hijacked connection: frames of 8 header bytes and data, or a raw stream with a terminal."""

    def __init__(self, api: docker.APIClient, container_id: str, raw: Any, *, tty: bool) -> None:
        self._api = api
        self._container_id = container_id
        self._raw = raw
        self._socket: socket.socket = getattr(raw, "_sock", raw)
        self._socket.setblocking(False)
        self._tty = tty
        self._buffer = b""
        self._ended = False

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> list[Chunk] | None:
        chunks: list[Chunk] = []
        for _ in range(8):
            try:
                piece = self._socket.recv(65536)
            except BlockingIOError:
                break
            except OSError:
                piece = b""
            if not piece:
                self._ended = True
                break
            if self._tty:
                chunks.append((Stream.STDOUT, piece))
            else:
                self._buffer += piece
                chunks += self._frames()
        return chunks if chunks or not self._ended else None

    def _frames(self) -> list[Chunk]:
        chunks = []
        while len(self._buffer) >= 8:
            length = int.from_bytes(self._buffer[4:8], "big")
            if len(self._buffer) < 8 + length:
                break
            stream = _STREAMS.get(self._buffer[0])
            if stream is not None:
                chunks.append((stream, self._buffer[8 : 8 + length]))
            self._buffer = self._buffer[8 + length :]
        return chunks

    def send(self, data: bytes) -> int:
        return wire.send(self._socket, data)

    def end_input(self) -> None:
        wire.end_input(self._socket)

    def resize(self, rows: int, columns: int) -> None:
        try:
            self._api.resize(self._container_id, height=rows, width=columns)
        except _FAULTS:
            return  # the container ended in between

    def close(self) -> None:
        self._raw.close()
        self._socket.close()


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def _said(error: Exception) -> str:
    text = getattr(error, "explanation", None) or str(error)
    return escape(str(text))[:400]
