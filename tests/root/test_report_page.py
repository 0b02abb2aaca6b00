"""The report's page in a real browser: it opens, filters, asks nobody, and hostile text in it does nothing."""

from __future__ import annotations

import base64
import json
import socket
import struct
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from sandbox.report import document as documents
from sandbox.report import render
from tests.world import Namespace

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\x1b[2J]]>"


class Browser:
    """A headless Chromium, spoken to in the WebDriver protocol."""

    def __init__(self, folder: Path) -> None:
        # In a network with nothing but loopback: a browser has things of its own to ask the internet.
        self._network = Namespace(folder / "network")
        port = 9515
        self._base = f"http://127.0.0.1:{port}"
        self._driver = subprocess.Popen(
            self._network.argv("chromedriver", f"--port={port}"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 20
        while True:
            try:
                with self._network.entered():
                    socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "chromedriver did not start"
                time.sleep(0.1)
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,900", f"--user-data-dir={folder}/profile", "--no-first-run"]  # fmt: skip
        wanted = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": {"args": arguments}}}}
        self._session = f"/session/{self('POST', '/session', wanted)['sessionId']}"

    def __call__(self, method: str, path: str, body: dict | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"}, method=method)
        with self._network.entered(), urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, path: Path) -> None:
        self("POST", f"{self._session}/url", {"url": f"file://{path}"})

    def run(self, script: str) -> object:
        return self("POST", f"{self._session}/execute/sync", {"script": script, "args": []})

    def click(self, selector: str) -> None:
        found = self("POST", f"{self._session}/element", {"using": "css selector", "value": selector})
        self("POST", f"{self._session}/element/{next(iter(found.values()))}/click", {})

    def picture(self) -> bytes:
        return base64.b64decode(self("GET", f"{self._session}/screenshot"))

    def close(self) -> None:
        self("DELETE", self._session)
        self._driver.terminate()
        self._driver.wait(20)
        self._network.close()


@pytest.fixture
def browser(tmp_path):
    made = Browser(tmp_path)
    yield made
    made.close()


def page(tmp_path: Path, text: str) -> Path:
    document = documents.example(text)
    passed = {**document["checks"][0], "status": "pass", "id": "PRV-02", "title": "another"}
    document["checks"].append(passed)
    document["summary"]["counts"]["pass"] = 1
    document["summary"]["checks"] = 2
    path = tmp_path / "report.html"
    path.write_text(render.formats()["html"](document))
    return path


def shown(browser: Browser) -> list[str]:
    script = (
        "return [...document.querySelectorAll('.checks details')].filter(e => e.offsetParent !== null).map(e => e.id)"
    )
    found = browser.run(script)
    assert isinstance(found, list)
    return found


def test_the_page_opens_filters_and_unfolds(browser, tmp_path):
    browser.open(page(tmp_path, "plain"))
    assert "Isolation of plain" in str(browser.run("return document.title"))
    assert shown(browser) == ["PRV-01", "PRV-02"]
    browser.click("label[for=f-fail]")
    assert shown(browser) == ["PRV-01"]
    browser.click("label[for=f-pass]")
    assert shown(browser) == ["PRV-02"]
    browser.click("label[for=f-all]")
    assert shown(browser) == ["PRV-01", "PRV-02"]
    body = "return document.querySelector('#PRV-02 .body').checkVisibility()"
    assert browser.run(body) is False
    browser.click("#PRV-02 summary")
    assert browser.run(body) is True, "the evidence opens"
    width = "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    assert browser.run(width), "nothing hangs out at the side"
    data = browser.picture()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">I", data[16:20])[0] >= 1000


def test_hostile_text_runs_nothing(browser, tmp_path):
    browser.open(page(tmp_path, HOSTILE))
    assert "owned" not in str(browser.run("return document.title")).replace("document.title='owned'", "")
    assert browser.run("return document.querySelectorAll('img').length") == 0
    assert browser.run("return document.querySelectorAll('script:not([type=\"application/json\"])').length") == 0
    text = str(browser.run("return document.body.innerText"))
    assert "onerror" in text, "it is shown as text"
    assert "\x1b" not in text


def test_control_the_same_text_in_a_careless_page_runs(browser, tmp_path):
    path = tmp_path / "careless.html"
    path.write_text(f"<!doctype html><title>x</title><body>{HOSTILE}")
    browser.open(path)
    assert browser.run("return document.title") == "owned"


ASKED = "return performance.getEntriesByType('resource').map(e => e.name)"


def test_the_page_asks_nobody(browser, tmp_path):
    browser.open(page(tmp_path, "https://192.0.2.1/x.png"))
    assert browser.run(ASKED) == []


def test_control_a_page_with_a_picture_is_seen_asking(browser, tmp_path):
    path = tmp_path / "careless.html"
    path.write_text('<!doctype html><body><img src="http://127.0.0.1:1/x.png">')
    browser.open(path)
    assert browser.run(ASKED) == ["http://127.0.0.1:1/x.png"]
