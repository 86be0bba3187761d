"""Explorers at work, slow or broken, in a real browser: a key answers soon, positions are dropped, faults are found."""

from __future__ import annotations

import os
import re
import statistics

import headless
import pytest

from setlib.checkpoint import build_segmenter, save_segmenter
from setlib.experiment import Experiment
from setlib.run import Run
from setlib.workbook import serve as workbook

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(headless.program() is None, reason="no browser: see test_browser.py"),
]
NOTEBOOK = """from setlib.explorer.widgets import SwapExplorer
from setlib.explorer.studio import Studio
explorer = SwapExplorer(Studio.open({names}))
{{}}
explorer.show()"""
SWAP = """from setlib.explorer.widgets import SwapExplorer
from setlib.explorer.studio import Studio
SwapExplorer(Studio.open({names}), **STATE).show()"""
SLOW = "import time; draw = explorer.board; explorer.board = lambda: (time.sleep(0.25), draw())[1]"


def run_notebook(lab, run: Run, line: str) -> None:
    lab.run_all(workbook.write_explorer(run, code=NOTEBOOK.replace("{{}}", line.replace("{", "{{"))).name)


@pytest.mark.parametrize(
    ("space", "with_model", "longest"), [("pixels", False, 1), ("pixels", True, 3), ("layer", True, 3)]
)
def test_a_key_on_a_slider_changes_the_picture_soon(tmp_path, capsys, space, with_model, longest):
    """Median seconds of 9 keys, printed; SETLIB_RUN names a run of another size to measure."""
    run = Run.load(os.environ["SETLIB_RUN"]) if "SETLIB_RUN" in os.environ else None
    if run is None:
        run = Run.open(tmp_path / "run", Experiment.build("smoke"))
        save_segmenter(build_segmenter(run.experiment), run.path / "model")
    space = space.replace("layer", f"layer {run.experiment.model.refined_layers[0]}")
    state = {"space": space, "run": str(run.path) * with_model, "style": run.experiment.data.targets[-1]}
    notebook = workbook.write_explorer(run, code=SWAP.replace("STATE", "{{" + repr(state)[1:-1] + "}}"))
    with headless.open_lab(run.path, tmp_path / "lab.log") as lab:
        lab.run_all(notebook.name)
        lab.check()
        lab.watch("swap")
        lab.control("swap", "weight").first.focus()
        lab.press("ArrowLeft")
        seconds = statistics.median(lab.press("ArrowLeft") for _ in range(9)) / 1000
        lab.check()
    with capsys.disabled():
        print(f"\nswap in {space}{' with segmentation' * with_model}: {seconds:.2f} s from key to picture")
    assert seconds < longest


def test_a_drag_over_20_positions_ends_within_one_update(tmp_path):
    run = Run.open(tmp_path / "run", Experiment.build("smoke"))
    with headless.open_lab(run.path, tmp_path / "lab.log") as lab:
        run_notebook(lab, run, SLOW)
        lab.wait_for_words("swap", "at all frequencies")
        lab.watch("swap")
        handle = lab.control("swap", "weight").first
        box = handle.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        lab.page.mouse.move(x, y)
        lab.page.mouse.down()
        for step in range(1, 21):
            lab.page.mouse.move(x - 9 * step, y)
            lab.page.wait_for_timeout(15)
        at_the_end = len(lab.drawn())
        lab.page.mouse.up()
        lab.settle()
        shown = re.search(r"takes (\d+) % of", lab.words("swap"))
        value = float(handle.get_attribute("aria-valuetext") or handle.get_attribute("aria-valuenow"))
        assert value < 0.5 and abs(float(shown[1]) - 100 * value) < 1  # the last position is what is shown
        assert 1 <= len(lab.drawn()) - at_the_end <= 2  # what was being drawn, and the last position
        lab.check()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("explorer.board = lambda: 1 / 0; explorer.controls['weight'].value = 0.5", "a view says: ⚠ ZeroDivision"),
        ("explorer.controls['weight'].observe(lambda change: 1 / 0, names='value')", "from the kernel: Traceback"),
        ("1 / 0", "(?s)in the notebook: .*ZeroDivisionError"),
        ("explorer.words.value = '<img src=\"https://example.org/a.png\">'", "request to https://example.org/a.png"),
    ],
    ids=["view", "callback", "cell", "request"],
)
def test_the_check_fails_on_a_fault(tmp_path, fault, said):
    run = Run.open(tmp_path / "run", Experiment.build("smoke"))
    with headless.open_lab(run.path, tmp_path / "lab.log") as lab:
        run_notebook(lab, run, fault)
        if "observe" in fault:
            lab.check()
            lab.control("swap", "weight").first.focus()
            lab.page.keyboard.press("ArrowLeft")
            lab.page.wait_for_timeout(2000)
        with pytest.raises(AssertionError, match=said):
            lab.check()
