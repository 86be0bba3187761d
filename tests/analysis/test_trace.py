"""The trace of shapes follows a batch from its images to the classes."""

import pytest
import torch

from setlib import Experiment, build_segmenter
from setlib.analysis.trace import shape_trace


@pytest.mark.parametrize("refiner", ["none", "rein", "set", "fada", "vpt"])
def test_a_batch_is_followed_from_images_to_classes(refiner):
    model = build_segmenter(Experiment.build("smoke", overrides=[f"model.refiner={refiner}"])).eval()
    rows = shape_trace(model, torch.rand(2, 3, 64, 128))
    shapes = {row["stage"]: row["shape"] for row in rows}
    assert rows[0]["shape"] == "2 x 3 x 64 x 128" and rows[-1]["shape"] == "2 x 19 x 64 x 128"
    assert shapes["features after layer 4, to the head"] == "2 x 8 x 16 x 32"
    if refiner == "set":
        assert list(shapes)[1] == "into the refiner" and shapes["into the phase tokens"] == "2 x 72 x 32"  # 8 x 9 bins
