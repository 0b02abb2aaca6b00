"""Makes reports: of a live dyno, of a dyno at its start, of a twin, of a twin and its mutants."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sandbox import __version__, hostcmd
from sandbox.config import Config
from sandbox.dyno import record as records
from sandbox.dyno.record import Record
from sandbox.errors import HostError, SandboxError
from sandbox.firewall import denied
from sandbox.host import doctor, observe
from sandbox.host import stack as stacks
from sandbox.policy.policy import Policy
from sandbox.policy.seccomp import document as filter_document
from sandbox.report import document as documents
from sandbox.report import judge, mutants, rows, workers
from sandbox.report.document import Document, Made
from sandbox.report.facts import Facts
from sandbox.report.model import Control, Result, Status
from sandbox.report.surroundings import Surroundings
from sandbox.report.twin import Wanted

Progress = Callable[[str], None]
_PROOF_AGE_S = 7 * 86400


def live(config: Config, record: Record, *, mode: str = "live") -> Made:
    """What the kernel says of a live dyno now. Nothing in it is touched but its init, which stands still for a moment.

    A dyno that ends meanwhile makes the rest unproven, and no error. Results of an attacked twin of the same policy,
    on this boot, serve as controls; so does this process itself, which every reading must find open.
    """
    return next(many(config, [record], mode=mode))


def many(config: Config, chosen: Sequence[Record], *, mode: str = "live") -> Iterator[Made]:
    """The same of several live dynos, in their order. HostError when one cannot be examined."""
    around = Surroundings(config)
    proofs: dict[tuple[str, ...], tuple[Proof, Mapping[str, Control]]] = {}
    for record, found in zip(chosen, evidence(config, chosen, around), strict=True):
        alike = (record.spec.policy.digest(), record.engine, record.runtime, record.stack_digest)
        if alike not in proofs:
            proof = _proof(config, record.spec.policy, record.engine, record.runtime, record.stack_digest)
            # Without a twin's: a process with every right, ourselves, which each reading must find open.
            proofs[alike] = proof, proof.controls or documents.controls([], workers.itself(config, record))
        proof, controls = proofs[alike]
        judged = [judge.control(_from_twin(result, proof), controls) for result in found.results]
        if not found.lives:
            judged = [_ended(result) for result in judged]
        yield Made(
            mode,
            record,
            judged,
            [],
            {},
            documents.bars(record.spec.policy, {}, found.usage),
            _events(config, record, found.usage),
            _notes(proof),
            found.seconds,
        )


class Evidence(NamedTuple):
    """What was read of one dyno. ``lives``: it still did afterwards; ``seconds``: what the reading took."""

    results: list[Result]
    lives: bool
    usage: Mapping[str, Any]
    seconds: float


def evidence(config: Config, chosen: Sequence[Record], around: Surroundings) -> Iterator[Evidence]:
    """Every check of each dyno, in their order, by as many processes as there are processors.

    What they have in common, and what is learnt of the first (its filter, its stack), is known before the others begin.
    """
    if not chosen:
        return
    yield _examined(config, chosen[0], around)
    rest = range(1, len(chosen))
    hands = min(len(os.sched_getaffinity(0)), len(rest))
    if hands < 2:
        for number in rest:
            yield _examined(config, chosen[number], around)
        return

    def start(numbers: Sequence[int]) -> workers.Child:
        def work(say: Callable[[dict[str, Any]], None]) -> None:
            for number in numbers:
                found = _examined(config, chosen[number], around)
                results = [workers.as_json(result) for result in found.results]
                say({**found._asdict(), "results": results, "number": number})

        return workers.Child(work)

    known: dict[int, Evidence] = {}
    for answer in workers.answers_of([start(rest[hand::hands]) for hand in range(hands)]):
        if "failed" in answer:
            raise HostError(f"a dyno could not be examined: {answer['failed']}", hint="sandbox doctor")
        results = [workers.from_json(result) for result in answer["results"]]
        known[answer["number"]] = Evidence(results, answer["lives"], answer["usage"], answer["seconds"])
    yield from (known[number] for number in rest)


def _examined(config: Config, record: Record, around: Surroundings) -> Evidence:
    begin = time.monotonic()
    facts = Facts(config, record, calls=rows.CALLS, around=around)
    results = [judge.examine(row, facts) for row in rows.ALL]
    return Evidence(results, facts.lives(), _usage(facts), time.monotonic() - begin)


def _ended(result: Result) -> Result:
    """Of a dyno that is gone nothing can be said: half of its state was taken down while it was read."""
    if result.status in (Status.PASS, Status.ERROR, Status.FAIL):
        return result._replace(status=Status.UNPROVEN, reason="the dyno ended while it was examined")
    return result


class Proof(NamedTuple):
    """What attacked twins of the same policy, code, kernel and boot showed: by row."""

    at: str = ""
    controls: dict[str, Control] = {}
    results: dict[str, Result] = {}


def _from_twin(result: Result, proof: Proof) -> Result:
    """A row that only a twin can show: with the twin's evidence, and its age."""
    known = proof.results.get(result.row.id)
    # What could not be read of this dyno is not made up for by another.
    if known is None or result.status is not Status.UNPROVEN or result.reason != judge.NOT_TRIED:
        return result
    return known._replace(reason=known.reason or f"shown by a twin of this policy, {proof.at}")


def _usage(facts: Facts) -> Mapping[str, Any]:
    try:
        return facts.cgroup.usage()._asdict()
    except (SandboxError, OSError):
        return {}


def _events(config: Config, record: Record, usage: Mapping[str, Any]) -> dict[str, Any]:
    try:
        details = [item for item in denied.read(config)[0] if item.id == record.spec.container_id]
    except (SandboxError, OSError):
        details = []
    details.sort(key=lambda item: -item.packets)
    return {
        "denied": [
            {
                "what": f"{d.protocol} {d.address}{':' + str(d.port) if d.port is not None else ''} rule={d.rule}",
                "packets": d.packets,
            }
            for d in details[:20]
        ],
        "killed for memory": usage.get("oom_kills", 0),
        "processes refused": usage.get("pids_refused", 0),
    }


def _notes(proof: Proof) -> list[str]:
    if proof.at:
        return [f"what only a twin can show, and the controls, are from the twins of this policy, {proof.at}"]
    return ["no twin of this policy was attacked on this boot: sandbox report --full APP tries what this only reads"]


def twin(
    config: Config, wanted: Wanted, record_of: Callable[[Mapping[str, Any]], Record], *, full: bool, progress: Progress
) -> Made:
    """Attacks a twin; with ``full``, takes every clause out of it once. ``record_of`` makes its record."""
    begin = time.monotonic()
    progress("attacking a twin: calls, files, network, limits")
    answer = workers.examine_twin(config, wanted)
    if "failed" in answer:
        raise HostError(
            f"no twin could be examined: {answer['failed']}",
            hint="sandbox doctor says what this host lacks; `df` whether a disk is full.",
        )
    record = record_of(answer)
    results = [workers.from_json(value) for value in answer["results"]]
    found: dict[str, Control] = {}
    made: list[dict[str, Any]] = []
    if full:
        known = judge.known(results)
        made = list(_mutants(config, wanted, known, progress))
    found = documents.controls(made, answer["measured"]["controls"])
    if full:
        _keep_proof(config, wanted, found, results)
    else:
        found |= _proof(config, wanted.policy, wanted.engine, wanted.runtime, wanted.stack.digest).controls
    judged = [judge.control(result, found) for result in results]
    measured = _measured(answer)
    return Made(
        "full" if full else "twin",
        record,
        judged,
        made,
        {},
        documents.bars(wanted.policy, measured, answer["usage"]),
        {"killed for memory": answer["usage"].get("oom_kills", 0)},
        _remarks(answer),
        time.monotonic() - begin,
    )


def _measured(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of the experiments, with those that only the prober knows."""
    said = {row["id"]: row for row in answer["results"]}
    measured = dict(answer["measured"])
    for name, row, word in (("processes", "RES-05", "after "), ("files", "FS-18", "")):
        for fact in said[row]["facts"]:
            if "until refused" in fact[1]:
                text = fact[3].partition("after ")[2] if word else fact[3].partition(" files")[0]
                if text.isdigit():
                    measured[name] = int(text)
    return measured


def _remarks(answer: Mapping[str, Any]) -> list[str]:
    notes = [f"the twin's prober: {group} broke: {text}" for group, text in answer["errors"]]
    if not all(item["answered"] for item in answer["measured"].get("positive", [])):
        notes.append("the twin could not reach what its egress allows: a wall that denies everything proves little")
    return notes


def _mutants(config: Config, wanted: Wanted, known: judge.Known, progress: Progress) -> Iterator[dict[str, Any]]:
    """Two at a time: a mutant waits for timeouts as long as it works."""
    chosen = [mutant for mutant in (*mutants.ALL, *mutants.HOST) if wanted.engine in mutant.engines]
    # The long ones first, dealt in turn.
    chosen.sort(key=lambda mutant: (not mutant.network, not mutant.limits, not mutant.groups))
    total = len(chosen)
    order = {mutant.name: index for index, mutant in enumerate((*mutants.ALL, *mutants.HOST))}
    found = []
    # What is measured in CPU time needs both processors for itself.
    alone = [mutant for mutant in chosen if "cpu" in mutant.limits]
    rest = [mutant for mutant in chosen if mutant not in alone]
    answers = itertools.chain(
        workers.run_mutants(config, wanted, [alone], known),
        workers.run_mutants(config, wanted, [rest[0::2], rest[1::2]], known),
    )
    for count, answer in enumerate(answers, 1):
        progress(f"mutant {count} of {total}: {answer.get('says', answer.get('failed', ''))}")
        if "mutant" not in answer:
            raise HostError(f"the mutants could not be made: {answer.get('failed')}", hint="sandbox doctor")
        found.append(answer)
    if len(found) != total:
        raise HostError(f"only {len(found)} of {total} mutants were made.", hint="sandbox doctor")
    yield from sorted(found, key=lambda answer: order[answer["mutant"]])


# ---- what was proven before: controls are kept for the same policy, code, kernel and boot


def _code() -> str:
    """What tells one version of our code from another, without reading it."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    found = []
    for folder, _, names in os.walk(package):
        for name in names:
            if name.endswith((".py", ".j2", ".json")):
                status = os.stat(f"{folder}/{name}")
                found.append((f"{folder}/{name}", status.st_size, status.st_mtime_ns))
    return repr(sorted(found))


def _program(engine: str, runtime: str) -> str:
    path = hostcmd.which("dockerd" if engine == "docker" else runtime)
    return repr(stacks.identity(path)) if path else ""


def _proof_path(config: Config, policy: Policy, engine: str, runtime: str, stack: str) -> str:
    parts = (
        stack,
        _code(),
        _program(engine, runtime),
        config.pool,
        repr(config.deny),
        repr(config.permit),
        __version__,
        policy.digest(),
        engine,
        runtime,
        os.uname().release,
        observe.boot_id(),
        json.dumps(filter_document(), sort_keys=True),
        repr([row.id for row in rows.ALL]),
    )
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return f"{config.state_dir}/reports/proofs/{digest[:32]}.json"


def _keep_proof(config: Config, wanted: Wanted, found: Mapping[str, Control], results: Iterable[Result]) -> None:
    path = _proof_path(config, wanted.policy, wanted.engine, wanted.runtime, wanted.stack.digest)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    draft = f"{path}.{os.getpid()}"
    proof = {
        "at": documents.now()[:16].replace("T", " ") + " UTC",
        "controls": {row: list(control) for row, control in found.items()},
        "results": [workers.as_json(result) for result in results],
    }
    with open(draft, "w", encoding="utf-8") as file:
        file.write(json.dumps(proof))
    os.rename(draft, path)


def _proof(config: Config, policy: Policy, engine: str, runtime: str, stack: str) -> Proof:
    path = _proof_path(config, policy, engine, runtime, stack)
    try:
        if time.time() - os.stat(path).st_mtime > _PROOF_AGE_S:
            return Proof()
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        results = [workers.from_json(value) for value in values["results"]]
        controls = {row: Control(*control) for row, control in values["controls"].items()}
        return Proof(str(values["at"]), controls, {result.row.id: result for result in results})
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return Proof()


def host(config: Config) -> dict[str, Any]:
    """The host's section: what `sandbox doctor --json` says."""
    found = doctor.document(list(doctor.examine(config)))
    facts = found.pop("host")
    return {**found, **(facts if isinstance(facts, dict) else {})}


def finish(config: Config, made: Made, *, with_host: bool = True) -> Document:
    """The document of what was made, with the host's section."""
    return documents.build(made._replace(host=host(config) if with_host else doctor.host_facts()))


def of_dyno(config: Config, name: str) -> Record:
    """The record of a live dyno; NotFound."""
    return records.find(config, name)
