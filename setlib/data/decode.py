"""Files -> arrays: pictures of any mode as RGB, labels of any encoding as class ids."""

from __future__ import annotations

import json
import math
import struct
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageOps

from setlib.data.labels import IGNORE, IdMap
from setlib.files import small

# what Pillow and json raise for a damaged file
UNREADABLE = (OSError, SyntaxError, ValueError, LookupError, RecursionError, TypeError, ArithmeticError, struct.error)
UNREADABLE += (Image.DecompressionBombError,)
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # others are programs (EPS), or rare
Size = tuple[int, int]  # (w, h)
MOST_PIXELS = 2**28  # of one picture; decoded it is 0.8 GB
Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # Pillow refuses twice that
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class LabelError(ValueError):
    """A label that can be decoded but not used; the message begins with a verb: the label's name goes in front."""


def open_picture(source: Any) -> Image.Image:
    """Pillow's open. Raises ValueError also for what it cannot read or finds too large, with the way round."""
    try:
        return Image.open(source, formats=FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(f"more than {MOST_PIXELS / 1e6:.0f} million pixels: cut or shrink it first") from None
    except Image.UnidentifiedImageError as error:
        if not isinstance(source, BytesIO) and b"ftyp" in Path(source).read_bytes()[:12]:
            raise ValueError("HEIC or its like, which is not read: export it as JPG or PNG") from None
        raise error from None


def read_picture(image: Any, long_edge: int = 0) -> np.ndarray:
    """A path, PIL picture or array as (h, w, 3) uint8 RGB, EXIF rotation applied, transparency on white.

    Greys of more than 8 bits fill as many of 8, 10, 12, 14 or 16 bits as the largest needs; floats are up to 1 or it.
    long_edge: a JPEG may be decoded at a half, a quarter or an eighth of its size, as long as its long edge does not
    fall below this; 0: at its own size. Raises ValueError if it cannot be read.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"Expected a picture (h, w, 3) of uint8, got {image.dtype} {image.shape}.")
        return image
    try:
        picture = image if isinstance(image, Image.Image) else open_picture(image)
        if long_edge and picture.format == "JPEG":
            least = min(1.0, long_edge / max(picture.size))
            picture.draft(None, tuple(math.ceil(side * least) for side in picture.size))
        if picture is image:
            picture = ImageOps.exif_transpose(picture)
        else:  # our own: spare a copy
            ImageOps.exif_transpose(picture, in_place=True)
        if picture.mode == "F" or picture.mode.startswith("I"):  # floats, or greys of 16 bits
            grey = np.asarray(picture)
            depths = () if picture.mode == "F" else (8, 10, 12, 14, 16)
            limit = next((2**bits - 1 for bits in depths if grey.max() < 2**bits), max(1.0, float(grey.max())))
            rows = [(row.astype(np.float64) / limit * 255).clip(0, 255).astype(np.uint8) for row in grey]
            picture = Image.fromarray(np.stack(rows))
        if "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))
    except UNREADABLE as error:
        name = "this row" if isinstance(image, BytesIO) else image
        raise ValueError(f"{name} cannot be read as a picture ({error}).") from None


def measure(source: Any, label_size: Size | None = None, whole: bool = False) -> tuple[Size, Size, int]:
    """Size (w, h) of a picture as it is shown and as it is stored, and its EXIF orientation. Reads the header.

    whole: decodes the picture, so that a PNG's EXIF, which may stand at the file's end, counts too. So is done where
    the size is not that of its label, (w, h).
    """
    if str(source).endswith(".json"):
        content = json.loads(small(Path(source)))
        size = int(content["imgWidth"]), int(content["imgHeight"])
        if min(size) < 1 or size[0] * size[1] > MOST_PIXELS:
            raise ValueError(f"a picture of {size[0]} x {size[1]} pixels cannot be")
        return size, size, 1
    with open_picture(source) as picture:
        if whole:
            picture.load()
        told = whole or picture.format != "PNG" or "exif" in picture.info
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1) if told else 1
    size = picture.size[::-1] if orientation >= 5 else picture.size  # from 5 on, width and height are swapped
    if whole or label_size in (None, size, picture.size):
        return size, picture.size, orientation
    return measure(source, whole=True)


def fitting(label: np.ndarray, picture: Any, stored: bool = False) -> np.ndarray:
    """A label (h, w) as its picture is shown: turned with it, if it was drawn on the stored pixels.

    Where the sizes say that it was, it is turned; where they do not tell (orientations 2 to 4, squares), if `stored`.
    """
    size, own_size, orientation = measure(picture, label.shape[::-1], whole=stored)
    if label.shape[::-1] != own_size or size == own_size and not stored:
        return label
    drawn = Image.fromarray(label)
    drawn.getexif()[ExifTags.Base.Orientation] = orientation
    return np.asarray(ImageOps.exif_transpose(drawn))


def read_label(source: Any, ids: IdMap) -> np.ndarray:
    """The raw class ids (h, w) uint8 of a label, in the form that its data set uses.

    Raises LabelError for another form or unknown ids, one of UNREADABLE for a damaged file.
    """
    if str(source).endswith(".json"):
        return _draw_polygons(Path(source), ids)
    with open_picture(source) as picture:
        if ids.form == "wide" and len(picture.getbands()) > 1:
            label = _first_of_wide(picture)
        else:
            label = np.asarray(ImageOps.exif_transpose(picture))
    if ids.form == "colours":
        if label.ndim != 3:
            raise LabelError("holds class ids: expected a picture of the classes' colours")
        return _colours_to_ids(label[..., :3], ids)
    if label.ndim != 2 or label.dtype not in (np.uint8, np.int32, np.uint16, bool):
        raise LabelError(f"is a colour picture of shape {label.shape}: expected one channel of class ids")
    allowed = sorted({*ids.names, IGNORE})
    known = ", ".join(map(str, allowed))
    if label.dtype != np.uint8 and (label.min(initial=0) < 0 or label.max(initial=0) > 255):
        raise LabelError(f"holds ids from {label.min()} to {label.max()}: expected {known}")
    label = label.astype(np.uint8, copy=False)
    pixels = np.array(Image.fromarray(label).histogram())
    unknown = np.setdiff1d(np.flatnonzero(pixels), allowed)
    if len(unknown):
        found = f"holds the unknown ids {unknown[:5].tolist()} ({pixels[unknown].sum()} pixels): expected {known}"
        if ids.name == "cityscapes" and unknown.max() <= 34:
            found += " (they look like Cityscapes label ids, not train ids)"
        raise LabelError(found)
    return label


def _first_of_wide(picture: Image.Image) -> np.ndarray:
    """The first channel's low bytes of a PNG of 16 bits, of which Pillow would keep the high ones (SYNTHIA)."""
    raw = picture.tile[0].args if picture.tile else ""
    if not str(raw).endswith(";16B"):
        raise LabelError(f"is a picture of mode {picture.mode} and 8 bits: expected 16 bits, ids in the first channel")
    if raw == "LA;16B":  # four bytes a pixel, as RGBA has them
        picture._mode, own, channel = "RGBA", "RGBA", 1
    else:
        own, channel = raw.replace("16B", "16L"), 0
    picture.tile = [picture.tile[0]._replace(args=own)]
    label = np.asarray(picture)
    return label if label.ndim == 2 else label[..., channel]


def _colours_to_ids(label: np.ndarray, ids: IdMap) -> np.ndarray:
    """(h, w, 3) uint8 colours -> (h, w) uint8 ids."""
    as_number = np.array([1 << 16, 1 << 8, 1])
    numbers, places = np.unique(label @ as_number, return_inverse=True)
    id_of = {int(ids.palette[i] @ as_number): i for i in ids.names}
    unknown = [list(number.to_bytes(3, "big")) for number in numbers.tolist() if number not in id_of]
    if unknown:
        raise LabelError(f"holds the unknown colour {unknown[0]}: expected those of {ids.name}.csv")
    return np.array([id_of[number] for number in numbers], np.uint8)[places].reshape(label.shape[:2])


def _draw_polygons(path: Path, ids: IdMap) -> np.ndarray:
    """The polygons of a Cityscapes-like JSON file, drawn in their order (IDD)."""
    places = {name: i for i, name in ids.names.items()}
    try:
        content = json.loads(small(path))
        size = int(content["imgWidth"]), int(content["imgHeight"])
        drawn = Image.new("L", size, places["unlabeled"])
        pen = ImageDraw.Draw(drawn)
        for shape in content["objects"]:
            if shape.get("deleted"):
                continue
            name = shape["label"] if shape["label"] in places else shape["label"].removesuffix("group")
            if name not in places:
                raise LabelError(f"holds the unknown class '{name}': expected those of {ids.name}.csv")
            if len(shape["polygon"]) > 1:
                pen.polygon([tuple(point) for point in shape["polygon"]], fill=places[name])
    except (KeyError, TypeError, AttributeError) as error:
        raise LabelError(f"is not a file of polygons ({error})") from None
    return np.array(drawn)
