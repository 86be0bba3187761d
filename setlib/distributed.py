"""Several processes that train or score together, as `accelerate launch` starts them; one process is the plain case.

Each takes its part of a step's crops, or of a domain's pictures, and sums are taken over all of them.
"""

from __future__ import annotations

import atexit
import functools
import os
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs

if TYPE_CHECKING:
    from setlib.segmenter import Segmenter

WITHOUT_GPU = not torch.cuda.is_available()


@functools.cache
def state() -> PartialState:
    """Device and rank (`process_index`) of this process, the number of processes, and who waits for whom.

    The group is left before the process ends: one of its threads that still runs then would abort the process.
    """
    state = PartialState(cpu=WITHOUT_GPU)
    atexit.register(state.destroy_process_group)
    return state


def default_device() -> torch.device:
    """Where models run unless they are told: this process's own GPU, else the CPU."""
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


def accelerator(model: Segmenter) -> Accelerator:
    """The engine of a training.

    Raises ValueError for what the launcher was asked for and the configuration decides, and for a batch that does not
    divide among processes and parts, and there into the pairs that train.mix_layer mixes.
    """
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        raise ValueError("Give -o train.precision=bfloat16 instead of accelerate's --mixed_precision.")
    if "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED")):
        raise ValueError("Only the frozen weights are large here: start without accelerate's FSDP and DeepSpeed.")
    settings, refiner = model.experiment.train, model.refiner
    unread = max(refiner.layers, default=0) > max(model.feature_layers)  # what learns there has no gradient
    options = DistributedDataParallelKwargs(find_unused_parameters=unread or refiner.adapt is not None)
    engine = Accelerator(cpu=WITHOUT_GPU, mixed_precision="no", kwargs_handlers=[options])  # the model casts itself
    pair, mixed = (2, " x 2 that are mixed") if settings.mix and settings.mix_layer else (1, "")
    parts = engine.num_processes * settings.accumulate * pair
    if settings.batch_size % parts:
        raise ValueError(
            f"Option train.batch_size ({settings.batch_size}) must be a multiple of {parts}: "
            f"{engine.num_processes} processes x train.accumulate ({settings.accumulate}){mixed}."
        )
    return engine


def own_part(crops: list[Any]) -> list[Any]:
    """This process's part of a list with an entry for each crop of a step."""
    length = len(crops) // state().num_processes
    return crops[state().process_index * length :][:length]
