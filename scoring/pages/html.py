"""A self-contained page: light and dark, for screen, keyboard and print; nothing is loaded from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from scoring.show.figures import COLOURS, ON_LIGHT
from scoring.show.text import Table


@dataclass
class Section:
    """One part of the page: a heading, then paragraphs, figures (svg, caption) and tables, in this order."""

    title: str
    paragraphs: list[str] = field(default_factory=list)
    figures: list[tuple[str, str]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def _variables(light: bool) -> str:
    used = [ON_LIGHT.get(colour, colour) if light else colour for colour in COLOURS]
    return " ".join(f"--c{k}: {colour};" for k, colour in enumerate(used))


_LIGHT = "--paper: #ffffff; --ink: #1b1c1e; --soft: #f1f3f5; --line: #c9ced4; --link: #0057a3; --grid: #d4d8dc; "
_LIGHT += _variables(light=True)
_DARK = "--paper: #16181c; --ink: #e8e9eb; --soft: #22262c; --line: #454b54; --link: #7cc0ff; --grid: #3a3f47; "
_DARK += _variables(light=False)
_STYLE = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 76rem; padding: 1rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.7rem; line-height: 1.2; margin: 1rem 0 .5rem; }}
h2 {{ font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }}
p, li {{ max-width: 48rem; }}
a {{ color: var(--link); }}
nav ul {{ display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; padding: 0; margin: 0; }}
.skip {{ position: absolute; left: -99rem; }}
.skip:focus {{ position: static; }}
:focus-visible {{ outline: 3px solid var(--link); outline-offset: 3px; }}
.scroll {{ overflow-x: auto; margin: 1rem 0 1.5rem; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; font-weight: 600; padding: .25rem 0 .5rem; }}
th, td {{ padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }}
thead th {{ background: var(--soft); vertical-align: bottom; white-space: normal; }}
th.l, td.l {{ text-align: left; }}
td.w {{ white-space: normal; min-width: 16rem; overflow-wrap: anywhere; }}
tbody th {{ font-weight: 600; white-space: nowrap; }}
figure {{ margin: 1rem 0 2rem; }}
figure svg {{ display: block; width: 100%; height: auto; }}
figcaption, .note {{ font-size: .9rem; max-width: 60rem; }}
@media print {{
  body {{ max-width: none; padding: 0; font-size: 10pt; }}
  nav, .skip {{ display: none; }}
  .scroll {{ overflow: visible; }}
  table {{ font-size: 7.5pt; }}
  th, td {{ padding: .15rem .3rem; white-space: normal; }}
  tr, figure {{ break-inside: avoid; }}
  h2 {{ break-after: avoid; }}
}}
"""


def page(title: str, lead: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole document."""
    links = "".join(f'<li><a href="#s{k}">{escape(part.title)}</a></li>' for k, part in enumerate(sections))
    body = "".join(_section(k, part) for k, part in enumerate(sections))
    intro = "".join(f"<p>{escape(text)}</p>" for text in lead)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>"
        '<a class="skip" href="#main">Skip to the results</a>'
        f'<header><h1>{escape(title)}</h1>{intro}<nav aria-label="Sections"><ul>{links}</ul></nav></header>'
        f'<main id="main">{body}</main></body></html>\n'
    )


def _section(number: int, part: Section) -> str:
    text = "".join(f"<p>{escape(paragraph)}</p>" for paragraph in part.paragraphs)
    figures = "".join(
        f'<figure tabindex="0" aria-label="{escape(caption)}">{svg}'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for svg, caption in part.figures
    )
    tables = "".join(_table(table) for table in part.tables)
    return f'<section id="s{number}"><h2>{escape(part.title)}</h2>{text}{figures}{tables}</section>\n'


def _table(table: Table) -> str:
    def cell(k: int, text: str, tag: str, scope: str) -> str:
        kind = ("l" if k in table.left else "") + (" w" if len(text) > 40 else "")
        shown = f' class="{kind.strip()}"' if kind.strip() else ""
        return f"<{tag}{scope}{shown}>{escape(text)}</{tag}>"

    head = "".join(cell(k, text, "th", ' scope="col"') for k, text in enumerate(table.headers))
    head = head.replace("_", "_<wbr>")  # long names may break at their underscores
    rows = "".join(
        "<tr>"
        + "".join(
            cell(k, text, "th" if k == 0 else "td", ' scope="row"' if k == 0 else "") for k, text in enumerate(row)
        )
        + "</tr>"
        for row in table.rows
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    label = escape(table.caption)
    return (
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table><caption>{label}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}"
    )
