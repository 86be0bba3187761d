"""Benches: what a row says, how memory is counted, what the command prints and writes; the GPU's, small, on a CPU."""

import json
from functools import partial

import pytest
import torch

from setlib import __main__
from setlib.bench import gpu
from setlib.bench import measure as bench

SMALL = ("model.backbone=tiny-random", "model.feature_layers=1,2,3,4", "model.head_channels=32")
SMALL += (
    "model.num_tokens=5",
    "model.pixel_layers=1",
    "model.pixel_width=48",
    "model.decoder_layers=1",
    "model.decoder_width=64",
)


@pytest.fixture
def small(monkeypatch):
    """Benches of the same form that take no time."""
    sizes = ((1, 3, 4, 8), (2, 2, 3, 8))
    monkeypatch.setattr(bench, "SIZES", sizes)
    monkeypatch.setattr(bench, "GRIDS", sizes)
    monkeypatch.setattr(gpu, "DINOV2", dict.fromkeys(("S", "L"), SMALL))
    smaller = {"PROFILE": "smoke", "CROPS": (64,), "BATCHES": (2, 1), "WARM_UP": 0, "STEPS": 1, "SECONDS": 0.0}
    for name, value in smaller.items():
        monkeypatch.setattr(gpu, name, value)


def fill(megabytes):
    """A case whose step needs so much memory; its process imports no test."""
    step = partial(partial, torch.ones, megabytes * 250_000)
    return bench.Case("refiner", f"{megabytes} MB", "once", step, repeats=2)


@pytest.mark.first
def test_rows_hold_medians_and_peaks(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "cases", lambda: [fill(20), fill(80)])
    assert __main__.main(["bench", "--only", "refiner", "--json", str(tmp_path / "rows.json")]) == 0
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["torch"] == torch.__version__ and {"card", "cuda"} < set(found)
    keys = ["bench", "variant", "size", "seconds", "peak_bytes", "ratio", "peak_ratio"]
    assert [list(row) for row in found["rows"]] == [keys] * 2
    few, many = found["rows"]
    assert (few["bench"], few["variant"], few["size"], few["ratio"]) == ("refiner", "20 MB", "once", 1.0)
    assert many["ratio"] == many["seconds"] / few["seconds"]
    if few["peak_bytes"]:  # a system that tells
        assert few["peak_bytes"] == pytest.approx(20e6, rel=0.1)
        assert many["peak_bytes"] == pytest.approx(80e6, rel=0.1)
    shown = capsys.readouterr().out
    assert "20 MB" in shown and "ratio" in shown and "rows.json" in shown


def test_ratios_are_to_the_head_alone():
    rows = [
        {"bench": "b", "variant": v, "size": "s", "seconds": t, "peak_bytes": 0} for v, t in (("set", 3), ("none", 2))
    ]
    bench.add_ratios(rows)
    assert [(row["ratio"], row["peak_ratio"]) for row in rows] == [(1.5, 0.0), (1.0, 0.0)]


def test_every_case_can_be_prepared_and_stepped(small):
    cases = list(bench.cases())
    assert [*dict.fromkeys(case.bench for case in cases), "gpu"] == list(bench.NAMES)
    assert len({case[:3] for case in cases}) == len(cases)
    for case in cases:
        case.prepare()()


@pytest.mark.first
def test_what_a_gpu_is_asked_runs_on_a_cpu(small, monkeypatch, tmp_path, capsys):
    """The very command: every row is there, has its numbers, and the CPU agrees with itself."""
    monkeypatch.setattr(bench, "HAS_GPU", True)
    waits, named = [], {"get_device_name": "a card", "max_memory_allocated": 5 * 10**9}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    for name in ("empty_cache", "reset_peak_memory_stats", *named):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: named.get(name))
    assert __main__.main(["bench", "--only", "gpu", "--json", str(tmp_path / "rows.json")]) == 0
    found = json.loads((tmp_path / "rows.json").read_text())
    rows = found["rows"]
    assert found["card"] == "a card"
    kinds = {row["size"]: [] for row in rows}
    for row in rows:
        kinds[row["size"]].append(row)
    assert len(kinds) == 2 + 2 + 2 * 2 * 2  # heads; precisions; precisions x step and prediction x images
    for size, group in kinds.items():
        assert [row["variant"] for row in group] == list(gpu.REFINERS)
        for row in group:
            if size.startswith("GPU against CPU"):
                assert set(row["differences"]) == {"features", "loss", "gradients"}
                assert max(row["differences"].values()) < 1e-5
            else:
                assert row["note"].startswith("40,000 steps of 2: ") == size.startswith("step, DINOv2")
                assert row["seconds"] > 0 and row["images_per_second"] > 0, row
                assert row["peak_bytes"] == 5 * 10**9
                assert row["ratio"] == row["seconds"] / group[0]["seconds"]
    timed = sum(not size.startswith("GPU against") for size in kinds)
    assert len(waits) == 3 * timed * len(gpu.REFINERS)
    assert "set-released" in (shown := capsys.readouterr().out) and "images/s" in shown


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("head", ["per-pixel", "mask2former"])
@pytest.mark.parametrize("refiner", gpu.REFINERS)
def test_a_gpu_agrees_with_the_cpu(refiner, head):
    assert (
        max(gpu.compared(refiner, f"model.head={head}")["differences"].values()) < 1e-3
    )  # as notebooks/README.md says


def test_what_does_not_fit_or_fails_or_is_not_reached_is_a_row(small, monkeypatch):
    made = []

    def step(kind, size, refiner, batch, crop, *options):
        made.append((refiner, batch))
        if refiner == "set" and batch > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        if refiner == "set-released":
            raise RuntimeError("CUFFT_INTERNAL_ERROR\nin a plan")
        return lambda: None

    monkeypatch.setattr(gpu, "paper_step", step)
    found = lambda prepare, images: {"seconds": float(callable(prepare())), "peak_bytes": int(1e9 + 2e9 * images)}  # noqa: E731
    monkeypatch.setattr(gpu, "timed", found)
    rows = gpu.paper_rows("step", 32, "float32", end=float("inf"))
    assert made == [(refiner, batch) for batch in (2, 1) for refiner in gpu.REFINERS]
    many = "40,000 steps of 2: 11.1 h; 24 GB hold 11; 80 GB hold 39"
    one, failed = "40,000 steps of 2: 22.2 h", "RuntimeError: CUFFT_INTERNAL_ERROR in a plan"
    assert [row["note"] for row in rows] == [many, many, "does not fit", failed, one, one, one, failed]
    monkeypatch.setattr(
        gpu, "timed", lambda prepare, images: {"seconds": 1.0, "peak_bytes": int(2.8e10 + 2e9 * images)}
    )
    notes = [row["note"] for row in gpu.paper_rows("step", 32, "float32", end=float("inf"))]
    assert notes[0].endswith("; 24 GB hold 0; 80 GB hold 26")  # one image is 30 GB
    rows = gpu.paper_rows("step", 32, "float32", end=0.0)
    assert [row["note"] for row in rows] == ["not reached"] * 2 * len(gpu.REFINERS)


def test_the_offline_backbone_is_not_fetched(small, monkeypatch):
    monkeypatch.setattr(gpu, "PROFILE", "quick")
    monkeypatch.setattr(gpu, "is_here", lambda name: False)
    monkeypatch.setattr("setlib.weights.saliency._fetch_wheel", lambda folder: pytest.fail("fetched"))
    overrides = ("data.height=28", "data.width=56", "model.feature_layers=", "model.refined_layers=6", "model.rank=4")
    gpu.profile_step("set", *overrides)()


def test_without_a_gpu_the_gpus_bench_says_so(capsys, monkeypatch):
    monkeypatch.setattr(bench, "HAS_GPU", False)
    assert __main__.main(["bench", "--only", "gpu"]) == 0
    assert "nothing is measured without a GPU" in capsys.readouterr().out


def test_unknown_bench_names_the_nearest(capsys):
    assert __main__.main(["bench", "--only", "refner"]) == 2
    assert "Unknown bench 'refner' (nearest: refiner" in capsys.readouterr().err
