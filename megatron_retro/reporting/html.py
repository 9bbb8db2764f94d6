"""Reports as one HTML file: no outside assets, no script needed, light and dark, readable by a screen reader.

Every function returns HTML; text given to it is escaped. Plots are in `plots.py`.

    write_file(path, page("Retrieval quality", [section("Recall", table(...), line_plot(...))]))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --paper: #ffffff; --panel: #f5f7f9; --rule: #d4dae0;
  --good: #116329; --bad: #b3261e; --mark: #fff1a8;
  --s0: #0b5cad; --s1: #b35900; --s2: #1a7f37; --s3: #8250df; --s4: #a40e66; --s5: #57606a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa7b4; --paper: #0f1419; --panel: #171d24;
  --rule: #323b45; --good: #56d364; --bad: #ff8b82; --mark: #6b5900;
  --s0: #6cb6ff; --s1: #f0a35e; --s2: #56d364; --s3: #c4a5ff; --s4: #ff8cc8; --s5: #9aa7b4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--rule); }
.summary, figcaption, caption, .soft { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0 1.2rem; font-size: .93rem; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .7rem; margin: 1rem 0; }
dl div { background: var(--panel); border-radius: .4rem; padding: .6rem .8rem; }
dt { color: var(--soft); font-size: .85rem; } dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0 1.6rem; } figure svg { width: 100%; height: auto; max-width: 46rem; display: block; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr)); gap: 0 1.5rem; }
.plots figure { min-width: 0; } .plots svg text { font-size: 15px; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; } svg .axis { stroke: var(--soft); }
svg .bound { stroke: var(--ink); stroke-width: 1.5; }
svg .dot { fill: var(--s1); }
svg .grid { stroke: var(--rule); } details summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
h3, article h2 { font-size: 1rem; margin: 1.2rem 0 .3rem; padding: 0; border: 0; } article li { margin: .7rem 0; }
article { border: 1px solid var(--rule); border-radius: .4rem; padding: 0 1rem .6rem; margin: 1rem 0; }
.text { white-space: pre-wrap; font-family: ui-monospace, monospace; font-size: .86rem; background: var(--panel);
  border-radius: .3rem; padding: .5rem .7rem; overflow-wrap: anywhere; }
.follows { color: var(--soft); } mark { background: var(--mark); color: inherit; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
code, pre { font-family: ui-monospace, monospace; }
pre { background: var(--panel); padding: .8rem; border-radius: .4rem; overflow-x: auto; white-space: pre-wrap; }
"""


def page(title: str, parts: Sequence[str], *, summary: str = "", style: str = "", script: str = "") -> str:
    """A whole page. `style` and `script` are the caller's own code and are put in as they are."""
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}{style}</style></head><body><main>",
        f"<h1>{escape(title)}</h1>",
        f'<p class="summary">{escape(summary)}</p>' if summary else "",
        *parts,
        "</main>",
        f"<script>{script}</script>" if script else "",
        "</body></html>",
    ]
    return "\n".join(line for line in lines if line) + "\n"


def section(title: str, *parts: str) -> str:
    """A part of a page under its own heading."""
    return "\n".join(["<section>", f"<h2>{escape(title)}</h2>", *parts, "</section>"])


def side_by_side(figures: Sequence[str]) -> str:
    """Figures in as many columns as the window has room for."""
    return f'<div class="plots">{"".join(figures)}</div>'


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; `kind` is `good`, `bad` or `soft`."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def preformatted(text: str) -> str:
    """Text kept as it stands: commands, generated text."""
    return f"<pre>{escape(text)}</pre>"


def facts(values: Mapping[str, object]) -> str:
    """A few figures, each with its name."""
    items = [f"<div><dt>{escape(name)}</dt><dd>{escape(_shown(value))}</dd></div>" for name, value in values.items()]
    return "<dl>" + "".join(items) + "</dl>"


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, caption: str = "") -> str:
    """A table; columns of numbers stand to the right."""
    numeric = [bool(rows) and all(_is_number(row[column]) for row in rows) for column in range(len(header))]
    head = "".join(_cell("th", name, right, ' scope="col"') for name, right in zip(header, numeric, strict=True))
    body = [
        "<tr>" + "".join(_cell("td", value, right) for value, right in zip(row, numeric, strict=True)) + "</tr>"
        for row in rows
    ]
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    inside = f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{inside}</div>'


def _cell(tag: str, value: object, right: bool, extra: str = "") -> str:
    kind = ' class="number"' if right else ""
    return f"<{tag}{kind}{extra}>{escape(_shown(value))}</{tag}>"


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _shown(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
