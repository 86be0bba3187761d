"""Benches: what a row says, how memory is counted, what the command prints and writes."""

import json
import time
from functools import partial

import pytest
import torch

from setlib import __main__, bench


def fill(megabytes, seconds=0.0):
    """A step that needs so much memory and time; made in the process of the case."""

    def step():
        torch.ones(megabytes * 250_000)
        time.sleep(seconds)

    return step


CASES = {
    "memory": lambda: [bench.Case("memory", f"{n} MB", "once", partial(fill, n, n / 1000)) for n in (40, 80)],
}


def test_rows_hold_medians_and_peaks(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "BENCHES", CASES)
    monkeypatch.setattr(bench, "REPEATS", 2)
    assert __main__.main(["bench", "--only", "memory", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [list(row) for row in rows] == [["bench", "variant", "size", "seconds", "peak_bytes"]] * 2
    small, large = rows
    assert (small["bench"], small["variant"], small["size"]) == ("memory", "40 MB", "once")
    assert small["seconds"] >= 0.04 and large["seconds"] >= 0.08
    if small["peak_bytes"]:  # a system that tells
        assert small["peak_bytes"] == pytest.approx(40e6, rel=0.1)
        assert large["peak_bytes"] == pytest.approx(80e6, rel=0.1)
    shown = capsys.readouterr().out
    assert "40 MB" in shown and "ratio" in shown and "rows.json" in shown


@pytest.mark.parametrize("name", [name for name in bench.BENCHES if name != "explorer"])  # that one needs a browser
def test_every_case_can_be_prepared_and_stepped(name, monkeypatch):
    sizes = ((1, 3, 4, 8), (2, 2, 3, 8))
    monkeypatch.setattr(bench, "SIZES", sizes)
    monkeypatch.setattr(bench, "GRIDS", sizes)
    for constant, value in (("BACKBONE", "tiny-random"), ("CROP", (16, 32)), ("BATCH", 1), ("LAST", (3, 4))):
        monkeypatch.setattr(bench, constant, value)
    monkeypatch.setattr(bench, "DINOV2", {"S": (12, 6, 2), "L": (24, 6, 2)})
    monkeypatch.setattr(bench, "PAPER", (64,))
    cases = bench.BENCHES[name]()
    assert {case.bench for case in cases} == {name} or (name == "gpu" and not torch.cuda.is_available())
    assert len({case[:3] for case in cases}) == len(cases)
    for case in cases:
        case.prepare()()


@pytest.mark.parametrize("refiner", ["none", "through"])
def test_the_gradient_goes_through_every_layer_or_none(monkeypatch, refiner):
    monkeypatch.setattr(bench, "DINOV2", {"S": (12, 6, 2)})
    ran = []
    monkeypatch.setattr(bench.Through, "forward", lambda self, f, layer: ran.append(layer) or f + self.zero)
    bench.paper_step("S", refiner, 1, 64)()
    assert ran == ([1, 2, 3, 4, 5, 6] if refiner == "through" else [])


def test_without_a_gpu_the_gpus_bench_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert __main__.main(["bench", "--only", "gpu"]) == 0
    assert "nothing is measured without a GPU" in capsys.readouterr().out


def test_unknown_bench_names_the_nearest(capsys):
    assert __main__.main(["bench", "--only", "refner"]) == 2
    assert "Unknown bench 'refner' (nearest: refiner" in capsys.readouterr().err
