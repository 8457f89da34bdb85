"""Pieces of the report's HTML. Called by `report.py`.

Everything that comes from a run is escaped here: a model may have written it. The page's policy
lets no text fetch or run anything; the only script is `SCRIPT`, named by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from dapo_async.tracking.charts import FAINT, GRID, INK, SERIES, Chart, hover_json, sample
from dapo_async.tracking.report_reading import number
from dapo_async.tracking.rollout_tokens import Piece

MAX_CHARACTERS = 20_000  # of one text; the page names how many are left out
MAX_STALENESS_SHADE = 4
DARK_SERIES = (
    "#5aa9ff", "#ff9d4d", "#4fc796", "#b58cf0", "#ff7a93",
    "#4cc8d4", "#d3b04a", "#a3b1c2", "#ee86d6", "#a5d35b",
)  # fmt: skip


def _variables(
    ink: str, faint: str, grid: str, back: str, panel: str, series: Iterable[str]
) -> str:
    named = {"ink": ink, "faint": faint, "grid": grid, "back": back, "panel": panel}
    named |= {f"s{place}": colour for place, colour in enumerate(series)}
    return "".join(f"--{name}:{colour};" for name, colour in named.items())


LIGHT = _variables(INK, FAINT, GRID, "#ffffff", "#f4f6f8", SERIES) + "--warn:#8a4b00"
DARK = (
    _variables("#e6ebf1", "#9aa7b6", "#333d49", "#14191f", "#1d242c", DARK_SERIES)
    + "--warn:#ffb86b"
)


def _shades() -> str:
    """Rules for the staleness of a token: the classes v0 to v4."""
    rule = (
        "body:has(#by-version:checked) .v{place}, .key.v{place} "
        "{{ background: color-mix(in srgb, var(--{colour}) {share}%, #0000); }}"
    )
    shades = (("s2", 30), ("s0", 30), ("s3", 34), ("s1", 36), ("s4", 40))
    return "\n".join(
        rule.format(place=place, colour=colour, share=share)
        for place, (colour, share) in enumerate(shades)
    )


STYLE = f"""
:root {{ color-scheme: light dark; {LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
* {{ box-sizing: border-box; }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  margin: 0 auto; max-width: 1500px; padding: 1rem clamp(.7rem, 3vw, 2rem) 4rem; }}
h1 {{ font-size: 1.45rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.2rem; margin-top: 2.4rem; border-bottom: 1px solid var(--grid); }}
h3 {{ font-size: 1rem; margin: .6rem 0 .2rem; overflow-wrap: anywhere; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
th, td {{ text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0;
  border-bottom: 1px solid var(--grid); }}
.run {{ border-left: 4px solid var(--c); padding: .1rem 0 .1rem .9rem; margin: 1rem 0; }}
.verdict {{ font-size: 1.08rem; margin: .2rem 0 .6rem; max-width: 75ch; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr));
  gap: .5rem; margin: 0; }}
.tiles div {{ background: var(--panel); border-radius: .4rem; padding: .4rem .6rem; }}
.tiles dt {{ color: var(--faint); font-size: .8rem; }} .tiles dd {{ margin: 0; }}
.charts {{ display: grid; gap: 1.4rem 1.6rem;
  grid-template-columns: repeat(auto-fill, minmax(min(400px, 100%), 1fr)); }}
figure {{ margin: 0; position: relative; }} figcaption {{ color: var(--faint); font-size: .85rem; }}
.plot {{ display: block; width: 100%; height: auto; overflow: visible; }}
.plot text {{ font-family: system-ui, sans-serif !important; }}
.holder {{ position: relative; touch-action: pan-y; }}
.keys {{ display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .85rem; color: var(--faint); }}
.sample {{ width: 22px; height: 10px; margin-right: .35em; }}
.bar {{ position: absolute; top: 0; bottom: 15%; width: 1px; background: var(--faint); }}
.tip {{ position: absolute; top: 0; z-index: 2; pointer-events: none; background: var(--panel);
  border: 1px solid var(--grid); border-radius: .4rem; padding: .25rem .5rem; font-size: .8rem;
  white-space: nowrap; box-shadow: 0 2px 8px #0003; }}
.tip b, .tip span {{ display: block; }} .bar[hidden], .tip[hidden] {{ display: none; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel); padding: .5rem;
  margin: .2rem 0; max-height: 30rem; overflow-y: auto; border-radius: .3rem; }}
summary {{ cursor: pointer; overflow-wrap: anywhere; }} details {{ margin: .3rem 0; }}
details > :not(summary) {{ margin-left: clamp(.2rem, 2vw, 1rem); }}
.facts {{ margin-top: .7rem; margin-bottom: .1rem; font-size: .88rem; color: var(--faint);
  overflow-wrap: anywhere; }}
.facts b {{ color: var(--ink); font-weight: 600; }}
.note {{ color: var(--warn); }} .faint {{ color: var(--faint); }}
fieldset {{ border: 1px solid var(--grid); border-radius: .4rem; display: flex; flex-wrap: wrap;
  gap: .2rem 1.2rem; font-size: .9rem; margin: .4rem 0; }}
.key {{ padding: 0 .4em; border-radius: .2em; }}
{_shades()}
body:has(#by-advantage:checked) .up, .key.up
  {{ background: color-mix(in srgb, var(--s2) calc(var(--a) * 1%), #0000); }}
body:has(#by-advantage:checked) .down, .key.down
  {{ background: color-mix(in srgb, var(--s4) calc(var(--a) * 1%), #0000); }}
"""
# Shows the values under the pointer. Texts are set as text, never as HTML.
SCRIPT = """
for (const holder of document.querySelectorAll(".holder")) {
  const data = JSON.parse(holder.querySelector("script").textContent);
  const plot = holder.querySelector("svg"), width = plot.viewBox.baseVal.width;
  const add = (parent, tag, text, colour) => {
    const made = parent.appendChild(document.createElement(tag));
    made.textContent = text;
    if (colour) made.style.color = colour;
    return made;
  };
  const bar = add(holder, "div", ""), tip = add(holder, "div", "");
  bar.className = "bar"; tip.className = "tip"; bar.hidden = tip.hidden = true;
  const show = (event) => {
    const box = plot.getBoundingClientRect(), scale = box.width / width;
    const x = (event.clientX - box.left) / scale;
    let near = 0;
    data.x.forEach((each, n) => {
      if (Math.abs(each - x) < Math.abs(data.x[near] - x)) near = n;
    });
    tip.replaceChildren();
    add(tip, "b", data.head[near]);
    for (const row of data.rows)
      if (row.values[near]) add(tip, "span", row.name + " " + row.values[near], row.colour);
    bar.hidden = tip.hidden = false;
    const left = data.x[near] * scale, before = left - tip.offsetWidth - 8;
    bar.style.left = left + "px";
    tip.style.left = Math.max(0, left > box.width / 2 ? before : left + 8) + "px";
  };
  holder.addEventListener("pointermove", show);
  holder.addEventListener("pointerdown", show);
  holder.addEventListener("pointerleave", () => { bar.hidden = tip.hidden = true; });
}
"""
HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{HASH}'"


def page(title: str, sections: Iterable[str]) -> bytes:
    """The whole file. A half surrogate pair, which UTF-8 can't hold, becomes a question mark."""
    head = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{text(title)}</h1>",
    ]
    end = f"<script>{SCRIPT}</script></body></html>\n"
    return "\n".join([*head, *sections, end]).encode("utf-8", "replace")


def text(value: Any) -> str:
    """Any value as escaped text.

    A long text is cut and says by how much. Control characters, which HTML forbids, become ␀.
    """
    whole = "none" if value is None else str(value)
    rest = len(whole) - MAX_CHARACTERS
    shown = "".join(
        letter if letter >= " " or letter in "\n\t" else "\N{SYMBOL FOR NULL}"
        for letter in escape(whole[:MAX_CHARACTERS])
    )
    return f"{shown} [{rest} characters more]" if rest > 0 else shown


def figures(value: Any, form: str) -> str:
    """A number in the given format; a dash where there is none."""
    return "–" if math.isnan(known := number(value)) else format(known, form)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    lines = ["<table><tr>" + "".join(f"<th>{text(name)}</th>" for name in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])


def tiles(facts: Iterable[tuple[str, str]]) -> str:
    """Names and values side by side, as many as fit; values are HTML already."""
    cells = (f"<div><dt>{text(name)}</dt><dd>{value}</dd></div>" for name, value in facts)
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def plot(drawn: Chart) -> str:
    """A chart with the values that the script shows under the pointer."""
    svg = drawn.svg.replace("<svg ", '<svg class="plot" ', 1)
    data = f'<script type="application/json">{hover_json(drawn.hover)}</script>'
    return f'<div class="holder">{svg}{data}</div>'


def chart_figure(
    drawn: Chart, title: str, caption: str, entries: Sequence[tuple[str, str, str, bool]]
) -> str:
    """A chart with its title, legend and caption."""
    keys = "".join(
        f"<span>{sample(colour, dash, marked=marked)}{text(name)}</span>"
        for name, colour, dash, marked in entries
    )
    legend = f'<div class="keys">{keys}</div>' if keys else ""
    caption = f"<figcaption>{text(caption)}</figcaption>"
    return f"<figure><h3>{text(title)}</h3>{legend}{plot(drawn)}{caption}</figure>"


def details(summary: str, body: str) -> str:
    """A folded section; both are HTML already."""
    return f"<details><summary>{summary}</summary>{body}</details>"


def note(line: str) -> str:
    """One line on what is missing or broken."""
    return f'<p class="note">{text(line)}</p>'


def colour_choice() -> str:
    """Which colours the responses have, and what the colours mean."""
    choices = "".join(
        f'<label><input type="radio" name="colour" id="by-{name}"{checked}> {label}</label>'
        for name, label, checked in (
            ("version", "weight version", " checked"),
            ("advantage", "advantage", ""),
            ("nothing", "no colour", ""),
        )
    )
    names = [*map(str, range(MAX_STALENESS_SHADE)), f"{MAX_STALENESS_SHADE} or more"]
    stale = " ".join(f'<span class="key v{each}">{name}</span>' for each, name in enumerate(names))
    return (
        f"<fieldset><legend>Colour tokens by</legend>{choices}</fieldset>"
        '<p class="faint">Weight version: versions between the sampling of a token and its '
        f"training {stale}. Advantage: "
        '<span class="key up" style="--a:40">above</span> and '
        '<span class="key down" style="--a:40">below</span> the mean of the group.</p>'
    )


def response(pieces: Sequence[Piece], *, step: int, advantage: float) -> str:
    """A response with a span per weight version; the colour of its advantage is on the whole."""
    up = "" if math.isnan(advantage) or advantage == 0 else "up" if advantage > 0 else "down"
    strength = 0 if not up else round(min(60.0, 15 + 30 * abs(advantage)))
    spans, left = [], MAX_CHARACTERS
    for piece in pieces:
        shown, rest = piece.text[: max(left, 0)], len(piece.text) - max(left, 0)
        left -= len(piece.text)
        more = f" [{rest} characters more]" if rest > 0 else ""
        if piece.version is None:
            spans.append(text(shown) + more)
            continue
        staleness = step - piece.version
        tokens = f"tokens {piece.first} to {piece.end}"
        title = f"weight version {piece.version}, {staleness} behind; {tokens}"
        shade = min(max(staleness, 0), MAX_STALENESS_SHADE)
        spans.append(f'<span class="v{shade}" title="{title}">{text(shown)}{more}</span>')
    return f'<pre class="{up}" style="--a:{strength}">{"".join(spans)}</pre>'
