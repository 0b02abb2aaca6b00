"""Boots every guest and believes what it says; and what the harness says when something is wrong with it.

The guests run side by side. Each step of tests/vm/inside/plan.py that is made of tests has a JUnit file, which must hold
tests, none failed and none skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import default_state
from tests.vm import image, machine, parity, payload

GUESTS = tuple(image.guests())
TESTED = {"host": 16, "docker": 6, "runc": 6, "crun": 6}  # the least number of tests of a step
_TIME_S = 2400


def say(line: str) -> None:
    """Shown at once: `make test-vm` has pytest capture nothing, for it takes a while."""
    print(f"-----> {line}", file=sys.stderr, flush=True)


@pytest.fixture(scope="session")
def images() -> dict[str, image.Image]:
    return {name: image.ensure(name, say) for name in GUESTS}


@pytest.fixture(scope="session")
def runs(images) -> Iterator[dict[str, Future[machine.Verdict]]]:
    """Every guest at once; the results stay in the state folder, for `make parity` and for whoever looks into a failure."""
    base = default_state() / "vm" / "results"
    first = images[GUESTS[0]]
    accel = machine.accelerator(first.kernel, first.initrd, say)

    def run(name: str) -> machine.Verdict:
        folder = base / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        made = images[name]
        disk = payload.make(folder, made.python)
        try:
            with machine.Machine(made, disk, folder, accel, say) as guest:
                return guest.wait(_TIME_S)
        finally:
            disk.unlink()

    with ThreadPoolExecutor(len(GUESTS)) as pool:
        yield {name: pool.submit(run, name) for name in GUESTS}


@pytest.mark.timeout(_TIME_S + 600)
@pytest.mark.parametrize("name", GUESTS)
def test_everything_holds_in_the_guest(runs, name):
    verdict = runs[name].result()
    said = []
    for step, least in TESTED.items():
        suite = ET.parse(verdict.results / f"{step}.xml").getroot().find("testsuite")
        for case in suite:
            said += [
                f"{step}: {case.get('name')}: {bad.tag}: {bad.get('message', '')[:300]}"
                for bad in case
                if bad.tag != "system-out"
            ]
        assert int(suite.get("tests")) >= least, (step, suite.attrib)
    assert not said, "\n".join(said)
    assert verdict.passed, (verdict.results / "steps").read_text()


@pytest.mark.timeout(_TIME_S + 600)
def test_the_parity_table_is_of_these_runs(runs):
    assert parity.render({name: run.result().results for name, run in runs.items()}) == parity.DOCUMENT.read_text(), (
        "docs/PARITY.md is stale: make parity"
    )


# ---- faults


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sbvm-", dir="/var/tmp") as path:
        yield Path(path)


def script(folder: Path, text: str) -> None:
    path = folder / "qemu-system-x86_64"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_no_qemu_and_an_old_one_are_named(folder, monkeypatch):
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(machine.MachineError, match="not installed: `make vm-host`"):
        machine.qemu()
    script(folder, "echo QEMU emulator version 7.2.1 '(Debian)'")
    with pytest.raises(machine.MachineError, match=r"QEMU 7\.2\.1 is too old"):
        machine.qemu()


def test_without_kvm_it_says_so_and_goes_on(images, capsys):
    said: list[str] = []
    made = images["debian-13"]
    words = machine.accelerator(made.kernel, made.initrd, said.append, device="/dev/no-such-kvm")
    assert "tcg" in words[1]
    assert said == ["no /dev/no-such-kvm: the guests' processors are emulated"]


def test_a_kernel_that_panics_shows_its_console(images, folder):
    """Without an initrd there is no driver for the disk, and so no root."""
    nothing = folder / "nothing"
    nothing.write_bytes(b"\0" * 512)
    made = images["debian-13"]._replace(initrd=nothing)
    with (
        machine.Machine(made, nothing, folder, ("-accel", "tcg"), say) as guest,
        pytest.raises(machine.MachineError, match="its kernel panicked") as caught,
    ):
        guest.wait(120)
    assert "Unable to mount root fs" in str(caught.value)
    assert "during: boot" in str(caught.value)


def test_a_guest_that_hangs_is_named_with_what_it_was_doing(images, folder):
    (folder / "disk").write_bytes(b"\0" * 4096)
    with machine.Machine(images["debian-12"], folder / "disk", folder, ("-accel", "tcg"), say) as guest:
        guest._hear("doing test_of_something")
        with pytest.raises(
            machine.MachineError, match=r"debian-12: no verdict within 3 s, .* during: test_of_something"
        ):
            guest.wait(3)


def test_a_guest_that_ends_without_a_verdict_is_no_success(images, folder):
    """QEMU ends with status 0; that means nothing."""
    (folder / "disk").write_bytes(b"\0" * 4096)
    with machine.Machine(images["debian-12"], folder / "disk", folder, ("-accel", "tcg"), say) as guest:
        guest._ask("quit")
        with pytest.raises(machine.MachineError, match="ended without a verdict"):
            guest.wait(60)


def test_a_verdict_with_another_nonce_is_nobodys(images, folder):
    (folder / "disk").write_bytes(b"\0" * 4096)
    with machine.Machine(images["debian-12"], folder / "disk", folder, ("-accel", "tcg"), say) as guest:
        guest._hear("verdict 0123456789abcdef passed")
        guest._hear("verdict passed")
        assert guest._verdict == ""
        guest._hear(f"verdict {guest._nonce} failed")
        assert guest._verdict == "failed"


def test_an_altered_image_is_noticed(folder):
    made = image.Image("debian-13", "3.13", folder / "root.img", folder / "vmlinuz", folder / "initrd.img")
    for path in (made.root, made.kernel, made.initrd):
        path.write_bytes(b"content")
    image.seal(made)
    assert image.unusable(made) == ""
    made.kernel.write_bytes(b"another")
    assert image.unusable(made) == "vmlinuz in the cache was altered: the image is built anew"
    (folder / "seal.json").write_text("{")
    assert image.unusable(made) == "the cache is damaged: the image is built anew"


def test_a_full_disk_ends_in_one_message_and_leaves_nothing(folder):
    cache = folder / "cache"
    cache.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(cache)], check=True)
    try:
        with pytest.raises(image.ImageError, match=r"No space left|failed"):
            image.ensure("debian-13", say, cache)
        assert sorted(os.listdir(cache)) == ["debian-13.lock"]
    finally:
        subprocess.run(["umount", str(cache)], check=True)
