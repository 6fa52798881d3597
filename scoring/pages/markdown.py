"""A page as Markdown. Figures are on the HTML page; pictures that lie in files are linked."""

from __future__ import annotations

from scoring.pages.page import Page
from scoring.show import text


def render(page: Page) -> str:
    """The whole document."""
    parts = [f"# {page.title}", "", f"**{page.verdict}**", ""]
    for paragraph in page.lead:
        parts += [paragraph, ""]
    for file, shown in page.pictures.items():
        parts += [f"![{shown}]({file})", ""]
    for section in page.sections:
        parts += [f"## {section.title}", ""]
        for paragraph in section.paragraphs:
            parts += [paragraph, ""]
        for table in section.tables:
            parts += [text.markdown(table, level=3), ""]
    return "\n".join(parts)
