"""Pictures side by side: titled panels in rows, with the colours of classes, scales, and a sentence on what they show.

Drawn with Pillow in a few milliseconds, so that a view can follow a slider. What has axes is in `charts.py`.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from setlib.data.labels import IGNORE, ClassSet

WIDTH, GAP, TEXT, LINE, SWATCH = 950, 8, 13, 18, 11  # pixels: a notebook's text width, between panels, type, legend
BAR, SCALE = 10, 48  # pixels: of the colours of a scale, and with their ticks
INK, FRAME = (34, 34, 34), (136, 136, 136)
MARK = np.array((230, 159, 0))  # orange of Okabe and Ito: pixels that are pointed out, on grey
NO_VALUE = "#808080"  # where there is no phase


class Scale(NamedTuple):
    """What colours mean: matplotlib's `colours` run from low to high; ticks: values with their text."""

    colours: str
    low: float
    high: float
    ticks: dict[float, str]


class Cells(NamedTuple):
    """What a click into a picture chooses: so many rows and columns of a box (left, top, width, height) in it.

    The box is in fractions of the picture; rows and columns need not be whole, where the last ones are cut.
    """

    rows: float
    columns: float
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

    def at(self, x: float, y: float) -> int | None:
        """The cell, row by row, at a place of the picture, in fractions of it; None beside the box."""
        left, top, width, height = self.box
        row, column = (y - top) / height * self.rows, (x - left) / width * self.columns
        is_inside = 0 <= row < self.rows and 0 <= column < self.columns
        return int(row) * math.ceil(self.columns) + int(column) if is_inside else None


class Panel(NamedTuple):
    """One picture, (h, w, 3) uint8, under its title.

    band: radii of rings around zero frequency, 1 = half the picture's side; scale: of the colours, drawn at the end of
    the row; is_wide: takes the whole row; cells: what a click chooses, in one or several boxes.
    """

    picture: np.ndarray
    title: str = ""
    band: tuple[float, float] | None = None
    scale: Scale | None = None
    is_wide: bool = False
    cells: tuple[Cells, ...] = ()


@dataclass(repr=False, eq=False)
class Board:
    """Rows of panels in equally wide columns (None: an empty place), words on what they show, colours by name."""

    rows: list[list[Panel | None]]
    columns: int
    words: str = ""
    legend: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    @property
    def panels(self) -> list[Panel]:
        """All panels, row by row."""
        return [panel for row in self.rows for panel in row if panel]

    def panel(self, title: str) -> np.ndarray:
        """The picture of the first panel whose title begins so. Raises KeyError if there is none."""
        for panel in self.panels:
            if panel.title.startswith(title):
                return panel.picture
        raise KeyError(title)

    def image(self, with_words: bool = True) -> Image.Image:
        """The whole board as one picture, `WIDTH` pixels wide."""
        pieces = self._pieces(with_words)
        whole = Image.new("RGB", (WIDTH, max(top + piece.height for piece, _, top, _ in pieces)), "white")
        for piece, left, top, _ in pieces:
            whole.paste(piece, (left, top))
        return whole

    def _pieces(self, with_words: bool) -> list[tuple[Image.Image, int, int, Panel | None]]:
        """What the picture is made of, where it lies, and whose it is: titles above panels, a scale behind the last."""
        right = SCALE if any(panel.scale for panel in self.panels) else 0
        width = (WIDTH - right - GAP * (self.columns - 1)) // self.columns
        pieces, top = [], 0
        for row in filter(any, self.rows):
            widths = {place: WIDTH if panel.is_wide else width for place, panel in enumerate(row) if panel}
            titles = {place: _text(row[place].title, own) for place, own in widths.items()}
            pictures = {place: _drawn(row[place], own) for place, own in widths.items()}
            top += max(title.height for title in titles.values())  # of the pictures
            height = max(picture.height for picture in pictures.values())
            for place, title in titles.items():
                left = place * (width + GAP)
                pieces += [(title, left, top - title.height, None), (pictures[place], left, top, row[place])]
            if scale := next((panel.scale for panel in row if panel and panel.scale), None):
                pieces.append((_bar(scale, height), WIDTH - SCALE + GAP, top, None))
            top += height + GAP
        if self.legend:
            pieces.append((_legend(self.legend), 0, top, None))
            top += pieces[-1][0].height + GAP
        return pieces + ([(_text(self.words, WIDTH), 0, top, None)] if with_words and self.words else [])

    def locate(self, x: float, y: float) -> tuple[Panel, float, float] | None:
        """The panel at a place of the picture without words, and the place inside the panel's own picture.

        Places are fractions from the upper left corner. None beside the pictures of the panels.
        """
        pieces = self._pieces(with_words=False)
        x, y = x * WIDTH, y * max(top + piece.height for piece, _, top, _ in pieces)
        for piece, left, top, panel in pieces:
            right, down = (x - left) / max(piece.width, 1), (y - top) / max(piece.height, 1)
            if panel and 0 <= right < 1 and 0 <= down < 1:
                return panel, right, down
        return None

    def jpeg(self) -> bytes:
        """The pictures alone, quickly, for a live view."""
        content = io.BytesIO()
        self.image(with_words=False).save(content, "JPEG", quality=92, subsampling=0)
        return content.getvalue()

    def png(self, code: str = "") -> bytes:
        """Pictures and words. code: kept in the file, as its text entry "Source"."""
        self.savefig(content := io.BytesIO(), code=code)
        return content.getvalue()

    def savefig(self, target: str | Path | IO, dpi: int = 100, bbox_inches: str = "tight", code: str = "") -> None:
        """Writes the PNG to a path or a buffer; called as a figure of matplotlib is, but its size is its own."""
        notes = PngImagePlugin.PngInfo()
        notes.add_itxt("Description", self.words)
        if code:
            notes.add_itxt("Source", code)
        self.image().save(target, "PNG", pnginfo=notes)

    def _repr_html_(self) -> str:
        told = self.words or "; ".join(panel.title for panel in self.panels if panel.title)
        picture = base64.b64encode(self.png()).decode()
        return f'<img alt="{html.escape(told)}" style="max-width:100%" src="data:image/png;base64,{picture}">'


# Drawing


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), TEXT)


@functools.lru_cache(64)
def _text(text: str, width: int) -> Image.Image:
    """Text in as many lines as it needs at a width; none where it is empty."""
    lines = []
    for paragraph in text.split("\n") if text else ():
        line = ""
        for piece in re.split(r"(?<=[ /_-])", paragraph):
            if line and _font().getlength((line + piece).rstrip()) > width:
                lines.append(line)
                line = ""
            line += piece
        lines.append(line)
    made = Image.new("RGB", (width, LINE * len(lines)), "white")
    pen = ImageDraw.Draw(made)
    for place, line in enumerate(lines):
        pen.text((0, place * LINE), line, INK, _font())
    return made


def _drawn(panel: Panel, width: int) -> Image.Image:
    """The picture at a width, with the rings of its band."""
    picture = Image.fromarray(panel.picture)
    size = width, max(1, round(picture.height * width / picture.width))
    is_exact = panel.scale or width > picture.width  # the mean of two colours of a scale is no value's colour
    picture = picture.resize(size, Image.Resampling.NEAREST if is_exact else Image.Resampling.BOX)
    pen = ImageDraw.Draw(picture)
    h, w = panel.picture.shape[:2]
    x, y = (w // 2 + 0.5) / w * size[0], (h // 2 + 0.5) / h * size[1]  # zero frequency is a bin wide
    for radius in panel.band or ():
        if 0 < radius < math.sqrt(2):
            a, b = radius * size[0] / 2, radius * size[1] / 2
            pen.ellipse((x - a - 1, y - b - 1, x + a + 1, y + b + 1), outline="black")
            pen.ellipse((x - a, y - b, x + a, y + b), outline="white")
    return picture


def _bar(scale: Scale, height: int) -> Image.Image:
    """The colours of a scale, the highest on top, with its ticks."""
    made = Image.new("RGB", (SCALE - GAP, height), "white")
    ramp = np.linspace(scale.high, scale.low, height)[:, None].repeat(BAR, 1)
    made.paste(Image.fromarray(in_colour(ramp, scale.colours, scale.low, scale.high)), (0, 0))
    pen = ImageDraw.Draw(made)
    for value, text in scale.ticks.items():
        y = (scale.high - value) / max(scale.high - scale.low, 1e-12) * height
        pen.text((BAR + 4, min(max(y, TEXT / 2), height - TEXT / 2)), text, INK, _font(), anchor="lm")
    return made


def _legend(colours: Mapping[str, tuple[int, int, int]]) -> Image.Image:
    """A square of each colour with its name, in as many lines as they need."""
    made = Image.new("RGB", (WIDTH, LINE * len(colours)), "white")
    pen = ImageDraw.Draw(made)
    x = y = 0
    for text, colour in colours.items():
        wide = SWATCH + 5 + round(_font().getlength(text))
        if x + wide > WIDTH:
            x, y = 0, y + LINE
        pen.rectangle((x, y + 3, x + SWATCH, y + 3 + SWATCH), colour, FRAME)
        pen.text((x + SWATCH + 5, y), text, INK, _font())
        x += wide + 14
    return made.crop((0, 0, WIDTH, y + LINE))


# Colours


def in_colour(values: np.ndarray, colours: str, low: float, high: float) -> np.ndarray:
    """(h, w) values as (h, w, 3) uint8: matplotlib's colours from low to high, grey where there is none (NaN)."""
    scaled = (np.asarray(values, np.float32) - low) / max(high - low, 1e-12)
    return matplotlib.colormaps[colours].with_extremes(bad=NO_VALUE)(scaled.clip(0, 1), bytes=True)[..., :3]


def over_grey(picture: np.ndarray, values: np.ndarray, low: float, high: float, patch: int = 1) -> np.ndarray:
    """(H, W) values from `low` to `high` in colour over the greyed picture (h, w, 3) uint8, in squares of `patch`."""
    height, width = picture.shape[:2]
    colours = in_colour(values, "viridis", low, high).repeat(patch, 0).repeat(patch, 1)[:height, :width]
    return (0.4 * picture.mean(-1, keepdims=True) + 0.6 * colours).astype(np.uint8)


def framed(picture: np.ndarray, row: int, column: int, patch: int) -> np.ndarray:
    """The picture (h, w, 3) uint8 with a frame, white and black, around one square of `patch` pixels."""
    made = Image.fromarray(picture)
    left, top = column * patch, row * patch
    for grow, ink in ((1, "black"), (0, "white")):
        box = (left - grow, top - grow, left + patch - 1 + grow, top + patch - 1 + grow)
        ImageDraw.Draw(made).rectangle(box, outline=ink)
    return np.array(made)


def marked(picture: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The picture (h, w, 3) uint8 in grey, with the pixels `where`, (h, w) bool, in orange."""
    grey = 0.6 * picture.mean(-1, keepdims=True) + 60
    return np.where(where[..., None], 0.2 * grey + 0.8 * MARK, grey).clip(0, 255).astype(np.uint8)


def coloured(image: np.ndarray, label: np.ndarray, class_set: ClassSet, alpha: float = 0.6) -> np.ndarray:
    """A picture (h, w, 3) uint8 under its label's colours, (h, w) places in class_set; 255 stays as it is."""
    mixed = (1 - alpha) * image + alpha * class_set.palette[label]
    return np.where((label == IGNORE)[..., None], image, mixed.round()).astype(np.uint8)


def class_colours(class_set: ClassSet, places: Iterable[int]) -> dict[str, tuple[int, int, int]]:
    """The legend of some classes, by their places in a class set; 255 is left out."""
    return {class_set.classes[place]: class_set.colours[place] for place in places if place != IGNORE}


# Sheets


def class_legend(class_set: ClassSet) -> Board:
    """The colours of a class set."""
    return Board([], 1, legend=class_colours(class_set, range(len(class_set))))


def sheet(
    rows: Sequence[Sequence[np.ndarray | None]],
    row_titles: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    titles: Sequence[Sequence[str]] = (),
) -> Board:
    """Pictures in a grid, (h, w, 3) uint8 or float in [0, 1]; None leaves a place empty.

    row_titles, column_titles: above the first picture of a row, and above the first row; titles: one above every
    picture, row by row.
    """
    made = Board([], max(2, *map(len, rows)))  # a lone column is half as wide as the page
    for i, row in enumerate(rows):
        panels = []
        for j, image in enumerate(row):
            above = [titles[i][j]] if titles else []
            above += [row_titles[i]] if row_titles and j == 0 else []
            above += [column_titles[j]] if column_titles and i == 0 else []
            if image is not None and image.dtype != np.uint8:
                image = np.uint8(255 * image.clip(0, 1))
            panels.append(None if image is None else Panel(image, "\n".join(above)))
        made.rows.append(panels)
    return made


def prediction_sheet(
    samples: Sequence[tuple[np.ndarray, np.ndarray | None, Mapping[str, np.ndarray]]],
    class_set: ClassSet,
    titles: Sequence[str] = (),
) -> Board:
    """One row a sample: picture, label and what each model predicts, with the colours of the classes that occur.

    samples: (picture (h, w, 3) uint8, label (h, w) in places of class_set or None, {model: (h, w) train ids}); the
    predictions are merged into class_set. titles: one a row.
    """
    has_labels = any(label is not None for _, label, _ in samples)
    rows, seen = [], set()
    for image, label, predicted in samples:
        maps = [class_set.to_place[train_ids] for train_ids in predicted.values()]
        maps = [label, *maps] if has_labels else maps
        rows.append([image, *(None if one is None else coloured(image, one, class_set, 0.75) for one in maps)])
        seen.update(int(place) for one in maps if one is not None for place in np.unique(one))
    columns = ["picture", *(["label"] if has_labels else []), *samples[0][2]]
    made = sheet(rows, titles, columns)
    made.legend = class_colours(class_set, sorted(seen))
    return made


def spectrum_row(
    values: Sequence[np.ndarray],
    titles: Sequence[str],
    is_phase: bool = False,
    band: tuple[float, float] | None = None,
    with_scale: bool = False,
) -> list[Panel]:
    """Log amplitudes, or phases in radians (NaN: none), (h, w), zero frequency in the middle, on one colour scale."""
    if is_phase:
        scale = Scale("twilight", -math.pi, math.pi, {-math.pi: "-π", 0: "0", math.pi: "π"})
    else:
        low, high = min(float(one.min()) for one in values), max(float(one.max()) for one in values)
        ticks = {tick: f"{tick:g}" for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high}
        scale = Scale("magma", low, high, ticks)
    pictures = [in_colour(one, scale.colours, scale.low, scale.high) for one in values]
    shown = scale if with_scale else None
    return [Panel(picture, title, band, shown) for picture, title in zip(pictures, titles, strict=True)]


def spectra(images: Sequence[np.ndarray], parts: Mapping[str, Sequence[np.ndarray]], titles: Sequence[str]) -> Board:
    """Pictures above their spectra, one column a picture, one row and scale a part; zero frequency in the middle.

    parts: {name with unit: one (h, w) a picture}; a part whose name starts with "phase" is in radians.
    """
    made = sheet([images], column_titles=titles)
    for name, values in parts.items():
        names = [name, *[""] * (len(values) - 1)]
        made.rows.append(spectrum_row(values, names, name.startswith("phase"), with_scale=True))
    return made


def depth(metres: np.ndarray, title: str = "distance (m), white: sky") -> Panel:
    """Distance (h, w) in metres, inf for the sky, in logarithmic colours with their scale."""
    is_seen = np.isfinite(metres)
    logs = np.log10(np.where(is_seen, metres, 1))
    low, high = float(logs[is_seen].min()), float(logs[is_seen].max())
    ticks = {math.log10(d): str(d) for d in (1, 2, 5, 10, 20, 50, 100, 200, 500) if low <= math.log10(d) <= high}
    picture = in_colour(logs, "viridis_r", low, high)
    picture[~is_seen] = 255
    return Panel(picture, title, scale=Scale("viridis_r", low, high, ticks))


def attention(one: Any, token: int, picture: np.ndarray, patch: int) -> list[Panel]:
    """Where a token attends: over the picture (h, w, 3) uint8, and over the spectrum for a branch that reads one.

    one: an `Attention` of `analysis.tokens.read_tokens`; patch: pixels of a patch's side.
    """
    share = one.picture[..., token]
    kind = "share of the attention" if one.spectrum is None else "part of the feature at its frequencies"
    title = f"over the picture: {kind}, {100 * share.min():.2f} to {100 * share.max():.2f} %"
    panels = [Panel(over_grey(picture, share, share.min(), share.max(), patch), title)]
    if one.spectrum is not None:
        half, width = one.spectrum[..., token], share.shape[1]
        mirrored = np.roll(half[::-1, ::-1], 1, axis=0)[:, -((width + 1) // 2) : -1]  # at minus each frequency
        full = np.fft.fftshift(np.concatenate([half, mirrored], axis=1))
        title = f"over the spectrum: share of the attention, {100 * full.min():.2f} to {100 * full.max():.2f} %"
        panels.append(Panel(in_colour(full, "viridis", full.min(), full.max()), title))
    return panels


def token_sheet(picture: np.ndarray, attended: Sequence[Any]) -> Board:
    """Where the most influential token of every layer and branch attends: over the picture, and over the spectrum.

    picture: (h, w, 3) uint8; attended: of `analysis.tokens.read_tokens`; without tokens the board is a sentence.
    """
    panels = []
    for one in attended:
        token, grid = int(one.influence.argmax()), one.picture.shape
        patch = max(math.ceil(picture.shape[0] / grid[0]), math.ceil(picture.shape[1] / grid[1]))
        for panel in attention(one, token, picture, patch):
            panels.append(panel._replace(title=f"layer {one.layer} {one.branch}, token {token}\n{panel.title}"))
    rows = [panels[start : start + 4] for start in range(0, len(panels), 4)]
    return Board(rows, 4, "" if panels else "There are no tokens that attend to anything here.")
