"""Several processes that train or score together, as `accelerate launch` starts them; one process is the plain case.

Each takes its part of a step's views, or of a domain's pictures, and sums are taken over all of them.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import sys

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, gather_object, reduce
from torch import Tensor

WITHOUT_GPU = not torch.cuda.is_available()
MALLOC = {-1: 2**31 - 1, -2: 2**28, -3: 2**25}  # bytes; from malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD


@functools.cache
def state() -> PartialState:
    """Rank (`process_index`), number of processes, and who waits for whom.

    The group is left before the process ends: one of its threads that still runs then would abort the process.
    """
    state = PartialState(cpu=WITHOUT_GPU)
    atexit.register(state.destroy_process_group)
    return state


def accelerator(some_unused: bool = False) -> Accelerator:
    """The engine of a training. some_unused: whether some weights that learn may have no gradient in a step.

    Raises ValueError for what the launcher was asked for and the configuration decides.
    """
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        raise ValueError("Give -o train.precision=bfloat16 instead of accelerate's --mixed_precision.")
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise ValueError("Only the frozen weights are large here: start without accelerate's FSDP and DeepSpeed.")
    options = DistributedDataParallelKwargs(find_unused_parameters=some_unused)
    return Accelerator(cpu=WITHOUT_GPU, mixed_precision="no", kwargs_handlers=[options])  # autocast is the model's own


def keep_freed_memory() -> None:
    """Lets the C library keep what a step on the CPU frees for the next one; given back, it would come zeroed anew."""
    if WITHOUT_GPU and sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # another C library than GNU's
            for option, value in MALLOC.items():
                ctypes.CDLL(None).mallopt(option, value)


def part(count: int) -> range:
    """This process's places of `count`: every n-th of n processes."""
    return range(state().process_index, count, state().num_processes)


def add_up(value: Tensor) -> Tensor:
    """The sum over all processes; exact for whole numbers."""
    return reduce(value, "sum")


def collect(values: list) -> list:
    """The lists of all processes as one, by rank."""
    return gather_object(values) if state().num_processes > 1 else values
