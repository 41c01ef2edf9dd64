"""The report page, from the outcome of a quickstart and a Jinja template; nothing is fetched when it is opened."""

from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment
from markupsafe import Markup


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One part of the page: a sentence, a table, a picture, any of them."""

    title: str
    text: str = ""
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    picture: str = ""
    alt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """One figure at the top: its value, what it is, and whether it is as it should be."""

    value: str
    caption: str
    good: bool


def render(
    *, title: str, subtitle: str, headlines: list[Headline], sections: list[Section], footer: dict[str, Any]
) -> str:
    """Build the HTML text; everything but the pictures is escaped."""
    source = resources.files("host.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    pictures = {section.title: Markup(section.picture) for section in sections}  # our own SVG, not input
    return template.render(
        title=title, subtitle=subtitle, headlines=headlines, sections=sections, pictures=pictures, footer=footer
    )
