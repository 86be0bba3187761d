"""Boards: titled pictures side by side, drawn in a few milliseconds, for views that follow a slider.

A board holds its pictures and what they show in words. What goes into one is computed in `views.py`; figures with axes
are in `plots.py`.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from setlib.data.labels import ClassSet
from setlib.plots.charts import NO_VALUE

WIDTH, GAP, TEXT, SWATCH = 948, 8, 13, 11  # pixels: of a board (a notebook's text width), between panels, type, legend
INK, RING = (34, 34, 34), ((0, 0, 0), (255, 255, 255))
MARK = np.array((230, 159, 0))  # orange of Okabe and Ito: pixels that are pointed out, on grey


class Panel(NamedTuple):
    """One picture, (h, w, 3) uint8, under its title. band: radii of rings around zero frequency, 1 = half its side."""

    picture: np.ndarray
    title: str = ""
    band: tuple[float, float] | None = None


class Board:
    """Rows of panels, those of a row equally wide, with a sentence on what they show and the colours of classes.

    legend: a class set and the places in it that occur, each with a note (or "").
    """

    def __init__(
        self,
        rows: Sequence[Sequence[Panel | None]],
        words: str,
        legend: tuple[ClassSet, dict[int, str]] | None = None,
    ) -> None:
        self.rows, self.words, self.legend = [list(row) for row in rows], words, legend

    def panel(self, title: str) -> np.ndarray:
        """The picture of the first panel whose title begins so. Raises KeyError if there is none."""
        for panel in filter(None, sum(self.rows, [])):
            if panel.title.startswith(title):
                return panel.picture
        raise KeyError(title)

    def image(self, with_words: bool = True) -> Image.Image:
        """The whole board as one picture, `WIDTH` pixels wide."""
        blocks = [_row(row) for row in self.rows]
        blocks += [_legend(*self.legend)] if self.legend and self.legend[1] else []
        blocks += [_text(self.words, WIDTH)] if with_words and self.words else []
        whole = Image.new("RGB", (WIDTH, sum(b.height for b in blocks) + GAP * (len(blocks) - 1)), "white")
        top = 0
        for block in blocks:
            whole.paste(block, (0, top))
            top += block.height + GAP
        return whole

    def jpeg(self) -> bytes:
        """The pictures alone, quickly, for a live view."""
        content = io.BytesIO()
        self.image(with_words=False).save(content, "JPEG", quality=92, subsampling=0)
        return content.getvalue()

    def png(self, code: str = "") -> bytes:
        """Pictures and words. code: kept in the file, as its text entry "Source"."""
        content, notes = io.BytesIO(), PngImagePlugin.PngInfo()
        notes.add_itxt("Description", self.words)
        if code:
            notes.add_itxt("Source", code)
        self.image().save(content, "PNG", pnginfo=notes)
        return content.getvalue()

    def savefig(self, path: str | Path, **_: Any) -> None:
        """Writes the PNG, as a figure of matplotlib does."""
        Path(path).write_bytes(self.png())

    def _repr_html_(self) -> str:
        words, picture = html.escape(self.words), base64.b64encode(self.png()).decode()
        return f'<img alt="{words}" style="max-width:100%" src="data:image/png;base64,{picture}">'


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), TEXT)


@functools.lru_cache(64)
def _text(text: str, width: int) -> Image.Image:
    """Text in as many lines as it needs at a width."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if line and _font().getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    height = TEXT + 5
    made = Image.new("RGB", (width, height * len(lines)), "white")
    pen = ImageDraw.Draw(made)
    for place, line in enumerate(lines):
        pen.text((0, place * height), line, INK, _font())
    return made


def _row(row: Sequence[Panel | None]) -> Image.Image:
    width = (WIDTH - GAP * (len(row) - 1)) // len(row)
    shown = [(place * (width + GAP), panel) for place, panel in enumerate(row) if panel]
    blocks = [(x, _text(panel.title, width), _drawn(panel, width)) for x, panel in shown]
    head = max(title.height for _, title, _ in blocks)
    made = Image.new("RGB", (WIDTH, head + max(picture.height for *_, picture in blocks)), "white")
    for x, title, picture in blocks:
        made.paste(title, (x, head - title.height))
        made.paste(picture, (x, head))
    return made


def _drawn(panel: Panel, width: int) -> Image.Image:
    picture = Image.fromarray(panel.picture)
    size = width, max(1, round(picture.height * width / picture.width))
    picture = picture.resize(size, Image.Resampling.NEAREST if width > picture.width else Image.Resampling.BOX)
    pen = ImageDraw.Draw(picture)
    for radius in panel.band or ():
        if 0 < radius < math.sqrt(2):
            for grow, colour in ((1, RING[0]), (0, RING[1])):
                (x, a), (y, b) = (
                    ((bins // 2 + 0.5) / bins * side, radius * side / 2 + grow)  # zero frequency is a bin wide
                    for side, bins in zip(size, panel.picture.shape[1::-1], strict=True)
                )
                pen.ellipse((x - a, y - b, x + a, y + b), outline=colour)
    return picture


def _legend(class_set: ClassSet, notes: dict[int, str]) -> Image.Image:
    """A square of each class's colour with its name."""
    x = y = 0
    places, step = [], TEXT + 6
    for place, note in notes.items():
        text = f"{class_set.classes[place]} {note}".strip()
        wide = round(SWATCH + 5 + _font().getlength(text) + 14)
        if x and x + wide > WIDTH:
            x, y = 0, y + step
        places.append((x, y, class_set.colours[place], text))
        x += wide
    made = Image.new("RGB", (WIDTH, y + step), "white")
    pen = ImageDraw.Draw(made)
    for x, y, colour, text in places:
        pen.rectangle((x, y + 3, x + SWATCH, y + 3 + SWATCH), colour, (136, 136, 136))
        pen.text((x + SWATCH + 5, y), text, INK, _font())
    return made


def in_colour(values: np.ndarray, colours: str, low: float, high: float) -> np.ndarray:
    """(h, w) values as (h, w, 3) uint8: matplotlib's colours from low to high, grey where there is none (NaN)."""
    scaled = (np.asarray(values, np.float32) - low) / max(high - low, 1e-12)
    return matplotlib.colormaps[colours].with_extremes(bad=NO_VALUE)(scaled.clip(0, 1), bytes=True)[..., :3]


def over_grey(picture: np.ndarray, values: np.ndarray, low: float, high: float, patch: int = 1) -> np.ndarray:
    """(H, W) values from `low` to `high` in colour over the greyed picture (h, w, 3) uint8, in squares of `patch`."""
    height, width = picture.shape[:2]
    colours = in_colour(values, "viridis", low, high).repeat(patch, 0).repeat(patch, 1)[:height, :width]
    return (0.4 * picture.mean(-1, keepdims=True) + 0.6 * colours).astype(np.uint8)


def marked(picture: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The picture (h, w, 3) uint8 in grey, with the pixels `where`, (h, w) bool, in orange."""
    grey = 0.6 * picture.mean(-1, keepdims=True) + 60
    return np.where(where[..., None], 0.2 * grey + 0.8 * MARK, grey).clip(0, 255).astype(np.uint8)
