"""Pieces of the report's HTML (L3): everything that comes from a run is escaped here, for a model may have written it. Called by `report.py`."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from dapo_async.tracking.report_reading import number

MOST_CHARACTERS = 20_000  # of one text; the rest is named
# Nothing may be fetched and no script may run, even if a text should ever get through unescaped.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2430; margin: 0 auto; max-width: 1500px; padding: 1.5rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #d5dae1; } h3 { font-size: 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; } th, td { text-align: left; vertical-align: top; padding: .2rem .7rem .2rem 0;
border-bottom: 1px solid #e6e9ee; } th { font-weight: 600; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(460px, 100%), 1fr)); gap: 1.2rem; }
figure { margin: 0; } img { max-width: 100%; } figcaption { color: #56606e; font-size: .85rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f6f8; padding: .5rem; margin: .2rem 0; max-height: 30rem; overflow-y: auto; }
summary { cursor: pointer; } details { margin: .25rem 0; } details > :not(summary) { margin-left: 1rem; }
.note { color: #8a4b00; } .faint { color: #56606e; } .chip { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
"""


def page(title: str, sections: Iterable[str]) -> bytes:
    """The whole file. A half surrogate pair, which no UTF-8 file can hold, becomes a question mark."""
    head = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width"><title>{text(title)}</title><style>{STYLE}</style></head><body>'
    )
    return "\n".join([head, f"<h1>{text(title)}</h1>", *sections, "</body></html>", ""]).encode(
        "utf-8", "replace"
    )


def text(value: Any) -> str:
    """Anything as text that is shown as it is; what is too long is cut, and says by how much. NUL and its kin, which HTML forbids, become ␀."""
    whole = "none" if value is None else str(value)
    rest = len(whole) - MOST_CHARACTERS
    shown = escape(whole[:MOST_CHARACTERS])
    shown = "".join(
        letter if letter >= " " or letter in "\n\t" else "\N{SYMBOL FOR NULL}" for letter in shown
    )
    return f"{shown} [{rest} characters more]" if rest > 0 else shown


def figures(value: Any, form: str) -> str:
    """A number in the given form; a dash where there is none."""
    return "–" if math.isnan(known := number(value)) else format(known, form)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    lines = ["<table><tr>" + "".join(f"<th>{text(name)}</th>" for name in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])


def image(png: bytes, alt: str) -> str:
    """The picture within the page."""
    return f'<img alt="{text(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def chart(png: bytes, title: str, line: str) -> str:
    """A picture between its title and what it says."""
    return f"<figure><h3>{text(title)}</h3>{image(png, title)}<figcaption>{text(line)}</figcaption></figure>"


def details(summary: str, body: str) -> str:
    """Folded; both are HTML already."""
    return f"<details><summary>{summary}</summary>{body}</details>"


def note(line: str) -> str:
    """One line about what is missing or broken."""
    return f'<p class="note">{text(line)}</p>'


def group(rows: Sequence[Mapping[str, Any]]) -> str:
    """The siblings of one prompt, as `rollouts/` has them."""
    first = rows[0]
    correct = sum(number(row.get("accuracy")) == 1.0 for row in rows)
    start = text(str(first.get("prompt"))[:80])
    summary = f"group {text(first.get('group_id'))}: {correct} of {len(rows)} correct <span class=faint>{start}</span>"
    cells = [
        (
            text(row.get("sibling")),
            figures(row.get("reward"), "+.3f"),
            figures(row.get("accuracy"), "g"),
            text(row.get("extracted")),
            f"{figures(row.get('tokens'), '.0f')} ({text(row.get('finish_reason'))})",
            _versions(row.get("weight_versions")),
            f"<pre>{text(row.get('response'))}</pre>",
        )
        for row in rows
    ]
    head = ("sibling", "reward", "accuracy", "answer read", "tokens", "versions", "response")
    return details(
        summary,
        f"<p>prompt</p><pre>{text(first.get('prompt'))}</pre><p>gold answer: {text(first.get('gold'))}</p>{table(head, cells)}",
    )


def _versions(spans: Any) -> str:
    """`[[7, 0, 2], [8, 2, 3]]` as 7, 8."""
    if not isinstance(spans, list):
        return "–"
    return text(", ".join(str(span[0]) for span in spans if isinstance(span, list) and span))
