"""Every data set in its true tree and encoding: labels come back id by id; wrong folders and splits are named."""

from __future__ import annotations

import dataclasses
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as HubImage
from PIL import Image
from scipy.io import savemat

from setlib.data import check, domains, prepare
from setlib.data import layouts as readers
from setlib.data.labels import CLASS_SETS, id_map, read_rows
from setlib.experiment import Data

SIZE = (12, 17)  # (h, w), odd on purpose


def write_wide(path: Path, first: np.ndarray, channels: int) -> None:
    """A PNG of 16 bits with class ids in the first channel and instance ids in the second."""
    pixels = np.zeros((*first.shape, channels), ">u2")
    pixels[..., 0], pixels[..., 1] = first, 1000 + np.arange(first.size).reshape(first.shape)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", *first.shape[::-1], 16, {2: 4, 3: 2}[channels], 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(content)


def write_label(path: Path, label: np.ndarray, ids: str, form: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {row["id"]: row for row in read_rows(ids)}
    colours = np.zeros((256, 3), np.uint8)
    for i, row in rows.items():
        colours[i] = row["red"], row["green"], row["blue"]
    if form == "palette":
        picture = Image.fromarray(label)
        picture.putpalette(colours.tobytes())
        picture.save(path)
    elif form == "colours":
        Image.fromarray(colours[label]).save(path)
    elif form.startswith("wide"):
        write_wide(path, label, int(form[4:]))
    elif form == "polygons":
        boxes = [((x, y), rows[label[y, x]]["name"]) for y in range(SIZE[0]) for x in range(SIZE[1])]
        objects = [{"label": name, "polygon": [[x, y], [x, y]]} for (x, y), name in boxes]
        objects.append({"label": "car", "deleted": 1, "polygon": [[0, 0], [9, 0], [9, 9]]})
        path.write_text(json.dumps({"imgWidth": SIZE[1], "imgHeight": SIZE[0], "objects": objects}), encoding="utf-8")
    else:
        Image.fromarray(label).save(path)


def city(images: str, split: str, label: str = "labelIds", ids: str = "labelids", kind: str = "") -> tuple:
    stem = f"{split}/aachen/aachen_000000_00001{{}}"
    return f"{images}/{stem}_{images}{kind}.png", f"gtFine/{stem}_gtFine_{label}.png", ids, "ids"


def anonymous(folder: str, label: str = "labelIds", ids: str = "labelids") -> tuple:
    return f"rgb_anon/{folder}_{{}}_rgb_anon.png", f"gt/{folder}_{{}}_gt_{label}.png", ids, "ids"


IDD_LEVEL_3 = "gtFine/train/7/9{}_gtFine_labellevel3Ids.png"
RAIN = "_alpha_0.01_beta_0.005_dropsize_0.002_pattern_1"
SETS = {  # domain: (image, label, id map, form); {} is the number of the picture
    "gtav": ("images/0000{}.png", "labels/0000{}.png", "labelids", "palette"),
    "synthia": ("RGB/000000{}.png", "GT/LABELS/000000{}.png", "synthia", "wide3"),
    "synthia:": ("RGB/000000{}.png", "GT/LABELS/000000{}.png", "synthia", "wide2"),
    "urbansyn": ("rgb/rgb_000{}.png", "ss/ss_000{}.png", "urbansyn", "ids"),
    "cityscapes:val": city("leftImg8bit", "val"),
    "cityscapes:train": city("leftImg8bit", "train", "labelTrainIds", "cityscapes"),
    "cityscapes-foggy:val": city("leftImg8bit_foggy", "val", kind="_beta_0.02"),
    "cityscapes-rainy:val": city("leftImg8bit_rain", "val", kind=RAIN),
    "bdd100k:val": ("images/10k/val/a-{}.jpg", "labels/sem_seg/masks/val/a-{}.png", "cityscapes", "ids"),
    "bdd100k:train": ("seg/images/train/a-{}.jpg", "seg/labels/train/a-{}_train_id.png", "cityscapes", "ids"),
    "mapillary:val": ("validation/images/ä {}.jpg", "validation/v1.2/labels/ä {}.png", "mapillary12", "palette"),
    "mapillary:train": ("training/images/ä {}.jpg", "training/labels/ä {}.png", "mapillary12", "ids"),
    "mapillary-v2:val": ("validation/images/ä {}.jpg", "validation/v2.0/labels/ä {}.png", "mapillary20", "palette"),
    "acdc:night-val": anonymous("night/val/G1/G1"),
    "acdc:fog": anonymous("fog/val/G2/G2", "labelTrainIds", "cityscapes"),
    "darkzurich:val": anonymous("val/night/G3/G3"),
    "idd:val": (
        "leftImg8bit/val/112/9{}_leftImg8bit.jpg",
        "gtFine/val/112/9{}_gtFine_polygons.json",
        "idd",
        "polygons",
    ),
    "idd:train": ("leftImg8bit/train/7/9{}_leftImg8bit.png", IDD_LEVEL_3, "iddlevel3", "ids"),
    "idd-lite:val": ("leftImg8bit/val/119/9{}_image.jpg", "gtFine/val/119/9{}_label.png", "iddlite", "ids"),
    "kitti": ("training/image_2/00000{}_10.png", "training/semantic/00000{}_10.png", "labelids", "ids"),
    "wilddash2": ("images/at000{}_100000.jpg", "labels/at000{}_100000.png", "wilddash", "ids"),
    "camvid": ("images/{}.jpg", "labels/{}.png", "camvid", "ids"),
    "camvid:test": ("test/{}.png", "testannot/{}.png", "camvid", "ids"),
    "camvid:": ("701_StillsRaw_full/{}.png", "LabeledApproved_full/{}_L.png", "camvid32", "colours"),
    "folder": ("images/{}.jpg", "labels/{}.png", "cityscapes", "ids"),
}


def make(root: Path, image: str, label: str, ids: str, form: str, count: int = 3) -> list[np.ndarray]:
    """A miniature; its labels."""
    rng, known = np.random.default_rng(0), [row["id"] for row in read_rows(ids)]
    labels = []
    for i in range(count):
        path = root / image.format(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(path)
        labels.append(rng.choice(known, SIZE).astype(np.uint8))
        write_label(root / label.format(i), labels[-1], ids, form)
    return labels


@pytest.mark.parametrize("text", SETS)
def test_every_set_and_its_copies_come_back_id_by_id(tmp_path, text):
    root, ids = tmp_path / "set", id_map(SETS[text][2])
    written = make(root, *SETS[text])
    text = text.rstrip(":")
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    assert prepare.prepare(f"{text}@{root}", tmp_path / "copy", 100, Data()) == 3
    for folder in ("set", "link", "copy"):
        domain = domains.load(f"{text}@{tmp_path / folder}", Data())
        (found,) = check.check(f"{text}@{tmp_path / folder}", Data())
        assert (found.pairs, found.problems, found.sizes) == (3, [], {SIZE[::-1]: 3})
        assert len(domain) == 3 and domain.has_labels and (folder == "copy" or domain.ids.name == ids.name)
        for i, label in enumerate(written):
            sample = domain.sample(i)
            assert sample.image.shape == (*SIZE, 3) and np.array_equal(sample.label, label)
            assert np.array_equal(domain.to_score(label), ids.to_score[label])
    prepare.prepare(f"{text}@{root}", tmp_path / "half", 6, Data())
    small = domains.load(f"{text}@{tmp_path / 'half'}", Data()).sample(2)
    assert small.image.shape[:2] == small.label.shape == (6, 8)
    assert np.array_equal(small.label, Image.fromarray(written[2]).resize((8, 6), Image.Resampling.NEAREST))


@pytest.mark.parametrize("text", SETS)
def test_the_wrong_level_of_the_tree_is_named(tmp_path, text):
    make(tmp_path / "up" / "set", *SETS[text])
    below = next(path for path in sorted((tmp_path / "up" / "set").iterdir()) if path.is_dir())
    for folder in (tmp_path / "up", below):
        with pytest.raises(ValueError, match="wrong level of the tree: give .*set"):
            readers.list_pairs(text.partition(":")[0], str(folder))


@pytest.mark.parametrize("name", readers.LAYOUTS)
def test_every_layout_is_tried_and_documented(name):
    assert name in {text.partition(":")[0] for text in SETS}
    assert f"`{name}" in (Path(readers.__file__).parents[2] / "data" / "README.md").read_text(encoding="utf-8")


def test_splits_by_role_condition_and_list(tmp_path):
    for split in ("train", "val"):
        for condition in ("fog", "night"):
            make(tmp_path, f"rgb_anon/{condition}/{split}/G/{condition}{split}{{}}_rgb_anon.png",
                 f"gt/{condition}/{split}/G/{condition}{split}{{}}_gt_labelIds.png", "labelids", "ids")  # fmt: skip
    make(tmp_path, "rgb_anon/fog/test/G/t{}_rgb_anon.png", "unused/{}.png", "labelids", "ids")

    def names(split: str, role: str = "") -> set[str]:
        return {pair.name[2:-1] for pair in readers.list_pairs("acdc", str(tmp_path), split, role).pairs}

    assert names("", "source") == {"fogtrain", "nighttrain"} and names("", "target") == {"fogval", "nightval"}
    assert names("fog", "target") == {"fogval"} and names("night-train") == {"nighttrain"}
    assert names("fog") == {"fogtrain", "fogval", "t"}
    known = "fog, night, test, train, val .nearest: night"
    with pytest.raises(ValueError, match=f"unknown split 'nite'; there are {known}"):
        readers.list_pairs("acdc", str(tmp_path), "nite")
    assert not domains.load(f"acdc:fog-test@{tmp_path}", Data()).has_labels
    with pytest.raises(ValueError, match="has no labels: a source needs"):
        domains.load(f"acdc:fog-test@{tmp_path}", Data(), role="source")


def test_gtavs_official_split_and_its_sizes(tmp_path):
    make(tmp_path, *SETS["gtav"])
    savemat(tmp_path / "split.mat", {"trainIds": [[0], [2]], "valIds": [[1]], "testIds": np.zeros((0, 1))})
    train = domains.load(f"gtav:train@{tmp_path}", Data())
    assert [train.sample(i).name for i in range(2)] == ["00000", "00002"]
    assert [pair.name for pair in readers.list_pairs("gtav", str(tmp_path), "val").pairs] == ["00001"]
    label = np.full((10, 17), 7, np.uint8)
    label[:5] = 23
    write_label(tmp_path / "labels/00001.png", label, "labelids", "palette")
    found = domains.load(f"gtav@{tmp_path}", Data()).sample(1).label
    assert found.shape == SIZE and (found[:6] == 23).all() and (found[6:] == 7).all()


def test_instance_labels_of_idd_lite_are_no_labels(tmp_path):
    make(tmp_path, *SETS["idd-lite:val"])
    make(tmp_path, "unused/{}.png", SETS["idd-lite:val"][1].replace("_label", "_inst_label"), "iddlite", "ids")
    found = readers.list_pairs("idd-lite", str(tmp_path))
    assert (len(found.pairs), found.problems, found.notes) == (3, [], [])


def test_fog_of_several_strengths_shares_one_label(tmp_path):
    image, *rest = SETS["cityscapes-foggy:val"]
    for strength in ("0.01", "0.005", "0.02"):
        written = make(tmp_path, image.replace("0.02", strength), *rest)
    domain = domains.load(f"cityscapes-foggy:val@{tmp_path}", Data())
    assert len(domain) == 9 and domain.sample(0).name.endswith("foggy_beta_0.005")
    assert all(np.array_equal(domain.sample(i).label, written[i // 3]) for i in range(9))


def test_the_labels_that_serve_most_pictures_are_taken(tmp_path):
    ids = make(tmp_path, *SETS["cityscapes:val"])
    rng = np.random.default_rng(1)
    label = rng.integers(0, 19, SIZE).astype(np.uint8)  # one converted file does not make a data set of train ids
    write_label(tmp_path / city("", "val", "labelTrainIds")[1].format(1), label, "cityscapes", "ids")
    domain = domains.load(f"cityscapes:val@{tmp_path}", Data())
    assert domain.ids.name == "labelids" and np.array_equal(domain.sample(1).label, ids[1])


def test_rain_on_some_of_cityscapes_and_dummy_labels_of_its_test_split(tmp_path):
    make(tmp_path, *SETS["cityscapes-rainy:val"], count=2)
    make(tmp_path, "unused/{}.png", *SETS["cityscapes-rainy:val"][1:], count=4)  # labels of the other pictures
    assert len(domains.load(f"cityscapes-rainy:val@{tmp_path}", Data())) == 2
    image, label, *rest = SETS["cityscapes:val"]
    make(tmp_path, image.replace("val", "test"), label.replace("val", "test"), *rest)
    assert not domains.load(f"cityscapes:test@{tmp_path}", Data()).has_labels


def test_suffixes_links_in_circles_and_a_macs_notes(tmp_path):
    make(tmp_path, *SETS["cityscapes:val"])
    folder = tmp_path / "leftImg8bit/val/aachen"
    (folder / "one").symlink_to(folder.parent, target_is_directory=True)
    (folder / "two").symlink_to(folder.parent.parent, target_is_directory=True)
    path = folder / "aachen_000000_000010_leftImg8bit.png"
    (folder / f"._{path.name}").write_bytes(b"notes")
    path.rename(path.with_suffix(".PNG"))
    label = tmp_path / "gtFine/val/aachen/aachen_000000_000011_gtFine_labelIds.png"
    label.rename(label.with_suffix(".PNG"))
    found = readers.list_pairs("cityscapes", str(tmp_path))
    assert len(found.pairs) == 3 and all(pair.label for pair in found.pairs) and not found.problems


def test_a_domain_and_itself_corrupted_share_nothing(tmp_path):
    make(tmp_path, *SETS["folder"])
    texts = [f"folder@{tmp_path}", f"folder@{tmp_path}~noise3", f"folder@{tmp_path}/"]
    assert check.duplicates(texts, Data()) == []
    with pytest.raises(ValueError, match="Prepare the clean set, and add ~noise3 where the copy is used"):
        prepare.prepare(texts[1], tmp_path.parent / "noisy", 6, Data())
    Image.new("L", (5, 5)).save(tmp_path / "labels/1.png")
    with pytest.raises(ValueError, match="'1' is 17 x 12 but its label is 5 x 5"):
        prepare.prepare(texts[0], tmp_path.parent / "mixed", 6, Data())


@pytest.mark.parametrize("content", [b"", b"<html>no</html>", b"MATLAB 5.0 MAT-file" + bytes(81)])
def test_a_damaged_split_mat_is_one_sentence(tmp_path, content):
    make(tmp_path, *SETS["gtav"])
    (tmp_path / "split.mat").write_bytes(content)
    with pytest.raises(ValueError, match="split.mat cannot be read .*: download it again"):
        domains.load(f"gtav:train@{tmp_path}", Data())


def test_a_copy_is_not_made_inside_the_set_nor_over_another(tmp_path):
    make(tmp_path / "set", *SETS["folder"])
    with pytest.raises(ValueError, match="lies in the data set itself"):
        prepare.prepare(f"folder@{tmp_path / 'set'}", tmp_path / "set" / "images" / "small", 6, Data())
    prepare.prepare(f"folder@{tmp_path / 'set'}", tmp_path / "copy", 6, Data())
    (tmp_path / "copy" / prepare.MARK).write_text("{damaged")
    with pytest.raises(ValueError, match="is not empty and no copy of"):
        prepare.prepare(f"folder@{tmp_path / 'set'}", tmp_path / "copy", 6, Data())
    write_label(tmp_path / "set/labels/1.png", np.full(SIZE, 77, np.uint8), "camvid", "ids")
    with pytest.raises(ValueError, match=r"label of '1' holds the unknown ids \[77\]"):
        prepare.prepare(f"folder@{tmp_path / 'set'}", tmp_path / "other", 6, Data())
    (tmp_path / "set/labels/1.png").write_bytes((tmp_path / "set/labels/0.png").read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"labels.1.png cannot be decoded .*: download or export it again"):
        prepare.prepare(f"folder@{tmp_path / 'set'}", tmp_path / "again", 6, Data())
    make(tmp_path / "gtav", *SETS["gtav"])
    picture = tmp_path / "gtav/images/00001.png"
    picture.write_bytes(picture.read_bytes()[:-40])
    assert prepare.prepare(f"gtav@{tmp_path / 'gtav'}", tmp_path / "most", 6, Data(on_error="skip")) == 2


@pytest.mark.parametrize(
    ("text", "ids", "form", "message"),
    [
        ("folder", "cityscapes", "colours", "is a colour picture of shape .*: expected one channel of class ids"),
        ("folder", "labelids", "ids", "holds the unknown ids .* look like Cityscapes label ids, not train ids"),
        ("camvid:", "camvid32", "ids", "holds class ids: expected a picture of the classes' colours"),
        ("synthia", "synthia", "colours", "is a picture of mode RGB and 8 bits: expected 16 bits"),
    ],
)
def test_labels_of_another_form_are_refused(tmp_path, text, ids, form, message):
    make(tmp_path, *SETS[text][:2], ids, form)
    with pytest.raises(ValueError, match=f"label of '.*' {message}"):
        domains.load(f"{text.rstrip(':')}@{tmp_path}", Data()).sample(0)


def test_a_set_of_ones_own_is_a_csv_and_an_entry(tmp_path, monkeypatch):
    """As in data/README.md."""
    for split in ("train", "other"):
        make(tmp_path, f"{split}/photos/{split}{{}}.jpg", f"{split}/masks/{split}{{}}_mask.png", "camvid", "ids")
    layout = readers.Layout("{split}/photos/{name}.*", (("{split}/masks/{name}_mask.png", "camvid"),))
    monkeypatch.setitem(readers.LAYOUTS, "mine", (layout,))
    monkeypatch.setattr(domains, "NAMES", (*domains.NAMES, "mine"))
    assert [len(domains.load(f"mine{split}@{tmp_path}", Data())) for split in ("", ":train", ":other")] == [6, 3, 3]


def test_conventions_score_fewer_classes(tmp_path):
    make(tmp_path, *SETS["cityscapes:val"])
    for name, left_out in (("synthia-16", 3), ("synthia-13", 6)):
        domain = domains.load(f"cityscapes:val@{tmp_path}", Data(class_set=name))
        assert domain.class_set is CLASS_SETS[name] and len(domain.class_set) == 19 - left_out
        assert domain.class_set.merge(torch.ones(19, 1, 1)).sum() == 19 - left_out
        train = np.arange(34, dtype=np.uint8)
        assert (domain.to_score(train) != 255).sum() == 19 - left_out
        assert (domain.ids.to_train[train] != 255).sum() == 19  # training keeps all
    with pytest.raises(ValueError, match="Unknown class set 'synthia-15' .nearest: synthia-1"):
        domains.load(f"cityscapes:val@{tmp_path}", Data(class_set="synthia-15"))


def convert(root: Path, labels: list[np.ndarray], label: str, ids: str, suffix: str, keep: bool) -> None:
    """Train ids written beside labels, as the field's tools do; keep: the labels stay."""
    for i, raw in enumerate(labels):
        path = root / label.format(i)
        Image.fromarray(id_map(ids).to_train[raw]).save(path.with_name(f"{path.stem}{suffix}.png"))
        if not keep:
            path.unlink()


@pytest.mark.parametrize("suffix", ["_labelTrainIds", "_trainIds", "_train_id"])
@pytest.mark.parametrize(
    "text", ["gtav", "synthia", "bdd100k:val", "bdd100k:train", "mapillary:val", "kitti", "wilddash2", "folder"]
)
def test_train_ids_written_beside_labels_are_passed_over_or_stand_in_for_them(tmp_path, text, suffix):
    image, label, ids, form = SETS[text]
    label = label.replace("_train_id", "")
    labels = make(tmp_path, image, label, ids, form)
    convert(tmp_path, labels, label, ids, suffix, keep=True)
    found = readers.list_pairs(text.partition(":")[0], str(tmp_path))
    assert (len(found.pairs), found.problems, found.ids) == (3, [], ids)
    assert found.notes == ["3 labels converted to train ids passed over"]
    assert all(suffix not in Path(pair.label).name for pair in found.pairs)
    convert(tmp_path, labels, label, ids, suffix, keep=False)
    domain = domains.load(f"{text}@{tmp_path}", Data())
    assert np.array_equal(domain.sample(1).label, id_map(ids).to_train[labels[1]])


@pytest.mark.parametrize("ending", [".jpg", ".PNG", ".webp", ".tif"])
@pytest.mark.parametrize("text", [text for text in SETS if SETS[text][0].endswith(".png")])
def test_pictures_in_another_format_are_read_where_their_own_is_missing(tmp_path, text, ending):
    image, label, ids, form = SETS[text]
    written = make(tmp_path, image.replace(".png", ending), label, ids, form)
    domain = domains.load(f"{text.rstrip(':')}@{tmp_path}", Data())
    assert len(domain) == 3 and np.array_equal(domain.sample(2).label, written[2])
    make(tmp_path, image, label, ids, form, count=2)  # two of one stem: the data set's own format is taken
    found = readers.list_pairs(text.partition(":")[0], str(tmp_path))
    own = "share one name" if ending == ".PNG" or text.startswith("idd") else ""
    assert len(found.pairs) == 3 and all(own and own in problem for problem in found.problems)


@pytest.mark.parametrize("text", ["gtav", "cityscapes:val", "bdd100k:val", "idd:val", "folder", "camvid:test"])
def test_pictures_without_a_label_are_passed_over_on_request(tmp_path, text, capsys):
    image, label, *rest = SETS[text]
    make(tmp_path / "set", image, label, *rest, count=6)
    for i in (2, 4):
        (tmp_path / "set" / label.format(i)).unlink()
    (tmp_path / "set" / image.format(0)).unlink()
    domain, skip = f"{text}@{tmp_path / 'set'}", Data(on_error="skip", eval_images=0, train_images=0)
    with pytest.raises(ValueError, match="has no label: expected .*; -o data.on_error=skip passes over it .and 1 more"):
        domains.load(domain, Data())
    found = readers.list_pairs(text.partition(":")[0], str(tmp_path / "set"))
    assert len(found.problems) == 2 and "1 label without a picture passed over" in found.notes
    for _ in range(2):
        assert len(domains.load(domain, skip, "source")) == len(domains.load(domain, skip)) == 3
    assert capsys.readouterr().out.count("2 pictures without a label passed over") == 1
    (found,) = check.check(domain, skip)
    assert (found.pairs, found.problems) == (3, []) and "1 label without a picture passed over" in found.notes
    assert prepare.prepare(domain, tmp_path / "copy", 6, skip) == 3
    assert len(domains.load(f"{text}@{tmp_path / 'copy'}", Data())) == 3


@pytest.mark.parametrize("text", ["cityscapes:val", "acdc:fog", "idd:val", "bdd100k:val", "gtav", "kitti", "folder"])
def test_archives_unpacked_side_by_side_are_read_as_they_lie(tmp_path, text):
    image, label, *rest = SETS[text]
    written = make(tmp_path, f"pictures/{image}", f"labels of it/own/{label}", *rest)
    domain = domains.load(f"{text}@{tmp_path}", Data())
    assert len(domain) == 3 and np.array_equal(domain.sample(1).label, written[1])
    assert prepare.prepare(f"{text}@{tmp_path}", tmp_path.parent / f"{tmp_path.name}-copy", 6, Data()) == 3
    with pytest.raises(ValueError, match=f"wrong level of the tree: give {tmp_path}[.]"):
        readers.list_pairs(text.partition(":")[0], str(tmp_path / "pictures" / Path(image).parts[0]))


@pytest.mark.parametrize("folder", ["masks", "gt", "annotations/deep"])
def test_labels_that_lie_elsewhere_are_named_with_what_is_expected(tmp_path, folder):
    make(tmp_path, "images/{}.jpg", f"{folder}/{{}}_mask.png", "cityscapes", "ids")
    named = f"{folder.partition('/')[0]}/ holds [012].*png, but labels are expected as .*labels/.name..png"
    with pytest.raises(ValueError, match=f"has no labels: a source needs .*{named}"):
        domains.load(f"folder@{tmp_path}", Data(), "source")


def test_labels_and_pictures_in_formats_that_lose_or_are_not_read(tmp_path):
    make(tmp_path, "images/{}.jpg", "labels/{}.jpg", "cityscapes", "ids")
    with pytest.raises(ValueError, match="3 labels like .*jpg are in a lossy format, ids are lost: export them as PNG"):
        domains.load(f"folder@{tmp_path}", Data())
    (tmp_path / "labels/0.jpg").unlink()
    write_label(tmp_path / "labels/0.png", np.zeros(SIZE, np.uint8), "cityscapes", "ids")
    with pytest.raises(ValueError, match="2 labels like .*jpg are in a lossy format"):
        domains.load(f"folder@{tmp_path}", Data(on_error="skip"))
    make(tmp_path, "images/{}.jpg", "labels/{}.bmp", "cityscapes", "ids")
    (tmp_path / "images/7.HEIC").write_bytes(b"no matter")
    (found,) = check.check(f"folder@{tmp_path}", Data())
    assert (found.pairs, found.problems) == (3, []) and "like images/7.HEIC are in a format that is" in found.notes[0]
    (tmp_path / "phone/images").mkdir(parents=True)
    (tmp_path / "images/7.HEIC").rename(tmp_path / "phone/images/7.HEIC")
    with pytest.raises(ValueError, match="in a format that is not read: export them as JPG or PNG"):
        domains.load(f"folder@{tmp_path / 'phone'}", Data())


def hub_rows(count: int, damaged: int = -1, bare: int = -1) -> Dataset:
    """Rows of pictures with labels of id 7."""
    rows = {"image": [], "label": []}
    for i in range(count):
        for column, picture in (("image", Image.new("RGB", (9, 6), (i, 0, 0))), ("label", Image.new("L", (9, 6), 7))):
            picture.save(file := io.BytesIO(), "PNG")
            cut = -30 if i == damaged and column == "image" else None
            content = {"bytes": file.getvalue()[:cut], "path": None}
            rows[column].append(None if i == bare and column == "label" else content)
    return Dataset.from_dict(rows, features=Features({"image": HubImage(), "label": HubImage()}))


def test_a_data_set_of_the_hub_is_streamed_and_mapped(monkeypatch):
    rows, asked = hub_rows(4).rename_column("image", "pixel_values").add_column("other", [*range(4)]), []

    def load_dataset(name, data_files, split, streaming):
        asked.append((name, split, streaming))
        found = rows.to_iterable_dataset() if streaming else rows
        return found if split else {"train": found}

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(domains, "hub_answers", lambda endpoint: False)
    with pytest.raises(ValueError, match="does not answer; HF_HUB_OFFLINE=1 takes a copy from the cache"):
        domains.load("hub:owner/streets", Data())
    monkeypatch.setattr(domains, "hub_answers", lambda endpoint: True)
    monkeypatch.setattr(domains.datasets, "load_dataset", load_dataset)
    domain = domains.load("hub:owner/streets:validation@labelids", Data(eval_images=3))
    assert asked == [("owner/streets", "validation", True)] and len(domain) == 3 and domain.has_labels
    sample = domain.sample(2)
    assert (sample.image == (2, 0, 0)).all() and (sample.label == 7).all() and sample.label.shape == (6, 9)
    assert len(domains.load("hub:owner/streets@labelids", Data(eval_images=0))) == 4
    assert asked[-1] == ("owner/streets", None, False)
    (found,) = check.check("hub:owner/streets@labelids", Data(eval_images=0))
    assert (found.class_pixels["road"], found.pairs, found.sizes) == (4 * 9 * 6, 4, {(9, 6): 4})
    with pytest.raises(ValueError, match="Unknown id map 'labelid' .nearest: labelids"):
        domains.load("hub:owner/streets@labelid", Data())
    monkeypatch.setattr(domains.datasets, "load_dataset", lambda *_, **__: {"train": rows.select_columns(["other"])})
    with pytest.raises(ValueError, match="has the picture columns none: expected one of pictures"):
        domains.load("hub:owner/streets", Data(eval_images=0))


@pytest.mark.parametrize("limit", [0, 3])
def test_a_hub_set_in_a_folder_its_splits_and_its_damaged_rows(tmp_path, limit, capsys):
    folder, data = tmp_path / "my set", Data(train_images=limit, eval_images=limit)
    for split, name in (("train", "train-0"), ("val", "validation-0")):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        rows = hub_rows(3, damaged=1, bare=2) if split == "val" else hub_rows(3)
        rows.to_parquet(folder / f"data/{name}.parquet")
    text = f"hub:{folder}"
    source = domains.load(text, data, "source")
    assert source.keys == [f"{folder} train {i}" for i in range(3)] and source.has_labels
    with pytest.raises(ValueError, match="1 picture without a label; -o data.on_error=skip passes over them"):
        domains.load(text, data)
    target = domains.load(text, dataclasses.replace(data, on_error="skip"))
    assert [*target.dataset["name"]] == ["validation 0", "validation 1"]
    with pytest.raises(ValueError, match=f"hub:{folder}: 'validation 1' cannot be decoded"):
        target.sample(1)
    assert (
        "'validation 1' cannot be decoded"
        in check.check(text, dataclasses.replace(data, on_error="skip"))[0].problems[0]
    )
    assert domains.shared(text, f"{text}:train", data) == 3 and not domains.shared(text, "hub:owner/other", data)
    rows.select_columns("image").to_parquet(tmp_path / "bare.parquet")
    with pytest.raises(ValueError, match="has no labels: a source needs a column called label or"):
        domains.load(f"hub:{tmp_path}/bare.parquet", data, "source")
    single = domains.load(f"hub:{folder}/data/train-0.parquet", data)
    assert len(single) == 3 and domains.shared(f"hub:{folder}/data/train-0.parquet", single.spec.text, data) == 3


def test_names_that_two_splits_share_are_two_pictures(tmp_path):
    for split in ("train", "val"):
        make(tmp_path, f"leftImg8bit/{split}/0/{{}}_image.jpg", f"gtFine/{split}/0/{{}}_label.png", "iddlite", "ids")
    text = f"idd-lite@{tmp_path}"
    source, target = domains.load(text, Data(), "source"), domains.load(text, Data())
    assert [*source.dataset["name"]] == [*target.dataset["name"]] and not {*source.keys} & {*target.keys}
    assert not domains.shared(text, text, Data()) and domains.shared(text, f"idd-lite:train@{tmp_path}/", Data()) == 3


def test_labels_of_a_whole_set_inside_of_another_are_not_its_own(tmp_path):
    make(tmp_path, "images/{}.jpg", "old/labels/{}.png", "cityscapes", "ids")
    assert domains.load(f"folder@{tmp_path}", Data()).has_labels  # an archive of its own
    make(tmp_path, "old/images/{}.jpg", "old/labels/{}.png", "cityscapes", "ids")
    assert not domains.load(f"folder@{tmp_path}", Data()).has_labels
