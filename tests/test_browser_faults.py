"""Explorers that are slow or broken, in a real browser: positions are dropped, and the check fails on a fault."""

from __future__ import annotations

import re

import pytest

from setlib import browser, workbook
from setlib.experiment import Experiment, Run

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(browser.program() is None, reason="no browser: see test_browser.py"),
]
NOTEBOOK = """from setlib.explore import SwapExplorer
from setlib.views import Studio
explorer = SwapExplorer(Studio.open({names}))
{{}}
explorer.show()"""
SLOW = "import time; draw = explorer.render; explorer.render = lambda **a: (time.sleep(0.25), draw(**a))[1]"


def run_notebook(lab, run: Run, line: str) -> None:
    lab.run_all(workbook.write_explorer(run, code=NOTEBOOK.replace("{{}}", line.replace("{", "{{"))).name)


def test_a_drag_over_20_positions_ends_within_one_update(tmp_path):
    run = Run.open(tmp_path / "run", Experiment.build("smoke"))
    with browser.open_lab(run.path, tmp_path / "lab.log") as lab:
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
        ("explorer.render = lambda **_: 1 / 0; explorer.controls['weight'].value = 0.5", "a view says: ⚠ ZeroDivision"),
        ("explorer.controls['weight'].observe(lambda change: 1 / 0, names='value')", "from the kernel: Traceback"),
        ("1 / 0", "(?s)in the notebook: .*ZeroDivisionError"),
        ("explorer.words.value = '<img src=\"https://example.org/a.png\">'", "request to https://example.org/a.png"),
    ],
    ids=["view", "callback", "cell", "request"],
)
def test_the_check_fails_on_a_fault(tmp_path, fault, said):
    run = Run.open(tmp_path / "run", Experiment.build("smoke"))
    with browser.open_lab(run.path, tmp_path / "lab.log") as lab:
        run_notebook(lab, run, fault)
        if "observe" in fault:
            lab.check()
            lab.control("swap", "weight").first.focus()
            lab.page.keyboard.press("ArrowLeft")
            lab.page.wait_for_timeout(2000)
        with pytest.raises(AssertionError, match=said):
            lab.check()
