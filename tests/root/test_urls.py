"""A web process prints a URL that answers this host and nobody else; its packages came through the wall."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from urllib.parse import urlsplit

import pytest

from tests.conftest import EXAMPLES, default_state, make_app, make_instance, wait_for
from tests.world import HOST, relay

ASK = """
import sys, urllib.request
try: print(urllib.request.urlopen(sys.argv[1], timeout=2).read().decode().strip())
except OSError as error: print(type(error).__name__)
"""


@pytest.mark.timeout(300)
def test_the_url_answers_the_host_and_nobody_else(sandbox, world, engine):
    process = sandbox.start("run", "--engine", engine, str(EXAMPLES / "python-web"))
    url = ""
    while not url:
        line = process.stdout.readline().decode()
        assert line, process.communicate()
        if match := re.search(r"Listening at (http://172\.16\.\S+:5000) for this host only", line):
            url = match[1]
    assert "Hello from web.1" in world.host.run("python3", "-c", ASK, url)
    assert "Hello" not in world.outside.run("python3", "-c", ASK, url)
    code = ASK.replace("sys.argv[1]", repr(url)) + "\nprint('null')"
    done = sandbox("run", "--raw", "-q", "--engine", engine, str(EXAMPLES / "shell"), "--", "python3", "-c", code)
    assert "Hello" not in done.out
    # Not on the host's own addresses either: no port is published.
    assert "Hello" not in world.host.run("python3", "-c", ASK, f"http://{HOST}:5000")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)


@pytest.mark.timeout(300)
def test_a_package_index_at_a_local_address_is_pinned_for_the_fetch_step(home, world):
    """The operator's resolver says that the index is at a reserved address: that opens, with its port, and is said."""
    instance = make_instance(home, "pinned")
    index = dict(json.loads((default_state() / "stack" / "build.json").read_text())["indexes"])["python"]
    kept = dict(world.names.zone)
    try:
        for number, name in enumerate(sorted({urlsplit(url).hostname for url in index.split()}), 1):
            address = f"198.18.6.{number}"
            world.outside.run("ip", "address", "add", f"{address}/32", "dev", "lo")
            relay(world.outside, address, 443, _really(name))
            world.names.zone[name] = [address]
        done = instance("run", "--get", "/", "--engine", "oci", str(EXAMPLES / "python-web"), timeout=240)
        assert "Hello from web.1" in done.out, done
        assert "is at 198.18.6.1: this step may reach it" in done.err
        assert "is at 198.18.6.2: this step may reach it" in done.err
    finally:
        world.names.zone.clear()
        world.names.zone.update(kept)
        instance.remove_network()


def _really(name: str) -> str:
    code = f"import socket; print(socket.getaddrinfo({name!r}, 443, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])"
    return subprocess.run(["python3", "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_an_index_on_the_host_itself_is_refused(home, world, tmp_path):
    instance = make_instance(home, "hostindex")
    tmp_path.chmod(0o755)
    app = make_app(tmp_path, {"Procfile": "web: x\n", "requirements.txt": "some-package==1.0\n"})
    done = instance("run", "--engine", "oci", app, PIP_INDEX_URL="http://127.0.0.1:3141/simple")
    assert done.status == 125
    assert 'the package index "127.0.0.1" is at 127.0.0.1, which no dyno may reach (loopback)' in done.err


def test_the_apps_own_file_is_honoured_and_the_command_line_wins(sandbox, world, tmp_path):
    tmp_path.chmod(0o755)
    app = make_app(tmp_path, {"sandbox.toml": 'egress = "none"\n', "run!": "#!/bin/sh\ncat /etc/resolv.conf\n"})
    assert "egress none" in sandbox("run", "--raw", "-q", "--engine", "oci", app).out
    assert "172.16.0.23" in sandbox("run", "--raw", "-q", "--egress", "public", "--engine", "oci", app).out
    document = sandbox("run", "--json", "--engine", "oci", app).json()
    assert document["egress"]["mode"] == "none"
    assert document["url"].startswith("http://172.16.")
    wait_for(lambda: sandbox("firewall", "show", "--json").json()["dynos"] == [], 5, "no dyno")
