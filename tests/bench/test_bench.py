"""Benches: what a row says, how memory is counted, what the command prints and writes; the GPU's, small, on a CPU."""

import json
from functools import partial

import pytest
import torch

from setlib import __main__
from setlib.bench import gpu
from setlib.bench import measure as bench

SMOKE = gpu.Plan(
    backbone="tiny",
    crops=(64,),
    batches=(2, 1),
    options=(
        "model.head_channels=32",
        "model.num_tokens=5",
        "model.pixel_layers=1",
        "model.pixel_width=48",
        "model.decoder_layers=1",
        "model.decoder_width=64",
    ),
    profile="smoke",
    seconds=0.0,
    steps=1,
)


def fill(megabytes):
    """A case whose step needs so much memory; its process imports no test."""
    return bench.Case("memory", f"{megabytes} MB", "once", partial(partial, torch.ones, megabytes * 250_000))


@pytest.mark.first
def test_rows_hold_medians_and_peaks(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "BENCHES", {"memory": lambda: [fill(20), fill(80)]})
    monkeypatch.setattr(bench, "REPEATS", 2)
    assert __main__.main(["bench", "--only", "memory", "--json", str(tmp_path / "rows.json")]) == 0
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["torch"] == torch.__version__ and {"card", "cuda"} < set(found)
    keys = ["bench", "variant", "size", "seconds", "peak_bytes", "ratio", "peak_ratio"]
    assert [list(row) for row in found["rows"]] == [keys] * 2
    small, large = found["rows"]
    assert (small["bench"], small["variant"], small["size"], small["ratio"]) == ("memory", "20 MB", "once", 1.0)
    assert large["ratio"] == large["seconds"] / small["seconds"]
    if small["peak_bytes"]:  # a system that tells
        assert small["peak_bytes"] == pytest.approx(20e6, rel=0.1)
        assert large["peak_bytes"] == pytest.approx(80e6, rel=0.1)
    shown = capsys.readouterr().out
    assert "20 MB" in shown and "ratio" in shown and "rows.json" in shown


def test_ratios_are_to_the_head_alone():
    rows = [
        {"bench": "b", "variant": v, "size": "s", "seconds": t, "peak_bytes": 0} for v, t in (("set", 3), ("none", 2))
    ]
    bench.add_ratios(rows)
    assert [(row["ratio"], row["peak_ratio"]) for row in rows] == [(1.5, 0.0), (1.0, 0.0)]


@pytest.mark.parametrize("name", bench.BENCHES)
def test_every_case_can_be_prepared_and_stepped(name, monkeypatch):
    sizes = ((1, 3, 4, 8), (2, 2, 3, 8))
    monkeypatch.setattr(bench, "SIZES", sizes)
    monkeypatch.setattr(bench, "GRIDS", sizes)
    monkeypatch.setattr(bench, "PROFILE", "smoke")
    monkeypatch.setattr(gpu, "PLAN", SMOKE)
    monkeypatch.setattr(gpu, "DINOV2", {"S": gpu.DINOV2["tiny"], "L": gpu.DINOV2["tiny"]})
    cases = bench.BENCHES[name]()
    assert {case.bench for case in cases} == {name}
    assert len({case[:3] for case in cases}) == len(cases)
    for case in cases:
        case.prepare()()


@pytest.mark.first
def test_what_a_gpu_is_asked_runs_on_a_cpu(monkeypatch, tmp_path, capsys):
    """The very command, small: every row is there, has its numbers, and the CPU agrees with itself."""
    monkeypatch.setattr(gpu, "PLAN", SMOKE)
    monkeypatch.setattr(gpu, "WARM_UP", 0)
    monkeypatch.setattr(gpu, "has_gpu", lambda: True)
    waits, named = [], {"get_device_name": "a card", "max_memory_allocated": 5 * 10**9}
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    for name in ("empty_cache", "reset_peak_memory_stats", *named):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: named.get(name))
    assert __main__.main(["bench", "--only", "gpu", "--json", str(tmp_path / "rows.json")]) == 0
    found = json.loads((tmp_path / "rows.json").read_text())
    rows = found["rows"]
    assert found["card"] == "a card" and len(waits) > 2 * len(rows)
    kinds = {row["size"]: [] for row in rows}
    for row in rows:
        kinds[row["size"]].append(row)
    assert len(kinds) == 2 + 2 + 2 * 2  # heads; precisions; precisions x step and prediction
    for size, group in kinds.items():
        assert [row["variant"] for row in group] == list(gpu.REFINERS)
        for row in group:
            if size.startswith("GPU against CPU"):
                assert set(row["differences"]) == {"features", "loss", "gradients"}
                assert max(row["differences"].values()) < 1e-5
            else:
                assert row["note"] == "" and row["seconds"] > 0 and row["images_per_second"] > 0, row
                assert row["peak_bytes"] == 5 * 10**9
                assert row["ratio"] == row["seconds"] / group[0]["seconds"]
    assert "set-released" in (shown := capsys.readouterr().out) and "images/s" in shown


def test_what_does_not_fit_or_fails_or_is_not_reached_is_a_row(monkeypatch):
    made = []

    def step(size, refiner, batch, crop, *options):
        made.append((refiner, batch))
        if refiner == "set" and batch > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        if refiner == "set-released":
            raise RuntimeError("CUFFT_INTERNAL_ERROR\nin a plan")
        return lambda: None

    monkeypatch.setattr(gpu, "PAPER", {"step": step})
    monkeypatch.setattr(gpu, "free", lambda: None)
    rows = gpu.Rows(100.0)
    gpu.add_paper(rows, SMOKE, "step", 32, "float32")
    assert made == [("none", 2), ("rein", 2), ("set", 2), ("set", 1), ("set-released", 2), ("none", 1)]
    said = ["", "", "does not fit", "", "RuntimeError: CUFFT_INTERNAL_ERROR in a plan", ""]
    assert [row["note"] for row in rows.rows] == said
    rows = gpu.Rows(-1.0)
    gpu.add_paper(rows, SMOKE, "step", 32, "float32")
    assert [row["note"] for row in rows.rows] == ["not reached"] * len(gpu.REFINERS)


def test_the_offline_backbone_is_not_fetched(monkeypatch):
    monkeypatch.setattr(gpu, "is_here", lambda name: False)
    monkeypatch.setattr(gpu, "DINOV2", {"S": gpu.DINOV2["tiny"]})
    monkeypatch.setattr("setlib.weights.saliency._fetch_wheel", lambda folder: pytest.fail("fetched"))
    overrides = ("data.height=28", "data.width=56", "model.feature_layers=", "model.refined_layers=6", "model.rank=4")
    gpu.profile_step("quick", "set", *overrides)()


def test_without_a_gpu_the_gpus_bench_says_so(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "has_gpu", lambda: False)
    assert __main__.main(["bench", "--only", "gpu"]) == 0
    assert "nothing is measured without a GPU" in capsys.readouterr().out


def test_unknown_bench_names_the_nearest(capsys):
    assert __main__.main(["bench", "--only", "refner"]) == 2
    assert "Unknown bench 'refner' (nearest: refiner" in capsys.readouterr().err
