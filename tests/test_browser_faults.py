"""The browser check itself: it must fail on what must not happen."""

from __future__ import annotations

import pytest

from setlib import browser, workbook
from setlib.experiment import Experiment, Run

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(browser.program() is None, reason="no browser: see test_browser.py"),
]
BROKEN = """from setlib.explore import SwapExplorer
from setlib.views import Studio
explorer = SwapExplorer(Studio.open({names}))
{{}}
explorer.show()"""


@pytest.mark.parametrize(
    "fault",
    [
        "explorer.render = lambda **_: 1 / 0; explorer.controls['weight'].value = 0.5",  # a view
        "explorer.controls['weight'].observe(lambda change: 1 / 0, names='value')",  # a callback beside ours
        "1 / 0",  # a cell
        "explorer.words.value = '<img src=\"https://example.org/a.png\">'",  # a request elsewhere
    ],
)
def test_the_check_fails_on_a_fault(tmp_path, fault):
    run = Run.open(tmp_path / "run", Experiment.build("smoke"))
    with browser.open_lab(run.path, tmp_path / "lab.log") as lab:
        lab.run_all(workbook.write_explorer(run, code=BROKEN.replace("{{}}", fault.replace("{", "{{"))).name)
        if "observe" in fault:
            lab.check()
            lab.control("swap", "weight").first.focus()
            lab.page.keyboard.press("ArrowLeft")
            lab.page.wait_for_timeout(2000)
        with pytest.raises(AssertionError, match="ZeroDivisionError|example.org|from the kernel: Traceback"):
            lab.check()
