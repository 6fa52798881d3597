"""A self-contained page: light and dark, for screen, keyboard, telephone and print; nothing is loaded or run."""

from __future__ import annotations

from html import escape

from scoring.pages.page import Figure, Page, Section
from scoring.show import palette, svg
from scoring.show.text import Table

_LIGHT = f"--paper: {palette.PAPER['light']}; --soft: #f1f3f5; --edge: #c9ced4; --link: #0057a3; --grid: #d4d8dc; "
_LIGHT += "--grey: #a9adb2; --good: 26, 140, 255; " + palette.variables("light")
_DARK = f"--paper: {palette.PAPER['dark']}; --soft: #22262c; --edge: #454b54; --link: #7cc0ff; --grid: #3a3f47; "
_DARK += "--grey: #6b727b; --good: 60, 130, 255; " + palette.variables("dark")
SHADES = 8
_STYLE = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 82rem; padding: .75rem .75rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; margin: .75rem 0 .5rem; }}
h2 {{ font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--edge); }}
p, li {{ max-width: 48rem; }}
.verdict {{ font-size: 1.15rem; font-weight: 600; }}
a {{ color: var(--link); }}
nav ul {{ display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; padding: 0; margin: 0; }}
.skip {{ position: absolute; left: -99rem; }}
.skip:focus {{ position: static; }}
.hidden {{ position: absolute; }}
:focus-visible {{ outline: 3px solid var(--link); outline-offset: 3px; }}
.scroll {{ overflow-x: auto; margin: 1rem 0 .5rem; }}
table {{ border-collapse: separate; border-spacing: 0; font-size: .9rem; font-variant-numeric: tabular-nums; }}
.caption {{ font-weight: 600; margin: 1.5rem 0 0; max-width: 60rem; }}
th, td {{ padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--edge); white-space: nowrap;
  overflow-wrap: normal; }}
thead th {{ background: var(--soft); vertical-align: bottom; white-space: normal; overflow-wrap: normal; }}
th.l, td.l {{ text-align: left; }}
td.w {{ white-space: normal; min-width: 16rem; }}
tbody th {{ font-weight: 600; background: var(--paper); white-space: normal; min-width: 8.5rem;
  overflow-wrap: normal; }}
.s0, .s1 {{ position: sticky; z-index: 1; }}
.s0 {{ left: 0; width: 13rem; min-width: 13rem; max-width: 13rem; }}
.s1 {{ left: 13rem; }}
td.s1 {{ background: var(--paper); }}
{" ".join(f".h{k} {{ background: rgba(var(--good), {0.5 * (1 - k / (SHADES - 1)):.2f}); }}" for k in range(SHADES))}
figure {{ margin: 1rem 0 2rem; }}
.panels {{ display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 23rem), 1fr));
  max-width: 66rem; }}
.panels.small {{ grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); max-width: none; }}
.panels.one {{ grid-template-columns: minmax(0, 38rem); }}
.panels svg {{ display: block; width: 100%; height: auto; }}
figcaption, .note {{ font-size: .9rem; max-width: 60rem; }}
summary {{ cursor: pointer; font-weight: 600; padding: .4rem 0; }}
{svg.STYLE}
@media (max-width: 34rem) {{
  table {{ font-size: .82rem; }}
  th, td {{ padding: .25rem .4rem; }}
  tbody th {{ min-width: 7rem; }}
  td.w {{ min-width: 10rem; }}
  .s0 {{ width: 8rem; min-width: 8rem; max-width: 8rem; overflow-wrap: anywhere; }}
  .s1 {{ left: 8rem; }}
}}
@media print {{
  body {{ max-width: none; padding: 0; font-size: 10pt; }}
  nav, .skip {{ display: none; }}
  .scroll {{ overflow: visible; }}
  table {{ font-size: 7pt; }}
  th, td {{ padding: .1rem .25rem; white-space: normal; position: static; }}
  .s0 {{ width: auto; min-width: 0; max-width: none; }}
  td.w, tbody th {{ min-width: 0; }}
  thead {{ display: table-header-group; }}
  tr, .panel {{ break-inside: avoid; }}
  /* A grid does not keep its first row beside the heading before it; lines of inline blocks do. */
  .panels {{ display: block; max-width: none; }}
  .panel {{ display: inline-block; width: 48%; vertical-align: top; }}
  .panels.small .panel {{ width: 19%; }}
  .panels.one {{ break-inside: avoid; }}
  h1, h2, .caption, figcaption, summary {{ break-after: avoid; }}
  p, figcaption {{ break-inside: avoid; orphans: 3; widows: 3; }}
  details::details-content {{ content-visibility: visible; }}
  * {{ print-color-adjust: exact; }}
}}
"""


def render(page: Page) -> str:
    """The whole document."""
    links = "".join(f'<li><a href="#s{k}">{escape(part.title)}</a></li>' for k, part in enumerate(page.sections))
    body = "".join(_section(k, part) for k, part in enumerate(page.sections))
    intro = f'<p class="verdict">{escape(page.verdict)}</p>' + "".join(
        f"<p>{escape(text)}</p>" for text in page.lead
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(page.title)}</title><style>{_STYLE}</style></head>\n<body>"
        '<a class="skip" href="#main">Skip to the results</a>'
        f'<header><h1>{escape(page.title)}</h1>{intro}<nav aria-label="Sections"><ul>{links}</ul></nav></header>'
        f'<main id="main">{body}</main></body></html>\n'
    )


def _section(number: int, part: Section) -> str:
    text = "".join(f"<p>{escape(paragraph)}</p>" for paragraph in part.paragraphs)
    figures = [_figure(figure, f"f{number}-{k}") for k, figure in enumerate(part.figures)]
    tables = [_table(table) for table in part.tables]
    return f'<section id="s{number}"><h2>{escape(part.title)}</h2>{text}{"".join([*figures, *tables])}</section>\n'


def _figure(figure: Figure, name: str) -> str:
    panels = list(figure.panels)
    small = panels[0].small
    shared = f"{name}-b" if small and panels[0].background else ""
    drawn = "".join(
        f'<div class="panel">{svg.draw(panel, f"{name}-{k}", shared)}</div>' for k, panel in enumerate(panels)
    )
    symbol = svg.symbol(panels[0], shared) if shared else ""
    kind = "small" if small else "one" if len(panels) == 1 else ""
    caption = escape(figure.caption)
    inner = f'<div class="panels {kind}">{drawn}</div>'
    if figure.folded:
        inner = f"<details><summary>{caption}</summary>{inner}</details>"
        return f'<figure aria-label="{caption}" tabindex="0">{symbol}{inner}</figure>'
    return f'<figure aria-label="{caption}" tabindex="0">{symbol}<figcaption>{caption}</figcaption>{inner}</figure>'


def _table(table: Table) -> str:
    head = "".join(_cell(table, k, text, "th", ' scope="col"', None) for k, text in enumerate(table.headers))
    rows = []
    for i, row in enumerate(table.rows):
        shades = table.shades[i] if table.shades else [None] * len(row)
        cells = [
            _cell(table, k, text, "th" if k == 0 else "td", ' scope="row"' if k == 0 else "", shades[k])
            for k, text in enumerate(row)
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    label = escape(table.caption)
    return (
        f'<p class="caption">{label}</p><div class="scroll" role="region" aria-label="{label}" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{note}"
    )


def _cell(table: Table, k: int, text: str, tag: str, scope: str, shade: float | None) -> str:
    kinds = []
    if k in table.left:
        kinds.append("l")
    if len(text) > 40:
        kinds.append("w")
    if k < table.sticky:
        kinds.append(f"s{k}")
    if shade is not None:
        kinds.append(f"h{min(int(shade * SHADES), SHADES - 1)}")
    shown = f' class="{" ".join(kinds)}"' if kinds else ""
    content = escape(text)
    if tag == "th":
        content = content.replace("_", "_<wbr>")  # long names may break at their underscores
    return f"<{tag}{scope}{shown}>{content}</{tag}>"
