"""What every test runs under: one thread, no network, no screen, a cache of its own."""

from __future__ import annotations

import os
import tempfile
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is first imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("MPLBACKEND", None)  # set to Agg it would drop every figure of the notebooks

import hypothesis  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

matplotlib.use("Agg")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
hypothesis.settings.register_profile("setlib", deadline=None, derandomize=True)
hypothesis.settings.load_profile("setlib")


def pytest_configure(config: pytest.Config) -> None:
    """Point setlib's cache at a folder that lives as long as the session, before any test module is imported.

    Not where the browser check shows a run of the user's (SETLIB_RUN), whose backbone lies in his own cache.
    """
    if os.environ.get("SETLIB_RUN"):
        return
    folder = tempfile.TemporaryDirectory(prefix="setlib-cache-")
    os.environ["SETLIB_CACHE"] = folder.name
    config.add_cleanup(folder.cleanup)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that several workers end together."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> str:
    """A labelled domain of four pictures whose colours tell the class: road on the left, sky on the right."""
    folder, rng = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for i in range(4):
        label = np.where(np.arange(128) < 40 + 10 * i, 0, 10)[None].repeat(64, 0).astype(np.uint8)
        image = np.where(label[..., None] == 0, [90, 80, 90], [120, 180, 250]) + rng.integers(-9, 9, (64, 128, 3))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"images/{i}.png")
        Image.fromarray(label).save(folder / f"labels/{i}.png")
    return f"folder@{folder}"


@pytest.fixture(scope="session")
def trained(source, tmp_path_factory) -> SimpleNamespace:
    """A smoke run of 7 steps on `source`: path, experiment, model, history. Copy its folder to change it."""
    from setlib.experiment import Experiment
    from setlib.run import Run
    from setlib.training import train

    options = ["train.steps=7", "train.checkpoint_every=3"]
    experiment = Experiment.build("smoke", source, [source], overrides=options)
    run = Run.open(tmp_path_factory.mktemp("trained") / "run", experiment)
    model, history = train(run, progress=False)
    return SimpleNamespace(path=run.path, experiment=experiment, model=model, history=history)
