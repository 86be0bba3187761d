"""Any content at the borders: an exit code and a sentence, no traceback, no hang, no file outside."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import faults
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from setlib import __main__ as cli
from setlib.checkpoint import load_segmenter
from setlib.data import labels
from setlib.weights.convert import read_tensors
from setlib.weights.load import load_backbone

SECONDS = 5  # that one input may take
SIZES = [30, pytest.param(2000, marks=pytest.mark.reliability)]
INNER = SimpleNamespace(folder=None, outside=[])  # what the hook below watches


def note_writes(event: str, arguments: tuple) -> None:
    """Notes each file that is written, made, moved or removed outside of the folder that is watched."""
    writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate")
    if event == "open":
        writes = bool(set(arguments[1] or "") & set("wax+") or arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if INNER.folder and writes and isinstance(arguments[0], str | bytes | os.PathLike):
        path = os.path.realpath(arguments[0])
        if not str(path).startswith((INNER.folder, "/dev/", "/proc/")):
            INNER.outside.append(path)


sys.addaudithook(note_writes)


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Fails if anything is written outside of a folder, the working folder meanwhile."""
    INNER.folder, INNER.outside = os.path.realpath(folder), []
    faulthandler.dump_traceback_later(60, exit=True)  # it hangs: the deadline is looked at when a call has ended
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        INNER.folder = None
        os.chdir(before)
    assert not INNER.outside


def many(number: int):
    """Hypothesis's settings for so many inputs: the few are always the same, the many others each time."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    always = {"deadline": 1000 * SECONDS, "suppress_health_check": checks, "database": None}
    return settings(max_examples=number, derandomize=number < 100, **always)


def call(folder: Path, *argv: str) -> int:
    """A command's exit code; where it is not 0 it ended in one sentence."""
    out, err = io.StringIO(), io.StringIO()
    with watched(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(list(argv))
        except SystemExit as ended:  # --help
            code = ended.code
            assert code == 0 and ("-h" in argv or "--help" in argv)
    assert "shows where" not in err.getvalue(), err.getvalue()
    if code:
        assert len([line for line in err.getvalue().splitlines() if line.startswith("error: ")]) == 1, err.getvalue()
    return code


@st.composite
def damaged(draw, whole: st.SearchStrategy[bytes]) -> bytes:
    """Bytes of a whole file, some of them exchanged, cut out or put in."""
    content = bytearray(draw(whole))
    for _ in range(draw(st.integers(0, 6))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        how, new = draw(st.integers(0, 3)), draw(st.binary(min_size=1, max_size=8))
        if how == 0:
            content[place : place + len(new)] = new
        elif how == 1:
            content[place:place] = new
        elif how == 2:
            del content[place : place + draw(st.integers(1, 64))]
        else:
            del content[place:]
    return bytes(content)


ODD = st.sampled_from([0, -1, 2**31, 10**30, 1e308, float("inf"), float("nan"), "", "16", None])
VALUES = st.recursive(
    ODD | st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def changed(draw, values: dict) -> bytes:
    """JSON of nested dictionaries, some of its values and names exchanged; at times not even JSON."""
    values, place = json.loads(json.dumps(values)), None
    for _ in range(draw(st.integers(1, 3))):
        place = values
        while draw(st.booleans()):
            inner = [
                one for one in (place.values() if isinstance(place, dict) else place) if isinstance(one, dict | list)
            ]
            if not inner:
                break
            place = draw(st.sampled_from(inner))
        if isinstance(place, dict) and place and draw(st.booleans()):
            place[draw(st.sampled_from(sorted(place)))] = draw(VALUES)
        elif isinstance(place, dict):
            place[draw(st.text(max_size=8))] = draw(VALUES)
        elif place:
            place[draw(st.integers(0, len(place) - 1))] = draw(VALUES)
    text = json.dumps(values)
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(damaged(st.just(text.encode())))
    if kind == 1:
        return json.dumps(draw(VALUES)).encode()
    return b"[" * 100_000 if kind == 2 and draw(st.booleans()) else text.encode()


# Pictures and labels


def picture(form: str, mode: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 11, (12, 16, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if form in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    Image.fromarray(pixels).convert(mode).save(file := io.BytesIO(), form, **options)
    return file.getvalue()


FORMS = [("PNG", "RGB"), ("PNG", "L"), ("PNG", "P"), ("PNG", "I;16"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("BMP", "RGB")]
FORMS += [("GIF", "P"), ("TIFF", "RGB"), ("TIFF", "F"), ("WEBP", "RGB"), ("PPM", "RGB"), ("ICO", "RGB"), ("EPS", "RGB")]
PICTURES = st.sampled_from([picture(form, mode) for form, mode in FORMS if mode != "I;16"])


@pytest.mark.parametrize("number", SIZES)
def test_any_picture_and_label(tmp_path, number):
    faults.make_domain(tmp_path / "domain", 1, (16, 12))

    @many(number)
    @given(damaged(PICTURES), damaged(PICTURES))
    def fuzz(image, label):
        (tmp_path / "domain/images/p0.png").write_bytes(image)
        (tmp_path / "domain/labels/p0.png").write_bytes(label)
        assert call(tmp_path, "check", "folder@domain", "--profile", "smoke", "--deep") in (0, 1, 2)

    fuzz()


POINT = st.tuples(st.integers(-(2**40), 2**40) | st.floats(), st.integers(-9, 20)) | st.integers(0, 5)
SHAPES = st.lists(st.fixed_dictionaries({"label": st.just("road") | st.text(max_size=3), "polygon": st.lists(POINT)}))
SIDES = st.fixed_dictionaries({side: ODD | st.integers() | st.floats() for side in ("imgWidth", "imgHeight")})
POLYGONS = {"imgWidth": 16, "imgHeight": 12, "objects": [{"label": "road", "polygon": [[1, 1], [9, 3], [4, 9]]}]}
PARTS = SHAPES.map(lambda shapes: {"objects": shapes}) | SIDES


@pytest.mark.parametrize("number", SIZES)
def test_any_polygons(tmp_path, number):
    for kind in ("leftImg8bit", "gtFine"):
        (tmp_path / "idd" / kind / "val" / "a").mkdir(parents=True)
    Image.new("RGB", (16, 12)).save(tmp_path / "idd/leftImg8bit/val/a/x_leftImg8bit.png")

    @many(number)
    @given(changed(POLYGONS) | PARTS.map(lambda parts: json.dumps(POLYGONS | parts).encode()))
    def fuzz(content):
        (tmp_path / "idd/gtFine/val/a/x_gtFine_polygons.json").write_bytes(content)
        assert call(tmp_path, "check", "idd:val@idd", "--profile", "smoke", "--deep") in (0, 1, 2)

    fuzz()


# Splits and configurations


@pytest.mark.parametrize("number", SIZES)
def test_any_list_of_splits(tmp_path, number):
    faults.make_domain(tmp_path / "domain", 2, (16, 12))

    @many(number)
    @given(changed({"splits": {"val": ["p0"], "train": ["p1", "../../p0"]}}))
    def fuzz(content):
        (tmp_path / "domain/splits.json").write_bytes(content)
        assert call(tmp_path, "check", "folder:val@domain", "--profile", "smoke") in (0, 1, 2)

    fuzz()


@pytest.mark.parametrize("number", SIZES)
def test_any_configuration(trained, tmp_path, number):
    content = json.loads((trained.path / "experiment.json").read_text())
    (tmp_path / "run").mkdir()

    @many(number)
    @given(changed(content))
    def fuzz(content):
        (tmp_path / "run/experiment.json").write_bytes(content)
        assert call(tmp_path, "evaluate", "run", "--target", "folder@nowhere") == 2

    fuzz()


# Weights


@pytest.mark.parametrize("number", SIZES)
def test_any_header_of_weights_and_any_config_beside_them(trained, tmp_path, number):
    content = (trained.path / "model/model.safetensors").read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, config = json.loads(content[8 : 8 + size]), json.loads((trained.path / "model/config.json").read_text())
    backbone = load_backbone(trained.experiment.model.backbone)
    shutil.copytree(trained.path / "model", tmp_path / "model")

    def with_header(new: bytes) -> bytes:
        return struct.pack("<Q", len(new)) + new + content[8 + size :]

    heads = changed(header).map(with_header) | damaged(st.just(content[: 8 + size])).map(
        lambda new: new + content[8 + size :]
    )

    @many(number)
    @given(heads, changed(config) | st.just(json.dumps(config).encode()))
    def fuzz(weights, beside):
        (tmp_path / "model/model.safetensors").write_bytes(weights)
        (tmp_path / "model/config.json").write_bytes(beside)
        with watched(tmp_path):
            with contextlib.suppress(ValueError):
                load_segmenter(tmp_path / "model", backbone)
            with contextlib.suppress(ValueError):
                read_tensors(tmp_path / "model/model.safetensors")

    fuzz()


# Id maps

CELL = st.integers(-5, 300).map(str) | st.text(max_size=6) | st.sampled_from(["255", "road", '"', "\x00", "0"])
ROWS = st.lists(st.lists(CELL, min_size=4, max_size=7).map(",".join), max_size=6)
TABLE = b"id,name,red,green,blue,train_id\n0,road,128,64,128,0\n1,sky,70,130,180,10\n"


@pytest.mark.parametrize("number", SIZES)
def test_any_id_map(tmp_path, monkeypatch, number):
    monkeypatch.setattr(labels, "LABELS", tmp_path)
    head = TABLE.splitlines(keepends=True)[0]
    long = st.just(head + b"0," + b"x" * 200_000 + b",1,2,3,4\n")
    made = ROWS.map(lambda rows: head + "\n".join(rows).encode("utf-8", "surrogatepass"))

    @many(number)
    @given(damaged(st.just(TABLE)) | made | long)
    def fuzz(content):
        (tmp_path / "own.csv").write_bytes(content)
        labels.read_rows.cache_clear()
        labels.id_map.cache_clear()
        with watched(tmp_path), contextlib.suppress(ValueError):
            found = labels.id_map("own")
            assert set(found.to_train.tolist()) <= {*range(19), 255}

    try:
        fuzz()
    finally:
        labels.read_rows.cache_clear()
        labels.id_map.cache_clear()


# The command line

COMMANDS = {  # each with words that keep it from starting anything
    **dict.fromkeys(["run", "train", "ablate", "premise"], ["--source", "folder@nowhere", "--run", "made"]),
    **dict.fromkeys(["evaluate", "export", "explore", "predict"], ["nowhere"]),
    "check": ["folder@nowhere"],
    "prepare": ["folder@nowhere", "--out", "made", "--short-edge", "8"],
    "import": ["nowhere.pth", "--out", "made"],
    "verify": ["nowhere.npz"],
    "bench": ["--only", "nothing"],
}
OPTIONS = [
    "-o",
    "--run",
    "--seed",
    "--target",
    "--out",
    "--labels",
    "--only",
    "--json",
    "--port",
    "--layouts",
    "--deep",
]
KEYS = ["model.refiner", "train.steps", "data.height", "seed", "ablation.variants", "train.refiner_rates", "nothing.at"]
KEYS += [
    "data.eval_edges",
    "inference.scales",
    "ablation.transfers",
    "model.layers",
    "train.mix_layer",
    "data.class_set",
]
WORDS = st.sampled_from(
    [*OPTIONS, "--help", "--", "-1", "1e309", "set", "smoke", "scenes:nowhere", "../../x", "~", "NaN", ""]
)
PAIRS = st.tuples(st.sampled_from(KEYS), st.text(max_size=8) | st.integers().map(str) | st.floats().map(str))
ANY = WORDS | st.text(max_size=10) | PAIRS.map("=".join) | PAIRS.map(lambda pair: "-o=" + "=".join(pair))


@pytest.mark.parametrize("number", SIZES)
def test_any_words_on_the_command_line(tmp_path, number):
    @many(number)
    @given(st.sampled_from([*COMMANDS]) | ANY, st.lists(ANY, max_size=6))
    def fuzz(command, words):
        end = COMMANDS.get(command, [])
        words = [word for word in words if word not in ("--debug", "--no-browser")]
        code = call(
            tmp_path, command, *end[:1], *words, *end[1:], *(["--source", "folder@nowhere"] if len(end) == 4 else [])
        )
        assert code in ((0, 1, 2) if {"-h", "--help"} & {*words, command} else (1, 2))

    fuzz()
    assert not (tmp_path / "made").exists() or not any((tmp_path / "made").iterdir())
