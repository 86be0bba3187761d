"""What every test runs under: one thread, no network, no screen, a cache of its own."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is first imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("MPLBACKEND", None)  # set to Agg it would drop every figure of the notebooks

import hypothesis  # noqa: E402
import matplotlib  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

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
