"""What kind of app this is, what its build needs, and its obvious command. Pure: reads a scanned source only.

Dependencies are fetched by our tools from a list that is checked here first. A requirement that is not a name with
versions (a URL, a path, an option, an editable install) could make them read files of the host, reach other
servers, or run the package's code outside the wall: it is refused with its line.
"""

from __future__ import annotations

import json
import re
from enum import Enum
from typing import Any, NamedTuple, NoReturn

from sandbox.app import procfile
from sandbox.app.source import Source
from sandbox.errors import AppError
from sandbox.units import show


class Kind(Enum):
    PYTHON = "python"
    NODE = "node"
    PLAIN = "plain"


class Dependencies(NamedTuple):
    """What the fetch step gets: checked files by name, and nothing else of the app."""

    files: tuple[tuple[str, str], ...]


class Plan(NamedTuple):
    """How the app is built and run. ``dependencies`` is None when there is nothing to fetch."""

    kind: Kind
    types: tuple[tuple[str, str], ...]
    dependencies: Dependencies | None
    install: str = ""  # the build's command line, for the shell of the build dyno

    def process_types(self) -> dict[str, str]:
        return dict(self.types)


_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_EXTRAS = rf"(?:\[\s*{_NAME}(?:\s*,\s*{_NAME})*\s*\])?"
_VERSION = r"(?:===|==|~=|!=|<=|>=|<|>)\s*[A-Za-z0-9.*+!_-]+"
_VERSIONS = rf"(?:\(?\s*{_VERSION}(?:\s*,\s*{_VERSION})*\s*\)?)?"
_MARKER = r"(?:;[\sA-Za-z0-9_.'\"()<>=!~,-]+)?"
_HASHES = r"(?:\s+--hash=sha256:[0-9a-f]{64})*"
_REQUIREMENT = rf"{_NAME}\s*{_EXTRAS}\s*{_VERSIONS}\s*{_MARKER}{_HASHES}"
_NPM_NAME = r"(?:@[A-Za-z0-9~-][A-Za-z0-9._~-]*/)?[A-Za-z0-9~-][A-Za-z0-9._~-]*"
_NPM_RANGE = r"[0-9A-Za-z.^~<>=|*+ -]{0,256}"
_NPM_INTEGRITY = r"(?:sha(?:1|256|384|512)-[A-Za-z0-9+/=]+ ?)+"

_LONGEST = 2000  # characters of a requirement with its hashes

SITE = "/app/.sandbox/python"
_PIP = f"pip install --no-index --find-links /tmp/depot/wheels --no-cache-dir --no-warn-script-location --target {SITE}"
_NPM = (
    "npm install --offline --omit=dev --no-audit --no-fund --no-update-notifier --cache /tmp/depot/npm --loglevel=error"
)


def plan(source: Source, *, need_command: bool = True) -> Plan:
    """The build plan of an app; AppError when a command is needed and neither Procfile nor files say one."""
    names = source.names()
    kind, dependencies, install = Kind.PLAIN, None, ""
    if "requirements.txt" in names or "pyproject.toml" in names:
        kind = Kind.PYTHON
        dependencies, install = _python(source, names)
    elif "package.json" in names:
        kind = Kind.NODE
        dependencies, install = _node(source, names)
    if "Procfile" in names:
        types = procfile.parse(source.read("Procfile", limit=procfile.MAX_BYTES + 1), f"{source.path}/Procfile")
    else:
        types = _obvious(source, kind, names) if need_command else {}
    return Plan(kind, tuple(types.items()), dependencies, install)


def _obvious(source: Source, kind: Kind, names: frozenset[str]) -> dict[str, str]:
    executables = {
        entry.path for entry in source.entries if entry.kind == "file" and entry.executable and "/" not in entry.path
    }
    if kind is Kind.NODE:
        scripts = _package(source).get("scripts")
        if isinstance(scripts, dict) and isinstance(scripts.get("start"), str):
            return {"web": str(scripts["start"])}
        for name in ("server.js", "index.js"):
            if name in names:
                return {"web": f"node {name}"}
    if kind is Kind.PYTHON:
        for name in ("app.py", "main.py", "server.py"):
            if name in names:
                return {"web": f"python3 {name}"}
    for name in ("run", "start", "server", "app", "web"):
        if name in executables:
            return {"web": f"./{name}"}
    if len(executables) == 1:
        return {"web": f"./{executables.pop()}"}
    raise AppError(
        f"{source.path} has no Procfile and no obvious command; nothing was started.",
        hint=f"echo 'web: ./serve' > {source.path}/Procfile, or give a command: sandbox run {source.path} -- ./serve",
    )


def _python(source: Source, names: frozenset[str]) -> tuple[Dependencies | None, str]:
    if "requirements.txt" in names:
        text = _requirements(
            source.read("requirements.txt").decode("utf-8", "replace"), f"{source.path}/requirements.txt"
        )
        if not text:
            return None, ""
        return Dependencies((("requirements.txt", text),)), f"{_PIP} -r requirements.txt"
    import tomllib  # only this kind of app pays for the parser

    where = f"{source.path}/pyproject.toml"
    try:
        project = tomllib.loads(source.read("pyproject.toml").decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise AppError(f"{where}: {error}; nothing was started.") from error
    if "build-system" not in project and "project" not in project:
        return None, ""  # settings of tools only
    wanted: list[str] = []
    for value in (
        project.get("build-system", {}).get("requires", ["setuptools"]),
        project.get("project", {}).get("dependencies", []),
    ):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise AppError(f"{where}: requirements must be a list of strings; nothing was started.")
        wanted += value
    text = _requirements("\n".join(wanted), where, numbered=False)
    return Dependencies((("requirements.txt", text),)), f"{_PIP} ."


def _requirements(text: str, path: str, *, numbered: bool = True) -> str:
    """The requirements, each checked, one a line; AppError with ``file:line`` for what is not a name with versions."""
    checked = []
    joined = re.sub(r"\\\r?\n", " ", text)
    for number, line in enumerate(joined.split("\n"), 1):
        requirement = " ".join(re.sub(r"(^|\s)#.*$", "", line[: _LONGEST + 1]).split())
        if not requirement:
            continue
        # Single spaces and a bound first: the pattern's optional parts meet, and a long run of spaces between them
        # would be tried in every way there is.
        if len(line) > _LONGEST or not re.fullmatch(_REQUIREMENT, requirement):
            where = f"{path}:{number}" if numbered else path
            raise AppError(
                f"{where}: {show(requirement)} is not a package name with versions; nothing was started.",
                hint="URLs, paths, options and editable installs are not fetched; write name==version.",
            )
        checked.append(requirement)
    return "\n".join((*checked, "")) if checked else ""


def _package(source: Source) -> dict[str, Any]:
    where = f"{source.path}/package.json"
    try:
        value = json.loads(source.read("package.json", limit=4 << 20))
    except (ValueError, RecursionError) as error:
        raise AppError(f"{where}: not JSON: {error}; nothing was started.") from error
    if not isinstance(value, dict):
        raise AppError(f"{where}: not a JSON object; nothing was started.")
    return value


def _node(source: Source, names: frozenset[str]) -> tuple[Dependencies | None, str]:
    where = f"{source.path}/package.json"
    package = _package(source)
    kept: dict[str, object] = {"name": "app", "version": "0.0.0", "private": True}
    for section in ("dependencies", "optionalDependencies"):
        wanted = package.get(section, {})
        if not isinstance(wanted, dict):
            raise AppError(f"{where}: {section} is not an object; nothing was started.")
        for name, versions in wanted.items():
            if (
                not re.fullmatch(_NPM_NAME, name)
                or not isinstance(versions, str)
                or not re.fullmatch(_NPM_RANGE, versions)
            ):
                _refuse_npm(where, f"{section}: {show(f'{name}: {versions}')} is not a name with a version range")
        if wanted:
            kept[section] = wanted
    scripts = package.get("scripts")
    builds = isinstance(scripts, dict) and isinstance(scripts.get("build"), str)
    install = _NPM + (" && npm run build" if builds else "")
    if len(kept) == 3:
        return None, "npm run build" if builds else ""
    files = [("package.json", json.dumps(kept))]
    if "package-lock.json" in names:
        files.append(("package-lock.json", _lock(source)))
    return Dependencies(tuple(files)), install


def _lock(source: Source) -> str:
    """The lock file without addresses: npm then asks its registry, and the integrity hashes still bind the content."""
    where = f"{source.path}/package-lock.json"
    try:
        lock = json.loads(source.read("package-lock.json", limit=32 << 20))
        packages = dict(lock["packages"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AppError(
            f"{where}: not a lock file of version 2 or 3; nothing was started.", hint="npm install --package-lock-only"
        ) from error
    for name, entry in packages.items():
        if not isinstance(entry, dict) or ".." in name or (name and not name.startswith("node_modules/")):
            _refuse_npm(where, f"package {show(name)} is not below node_modules")
        if entry.get("link") or not re.fullmatch(_NPM_RANGE, str(entry.get("version", ""))):
            _refuse_npm(where, f"package {show(name)} is a link or has no version")
        if not re.fullmatch(_NPM_INTEGRITY, str(entry.get("integrity", "sha1-x"))):
            _refuse_npm(where, f"package {show(name)} has a malformed integrity hash")
        entry.pop("resolved", None)
        for section in ("dependencies", "optionalDependencies", "peerDependencies"):
            for versions in dict(entry.get(section) or {}).values():
                if not re.fullmatch(_NPM_RANGE, str(versions)):
                    _refuse_npm(where, f"package {show(name)}: {show(str(versions))} is not a version range")
    packages[""] = {
        k: v
        for k, v in packages.get("", {}).items()
        if k in ("dependencies", "optionalDependencies", "devDependencies")
    }
    return json.dumps({"name": "app", "version": "0.0.0", "lockfileVersion": 3, "requires": True, "packages": packages})


def _refuse_npm(where: str, reason: str) -> NoReturn:
    raise AppError(
        f"{where}: {reason}; nothing was started.",
        hint="URLs, paths and repositories are not fetched; write a version range of a published package.",
    )
