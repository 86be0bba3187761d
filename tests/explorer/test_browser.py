"""The explorer in a real JupyterLab, driven as a person would; skipped where no browser is installed.

SETLIB_SCREENSHOTS=FOLDER writes a picture of every view there, of the run that SETLIB_RUN names.
"""

from __future__ import annotations

import io
import os
import re
import shutil
from pathlib import Path

import headless
import numpy as np
import pytest
from PIL import Image

from setlib import Studio
from setlib import __main__ as cli
from setlib.analysis.transplant import SPANS
from setlib.plots import GAP
from setlib.run import Run
from setlib.workbook import serve as workbook

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        headless.program() is None,
        reason="the browser check needs a Chromium or Chrome, and `pip install -e '.[browser]'`",
    ),
]
SCREENSHOTS, TRAINED = os.environ.get("SETLIB_SCREENSHOTS"), os.environ.get("SETLIB_RUN")
SIZE = ["data.height=112", "data.width=224", "data.long_edge=224", "data.eval_images=3"]
LARGEST = 150_000  # bytes of a screenshot


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A trained run: the one that is named, or a small one."""
    if TRAINED:
        return Run.load(TRAINED)
    folder = tmp_path_factory.mktemp("browser") / "run"
    words = ["train", "--profile", "smoke", "--run", str(folder), "-o", "train.steps=4", "train.views=0", *SIZE]
    assert cli.main(words) == 0
    assert (
        cli.main(["premise", "--run", str(folder), *words[1:3], "--layouts", "3", "--places", "2", "-o", *words[6:]])
        == 0
    )
    return Run.load(folder)


@pytest.fixture(scope="module")
def lab(run, tmp_path_factory):
    """The explorer's own notebook, run, as `python -m setlib explore` serves it."""
    with headless.open_lab(run.path, tmp_path_factory.mktemp("log") / "lab.log") as lab:
        lab.run_all(workbook.write_explorer(run).name)
        lab.wait_for_words("swap", "at all frequencies")
        lab.watch("swap")
        yield lab


def open_tab(lab, title: str, view: str, said: str) -> None:
    lab.page.get_by_role("tab", name=title, exact=True).click()
    lab.wait_for_words(view, said)


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), np.int16)


def take_screenshot(lab, view: str) -> None:
    if not SCREENSHOTS:
        return
    lab.page.set_viewport_size({"width": 1280, "height": 1800})  # all of it is on the page
    lab.page.mouse.move(0, 0)
    lab.page.wait_for_timeout(500)
    shot = Image.open(io.BytesIO(lab.view(view).screenshot())).convert("RGB")
    lab.page.set_viewport_size(headless.SIZE)
    for share in (1, 0.9, 0.8, 0.7, 0.6, 0.5):
        kept, size = io.BytesIO(), (round(share * shot.width), round(share * shot.height))
        shot.resize(size, Image.Resampling.LANCZOS).quantize(256).save(kept, "PNG", optimize=True)
        if kept.tell() < LARGEST:
            break
    (Path(SCREENSHOTS) / f"{view}.png").write_bytes(kept.getvalue())
    assert kept.tell() < LARGEST


def test_swap_by_keyboard_and_mouse(lab, run):
    last = [lab.picture("swap")]
    seen = [pixels(last[0])]

    def moved(pattern: str = "") -> np.ndarray:
        """The picture now: another than any before, and the view says so."""
        lab.wait_for_another_picture("swap", last[0])
        lab.settle()
        if pattern:
            lab.wait_for_words("swap", pattern)
        last[0] = lab.picture("swap")
        now = pixels(lab.picture("swap"))
        assert not any(now.shape == one.shape and np.array_equal(now, one) for one in seen)
        seen.append(now)
        return now

    page = lab.page
    lab.control("swap", "picture").first.focus()
    page.keyboard.press("ArrowRight")
    moved()
    lab.control("swap", "style").first.focus()
    page.keyboard.press("ArrowUp")  # the style before the last one
    moved()
    lab.control("swap", "weight").first.focus()
    page.keyboard.press("Home")
    moved("takes 0 % of the style's amplitude")
    rows, width = slice(24, 60), (seen[-1].shape[1] - 2 * GAP) // 3  # within the first row of pictures
    unmoved = np.abs(seen[-1][rows, :width] - seen[-1][rows, 2 * (width + GAP) :][:, :width])
    assert unmoved.mean() < 6  # weight 0: the mixture is the content
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    moved("takes 95 % of the style's amplitude")
    high = lab.control("swap", "frequencies").nth(1)
    box = high.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] - 150, box["y"] + box["height"] / 2, steps=8)
    page.mouse.up()
    moved(r"at frequencies from 0\.000 to 0\.\d\d\d")
    lab.view("swap").get_by_role("button", name="phase", exact=True).click()
    moved("of the style's phase")
    lab.control("swap", "trained run").first.fill(TRAINED or str(run.path))
    page.keyboard.press("Enter")
    lab.wait_for_another_picture("swap", last[0])
    miou = re.search(
        r"([\d.]+) % before, ([\d.]+) % after",
        lab.wait_for_words("swap", r"mIoU of this picture, at the size shown.*after"),
    )
    assert all(0 <= float(value) <= 100 for value in miou.groups())
    moved()
    lab.control("swap", "where").first.select_option("layer 2" if not TRAINED else "layer 9")
    moved()
    lab.check()


def test_a_click_on_a_panel_chooses_its_patch(lab):
    picture = lab.view("swap").locator("img").first
    picture.scroll_into_view_if_needed()
    picture.click(position={"x": 150, "y": 100})  # the content's picture
    chosen = lab.wait_for_words("swap", r"patches are more similar to patch \d+ than")
    picture.click(position={"x": 470, "y": 100})  # the style's: nothing
    lab.settle()
    assert chosen in lab.words("swap")
    take_screenshot(lab, "swap")
    lab.control("swap", "patch").first.focus()
    lab.page.keyboard.press("Home")  # none
    lab.settle()
    assert "more similar to patch" not in lab.words("swap")
    lab.check()


def test_a_question_mark_explains_its_control(lab):
    help_of_weight = lab.control("swap", "weight").last
    help_of_weight.focus()
    lab.page.keyboard.press("Enter")
    lab.wait_for_words("swap", "0 changes nothing, 1 takes the style's part as it is")
    lab.page.keyboard.press("Enter")
    lab.page.wait_for_timeout(500)
    assert "0 changes nothing" not in lab.words("swap")


def test_every_control_is_reached_by_tab_and_no_key_reaches_the_notebook(lab):
    lab.control("swap", "content").first.focus()
    reached = []
    for _ in range(40):
        lab.page.keyboard.press("Tab")
        reached.append(
            lab.page.evaluate(
                "() => { const e = document.activeElement; return e.closest('.setlib-swap') === null ? null :"
                " (e.textContent || '') + (e.title || '') + (e.placeholder || '') + e.className + e.type; }"
            )
        )
    inside = [name for name in reached if name is not None]
    for part in ("noUi-handle", "phase", "none; for example", "file", "save", "text"):
        assert any(part in name for name in inside), (part, inside)
    assert sum("noUi-handle" in name for name in inside) >= 5  # two pictures, two ends of the band, the weight
    for label in ("style", "weight", "what moves"):
        lab.control("swap", label).first.focus()
        for key in "abxmdd":  # JupyterLab's own: insert, cut, to Markdown, delete
            lab.page.keyboard.press(key)
    lab.page.wait_for_timeout(500)
    assert lab.page.locator(".jp-Cell").count() == lab.page.locator(".jp-CodeCell").count() == 1
    lab.check()


def test_upload_save_and_the_line_of_python(lab, run, tmp_path, monkeypatch):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 160, 3), np.uint8))
    picture.resize((640, 360)).save(tmp_path / "mine.png")
    before = pixels(lab.picture("swap"))
    lab.view("swap").locator("input[type=file]").set_input_files(tmp_path / "mine.png")
    lab.wait_for_words("swap", "Uploaded 'mine.png' as content")
    lab.settle()
    after = pixels(lab.picture("swap"))
    assert after.shape != before.shape or not np.array_equal(after, before)
    assert "there is no mIoU" in lab.words("swap")
    shutil.rmtree(run.path / "saved", ignore_errors=True)
    lab.view("swap").get_by_role("button", name="save", exact=True).focus()
    lab.page.keyboard.press("Enter")
    lab.wait_for_words("swap", r"Saved .*swap-1\.png")
    saved = run.path / "saved" / "swap-1.png"
    line, state = saved.with_suffix(".py").read_text().splitlines()
    assert state.startswith("SWAP = {")
    with Image.open(saved) as opened:
        assert line == f"{opened.text['Source']}.savefig('swap-1.png')"
        shown = np.asarray(opened)
    monkeypatch.chdir(tmp_path)
    exec(compile(line, "line", "exec"), {})  # a new studio: nothing of the widgets
    again = np.asarray(Image.open(tmp_path / "swap-1.png"))
    assert again.shape == shown.shape and np.abs(again.astype(int) - shown).mean() < 0.5
    lab.check()


def test_a_file_that_is_dropped_is_uploaded(lab, tmp_path):
    Image.new("RGB", (300, 200), "teal").save(tmp_path / "dropped.png")
    upload = lab.view("swap").locator("input[type=file]")
    upload.scroll_into_view_if_needed()
    box = upload.bounding_box()
    devtools = lab.page.context.new_cdp_session(lab.page)
    where = {"x": box["x"] + 20, "y": box["y"] + 10}
    what = {"items": [], "files": [str(tmp_path / "dropped.png")], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": kind, **where, "data": what})
    lab.wait_for_words("swap", "Uploaded 'dropped.png' as content")
    lab.check()


def test_bad_uploads_are_a_sentence_and_the_kernel_lives(lab, tmp_path):
    upload = lab.view("swap").locator("input[type=file]")
    (tmp_path / "notes.png").write_text("no picture")
    upload.set_input_files(tmp_path / "notes.png")
    lab.wait_for_words("swap", "'notes.png' is no picture that can be read")
    noise = np.random.default_rng(0).integers(0, 256, (5800, 8700), np.uint8)  # 50 megapixels, grey, many pieces
    Image.fromarray(noise).save(tmp_path / "large.png", compress_level=0)
    upload.set_input_files(tmp_path / "large.png")
    lab.wait_for_words("swap", r"Uploaded 'large.png' \(kept at 1024 x 683, grey\)")
    (tmp_path / "empty.png").write_bytes(b"")
    upload.set_input_files(tmp_path / "empty.png")
    lab.wait_for_words("swap", "'empty.png' is no picture that can be read")
    lab.control("swap", "trained run").first.fill("no/such/run")
    lab.page.keyboard.press("Enter")
    lab.wait_for_words("swap", "holds no saved model")
    lab.control("swap", "trained run").first.fill("")
    lab.page.keyboard.press("Enter")
    lab.page.wait_for_timeout(1000)
    lab.check()  # no sentence is left, and nothing was written to the log


def test_the_other_views(lab, run):
    open_tab(lab, "Layers", "layers", "In the pixels the two lie")
    lab.view("layers").get_by_role("button", name="2" if not TRAINED else "9", exact=True).click()
    lab.wait_for_words("layers", r"After layer \d the two lie")
    take_screenshot(lab, "layers")
    open_tab(lab, "Tokens", "tokens", r"number 1 of \d+ by influence")
    for folder, said in (("", "Tokens learn: choose a trained run"), (str(run.path), r"number 1 of \d+ by influence")):
        lab.control("tokens", "trained run").first.fill(folder)
        lab.page.keyboard.press("Enter")
        lab.wait_for_words("tokens", said)
    lab.control("tokens", "branch").first.select_option("phase")
    lab.wait_for_words("tokens", r"of phase after layer \d+: number 1 of")
    lab.control("tokens", "token").first.focus()
    lab.page.keyboard.press("ArrowDown")
    lab.wait_for_words("tokens", r"of phase after layer \d+: number 2 of")
    take_screenshot(lab, "tokens")
    open_tab(lab, "Domains", "browse", "picture 0 of 0 to")
    lab.view("browse").get_by_role("button", name="next", exact=True).click()
    lab.wait_for_words("browse", "picture 1 of")
    lab.view("browse").get_by_role("button", name="previous", exact=True).click()
    lab.wait_for_words("browse", "picture 0 of")
    take_screenshot(lab, "browse")
    lab.control("browse", "class").first.select_option("road")
    lab.wait_for_words("browse", r"road: \d+\.\d % of the labelled pixels")
    open_tab(lab, "Lens", "lens", "what a linear head, fitted to")
    take_screenshot(lab, "lens")
    lab.check()


def test_a_click_on_a_cell_of_the_atlas_opens_its_swap(lab, run):
    open_tab(lab, "Atlas", "atlas", "In brackets: swaps that close nothing")
    take_screenshot(lab, "atlas")
    (panel,) = Studio(run).atlas().panels
    cells, picture = panel.cells[1], lab.view("atlas").locator("img").first  # phase
    x, y, width, height = cells.box
    box, column = picture.bounding_box(), list(SPANS).index("low")
    place = x + width * (column + 0.5) / cells.columns, y + height * 0.5 / cells.rows  # low frequencies in the pixels
    picture.click(position={"x": place[0] * box["width"], "y": place[1] * box["height"]})
    low, high = SPANS["low"]
    lab.wait_for_words("swap", rf"takes 100 % of the style's phase at frequencies from {low:.3f} to {high:.3f}")
    assert lab.page.get_by_role("tab", name="Swap", exact=True).get_attribute("aria-selected") == "true"
    lab.check()
