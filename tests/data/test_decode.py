"""Pictures of every mode become RGB, large JPEGs come no larger than asked, and labels keep their ids."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from setlib.data.decode import measure, read_label, read_picture
from setlib.data.labels import id_map

RED = (220, 20, 30)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK", "L", "LA", "P", "1", "I;16", "F"])
def test_every_mode_is_read(tmp_path, mode):
    grey = mode in ("L", "LA", "1", "I;16", "F")
    if mode == "I;16":
        made = Image.fromarray(np.full((6, 9), 40000, np.uint16))
    elif mode == "F":
        made = Image.fromarray(np.full((6, 9), 0.5, np.float32))
    else:
        made = Image.new("RGB", (9, 6), RED).convert(mode)
    path = tmp_path / ("a.tif" if mode in ("CMYK", "F") else "a.png")
    made.save(path)
    pixels = read_picture(path)
    assert pixels.shape == (6, 9, 3) and pixels.dtype == np.uint8
    assert grey or np.abs(pixels[0, 0].astype(int) - RED).max() < 30
    assert not grey or np.ptp(pixels[0, 0]) == 0


def test_transparency_lies_on_white_and_exif_turns(tmp_path):
    Image.new("RGBA", (4, 2), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert (read_picture(tmp_path / "a.png") == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (4, 2)).save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg").shape == (4, 2, 3) and measure(tmp_path / "a.jpg") == ((2, 4), (4, 2), 8)


@pytest.mark.parametrize(
    ("long_edge", "size"), [(0, 1000), (1000, 1000), (501, 1000), (500, 500), (130, 250), (9, 125)]
)
def test_a_jpeg_is_decoded_no_smaller_than_asked(tmp_path, long_edge, size):
    Image.new("RGB", (1000, 640), RED).save(tmp_path / "a.jpg")
    pixels = read_picture(tmp_path / "a.jpg", long_edge)
    assert pixels.shape == (size * 640 // 1000, size, 3)
    Image.new("RGB", (1000, 640), RED).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png", long_edge).shape == (640, 1000, 3)


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match="a.png cannot be read as a picture"):
        read_picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"Expected a picture .h, w, 3. of uint8, got float64 .4, 4."):
        read_picture(np.zeros((4, 4)))


def test_a_picture_of_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), RED).save(tmp_path / "a.png")
    Image.new("L", (1, 1), 13).save(tmp_path / "b.png")
    assert read_picture(tmp_path / "a.png").tolist() == [[list(RED)]]
    assert read_label(tmp_path / "b.png", id_map("cityscapes")).tolist() == [[13]]


def test_unknown_colours_and_classes_are_named(tmp_path):
    Image.new("RGB", (3, 2), (1, 2, 3)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"holds the unknown colour \[1, 2, 3\]: expected those of camvid32.csv"):
        read_label(tmp_path / "a.png", id_map("camvid32"))
    shapes = '{"imgWidth": 3, "imgHeight": 2, "objects": [{"label": "ufo", "polygon": [[0, 0], [1, 1]]}]}'
    (tmp_path / "a_polygons.json").write_text(shapes)
    with pytest.raises(ValueError, match="holds the unknown class 'ufo'"):
        read_label(tmp_path / "a_polygons.json", id_map("idd"))
    (tmp_path / "a_polygons.json").write_text('{"imgWidth": 3}')
    with pytest.raises(ValueError, match="is not a file of polygons"):
        read_label(tmp_path / "a_polygons.json", id_map("idd"))
    Image.fromarray(np.full((2, 3), 300, np.uint16)).save(tmp_path / "c.png")
    with pytest.raises(ValueError, match="holds ids from 300 to 300"):
        read_label(tmp_path / "c.png", id_map("cityscapes"))


@pytest.mark.parametrize("most", [200, 1000, 4000, 16000, 65535])
def test_deep_greys_fill_the_bits_that_they_need(tmp_path, most):
    grey = np.linspace(0, most, 60).round().astype(np.uint16).reshape(6, 10)
    bits = next(bits for bits in (8, 10, 12, 14, 16) if most < 2**bits)
    Image.fromarray(grey).save(tmp_path / "a.tif")
    pixels = read_picture(tmp_path / "a.tif")[..., 0]
    assert np.array_equal(pixels, (grey / (2**bits - 1) * 255).astype(np.uint8)) and pixels.max() > 190


def test_heic_and_too_many_pixels_are_named_with_the_way_round(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    with pytest.raises(ValueError, match=r"a.jpg cannot be read .*HEIC or its like, .*: export it as JPG or PNG"):
        read_picture(tmp_path / "a.jpg")
    Image.new("1", (14_000, 14_000)).save(tmp_path / "b.png")
    assert measure(tmp_path / "b.png")[0] == (14_000, 14_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**7)
    with pytest.raises(ValueError, match="million pixels: cut or shrink it first"):
        read_picture(tmp_path / "b.png")
