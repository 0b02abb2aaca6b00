"""What the customer hands in: parsed strictly, refused with file, line and next action."""

from __future__ import annotations

import json
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.app import detect, procfile, source
from sandbox.errors import AppError, ProcfileError


def parse(text: str | bytes):
    return procfile.parse(text.encode() if isinstance(text, str) else text, "app/Procfile")


def test_a_procfile():
    text = "# comment\n\nweb: gunicorn app:app\nworker-2 :  ./work --fast  \r\n"
    assert parse(text) == {"web": "gunicorn app:app", "worker-2": "./work --fast"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("web gunicorn", r'app/Procfile:1: "web gunicorn" has no colon'),
        ("web: a\nworker:   ", r'app/Procfile:2: process type "worker" has no command'),
        ("web: a\n\nweb: b", r'app/Procfile:3: process type "web" stands in line 1 already'),
        ("web server: a", r'app/Procfile:1: process type "web server" contains a space'),
        ("wéb: a", r"app/Procfile:1: process type .* is not 1 to 128 of"),
        (f"{'x' * 129}: a", r"is not 1 to 128 of"),
        (": a", r"is not 1 to 128 of"),
        ("web: a\0b", r"app/Procfile:1: the line holds a NUL byte"),
        (b"web: \xff", r"app/Procfile:1: the line is not UTF-8"),
        ("a: b\nweb: " + "x" * 40_000, r"app/Procfile:2: the line has 40005 bytes"),
        ("web: " + "x" * 1_000_000, r"app/Procfile:1: the file has 1000005 bytes"),
        ("", r"app/Procfile:1: it names no process type"),
        ("\x1b[2J: x", r'"\\x1b\[2J"'),
    ],
)
def test_procfile_errors_name_file_and_line(text, message):
    with pytest.raises(ProcfileError, match=message) as error:
        parse(text)
    assert error.value.message.endswith("nothing was started.")
    assert error.value.message.isprintable()


@given(st.binary(max_size=400))
def test_any_bytes_parse_or_are_refused(data):
    try:
        types = parse(data)
    except ProcfileError as error:
        assert error.message.isprintable()  # noqa: PT017 - both outcomes are right
    else:
        assert types
        assert all(types.values())


def scan(tmp_path, **more):
    return source.scan(str(tmp_path / "app"), **more)


@pytest.fixture
def app(tmp_path):
    folder = tmp_path / "app"
    folder.mkdir()
    return folder


def test_a_source_is_its_content(app, tmp_path):
    (app / "a").write_text("1")
    (app / "d").mkdir()
    (app / "d" / "l").symlink_to("../a")
    first = scan(tmp_path)
    assert [(e.path, e.kind) for e in first.entries] == [("a", "file"), ("d", "folder"), ("d/l", "link")]
    os.utime(app / "a", (1, 1))
    assert scan(tmp_path).digest == first.digest
    (app / "a").chmod(0o755)
    assert scan(tmp_path).digest != first.digest


def test_ignored_names_stay_out(app, tmp_path):
    (app / ".slugignore").write_text("# comment\n*.log\n/docs\n")
    for name in (".git", "docs", "node_modules"):
        (app / name).mkdir()
        (app / name / "x").write_text("")
    (app / "a.log").write_text("")
    (app / "keep").write_text("")
    assert sorted(scan(tmp_path).names()) == [".slugignore", "keep"]
    (app / ".slugignore").write_text("*.log\n!a.log\n")
    with pytest.raises(AppError, match=r"\.slugignore:2"):
        scan(tmp_path)


@pytest.mark.parametrize("target", ["/etc/passwd", "../x", "a/../../x", "d/../a", "../app/../x"])
def test_links_that_leave_or_hide_their_way_are_refused(app, tmp_path, target):
    (app / "l").symlink_to(target)
    with pytest.raises(AppError, match=r'"l" is a link that leaves the app'):
        scan(tmp_path)


def test_what_cannot_be_in_a_slug_is_named(app, tmp_path):
    os.mkfifo(app / "pipe")
    with pytest.raises(AppError, match='"pipe" is a FIFO'):
        scan(tmp_path)
    (app / "pipe").unlink()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(app / "sock"))
    listener.close()
    with pytest.raises(AppError, match='"sock" is a socket'):
        scan(tmp_path)
    (app / "sock").unlink()
    (app / "a\x1b[2Jb").write_text("")
    with pytest.raises(AppError, match=r'"a\\x1b\[2Jb" has a control character'):
        scan(tmp_path)


def test_missing_empty_and_not_a_folder(app, tmp_path):
    with pytest.raises(AppError, match="is empty"):
        scan(tmp_path)
    with pytest.raises(AppError, match="does not exist"):
        source.scan(str(tmp_path / "nothing"))
    (app / "file").write_text("")
    with pytest.raises(AppError, match="is a file, not an app's folder"):
        source.scan(str(app / "file"))


def test_too_many_files_are_refused(app, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "MAX_ENTRIES", 10)
    for number in range(11):
        (app / str(number)).write_text("")
    with pytest.raises(AppError, match="more than 10 files and folders"):
        scan(tmp_path)


def test_too_many_bytes_are_refused(app, tmp_path):
    with (app / "big").open("wb") as file:
        file.truncate(source.MAX_BYTES + 1)
    with pytest.raises(AppError, match="holds more than 500 MiB"):
        scan(tmp_path)


def test_a_copy_has_no_special_bits(app, tmp_path):
    (app / "s").write_text("x")
    (app / "s").chmod(0o6755)
    copy = tmp_path / "copy"
    copy.mkdir()
    scan(tmp_path, copy_to=str(copy))
    assert (copy / "s").stat().st_mode & 0o7777 == 0o755


def plan(app, tmp_path, **files):
    for name, content in files.items():
        (app / name.replace("__", ".")).write_text(content)
    return detect.plan(scan(tmp_path))


def test_python_is_recognised(app, tmp_path):
    found = plan(
        app,
        tmp_path,
        requirements__txt="flask==3.1.2  # why\ngunicorn[gevent]>=20,<24 ; python_version > '3.8'\n",
        app__py="",
    )
    assert found.kind is detect.Kind.PYTHON
    assert dict(found.dependencies.files)["requirements.txt"].splitlines()[0] == "flask==3.1.2"
    assert found.process_types() == {"web": "python3 app.py"}


@pytest.mark.parametrize(
    "line",
    [
        "-e .", "--index-url http://x", "-r /etc/shadow", "git+https://x/y", "flask @ http://127.0.0.1/x", "./local", "/etc/passwd",
        "file:///etc/passwd",  "http://x/y.whl", "a" + " " * 100_000 + "!", "a" * 5000,
    ],
)  # fmt: skip
def test_a_requirement_that_is_no_name_with_versions_is_refused(app, tmp_path, line):
    with pytest.raises(AppError, match=r"requirements.txt:2: .* is not a package name with versions"):
        plan(app, tmp_path, requirements__txt=f"flask\n{line}\n", Procfile="web: x")


def test_pyproject_dependencies_and_its_build_backend_are_fetched(app, tmp_path):
    text = '[build-system]\nrequires = ["hatchling"]\n[project]\nname = "x"\ndependencies = ["flask>=3"]\n'
    found = plan(app, tmp_path, pyproject__toml=text, Procfile="web: x")
    assert dict(found.dependencies.files)["requirements.txt"] == "hatchling\nflask>=3\n"
    assert found.install.endswith(" .")
    with pytest.raises(AppError, match=r"pyproject\.toml"):
        plan(app, tmp_path, pyproject__toml="[project", Procfile="web: x")


def test_node_is_recognised_and_its_list_is_cleaned(app, tmp_path):
    package = {
        "scripts": {"start": "node s.js", "postinstall": "evil"},
        "dependencies": {"ms": "^2.1.3", "@a/b": "1.x || >=2"},
    }
    lock = {
        "lockfileVersion": 3,
        "packages": {
            "": {"dependencies": {"ms": "1"}},
            "node_modules/ms": {"version": "2.1.3", "resolved": "x", "integrity": "sha512-aa=="},
        },
    }
    (app / "package-lock.json").write_text(json.dumps(lock))
    found = plan(app, tmp_path, package__json=json.dumps(package))
    files = {name: json.loads(text) for name, text in found.dependencies.files}
    assert files["package.json"]["dependencies"] == package["dependencies"]
    assert "scripts" not in files["package.json"]
    assert "resolved" not in json.dumps(files["package-lock.json"])
    assert found.process_types() == {"web": "node s.js"}


@pytest.mark.parametrize(
    "versions", ["http://127.0.0.1/x.tgz", "git+ssh://x", "file:../x", "user/repo", "npm:other@1", "link:.."]
)
def test_a_node_dependency_that_is_no_version_range_is_refused(app, tmp_path, versions):
    with pytest.raises(AppError, match=r"is not a name with a version range"):
        plan(app, tmp_path, package__json=json.dumps({"dependencies": {"x": versions}}))


def test_one_executable_is_the_obvious_command(app, tmp_path):
    (app / "tool").write_text("")
    (app / "tool").chmod(0o755)
    assert plan(app, tmp_path).process_types() == {"web": "./tool"}


def test_nothing_recognised_says_what_to_write(app, tmp_path):
    with pytest.raises(AppError, match="no Procfile and no obvious command") as error:
        plan(app, tmp_path, readme="x")
    assert "echo 'web: ./serve' >" in error.value.hint
