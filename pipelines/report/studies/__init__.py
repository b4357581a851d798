"""The studies: every module here is one section of the page.

A module has a function ``section(frames: Frames) -> Section | None`` (None: the runs have nothing for it).
To add a study, add a module and its test; nothing else names it.
"""

import pkgutil
from base64 import b64encode
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

from pipelines.report.figures import ReportFigure
from pipelines.report.frames import Frames
from pipelines.report.tables import ReportTable


@dataclass(frozen=True)
class Picture:
    """A small image: its source, a data URI, and what it shows."""

    source: str
    text: str


def data_uri(webp: bytes) -> str:
    """The source of a picture."""
    return f"data:image/webp;base64,{b64encode(webp).decode()}"


@dataclass(frozen=True)
class Strip:
    """A row of small images, or of ``large`` ones."""

    title: str
    pictures: tuple[Picture, ...]
    large: bool = False


@dataclass(frozen=True)
class Section:
    """A section of the page.

    ``name``: its anchor; ``position``: sections come in ascending order; ``words``: what it shows, in a
    sentence; ``folded``: readers unfold the tables, and figures come first; ``on_top``: the words stand at
    the head of the page too; ``choose``: what readers choose one of the tables by, its title;
    ``strips``: rows of small images.
    """

    name: str
    title: str
    position: int
    words: str
    tables: tuple[ReportTable, ...] = ()
    figures: tuple[ReportFigure, ...] = ()
    folded: bool = False
    on_top: Literal["highlight", "warning"] | None = None
    choose: str = ""
    strips: tuple[Strip, ...] = ()


def sections(frames: Frames) -> list[Section]:
    """The sections of all studies that have something to show, in the order of the page."""
    modules = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    shown = [section for module in modules if (section := module.section(frames)) is not None]
    return sorted(shown, key=lambda section: (section.position, section.name))
