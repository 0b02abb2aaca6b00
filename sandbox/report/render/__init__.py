"""A report document as text, HTML, SARIF and JUnit. Pure: a document in, text out; every format escapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Document = dict[str, Any]


def formats() -> dict[str, Callable[[Document], str]]:
    """Every format by name; each is imported when it is used."""
    return {"text": _text, "json": _json, "html": _html, "sarif": _sarif, "junit": _junit}


def _text(document: Document) -> str:
    from sandbox.report.render import text

    return text.render(document)


def _json(document: Document) -> str:
    from sandbox.report import seal

    return seal.canonical(document).decode("ascii") + "\n"


def _html(document: Document) -> str:
    from sandbox.report.render import html

    return html.render(document)


def _sarif(document: Document) -> str:
    from sandbox.report.render import sarif

    return sarif.render(document)


def _junit(document: Document) -> str:
    from sandbox.report.render import junit

    return junit.render(document)


def open_text(rendered: str, *, markup: bool = True) -> str:
    """What of a hostile text would be obeyed by a terminal or, with ``markup``, by a browser; empty when inert."""
    if markup and "<script>alert" in rendered:
        return "a script element"
    bad = next((c for c in rendered if (ord(c) < 0x20 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0), "")
    bad = bad or next((c for c in rendered if c in "\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067"), "")
    return f"the character {ord(bad):#x}" if bad else ""


def escape_check(hostile: str) -> dict[str, str]:
    """Each format of a small report whose every foreign text is ``hostile``: what of it is open, or an empty text."""
    from sandbox.report.document import example

    document = example(hostile)
    return {name: open_text(render(document), markup=name in ("html", "junit")) for name, render in formats().items()}
