"""At length: memory stays flat, no file or process is left open, and what a dying notebook had saved is kept."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import faults
import nbformat
import pytest
from faults import SMALL, Command
from safetensors import safe_open

GROWTH = 1.02  # of resident memory, after warm-up


def state_of(process: int) -> tuple[int, int, int]:
    """Resident bytes of a process, its open files and its children."""
    resident = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return resident, len(os.listdir(f"/proc/{process}/fd")), len(children)


def min_state(command: Command) -> tuple[int, ...]:
    """The least of a few looks, a moment apart: a checkpoint may just be open."""
    looks = [state_of(command.process.pid)]
    for _ in range(4):
        command.wait(0.05)
        looks.append(state_of(command.process.pid))
    return tuple(map(min, zip(*looks, strict=True)))


def evaluate_often(times: int) -> None:
    """Scores a run's model over and over, in this process, and says after each that it did."""
    import setlib

    run = setlib.Run.load("run")
    model = setlib.load_segmenter(run.path)
    for number in range(times):
        setlib.evaluate_run(run, {"model": model}, run.experiment.data.targets)
        print(f"scored {number + 1} times", flush=True)


def watch(command: Command, warm: str, end: str) -> tuple[tuple[int, int, int], ...]:
    """The state of a process when it is warm and shortly before it ends."""
    command.wait_for(warm)
    first = state_of(command.process.pid)
    command.wait_for(end)
    last = state_of(command.process.pid)
    command.kill(signal.SIGINT)
    assert command.wait() is not None
    return first, last


@pytest.mark.reliability
@pytest.mark.parametrize("options", [("train.views=8",), ("train.views=0", "data.workers=1")], ids=["kept", "worker"])
def test_5000_steps_leave_memory_files_and_processes_as_they_were(tmp_path, options):
    source = faults.make_domain(tmp_path / "domain")
    steps = 5000
    words = ["train", "--profile", "smoke", "--run", "run", "--source", source, "--target", source, "-o", *SMALL]
    words += [f"train.steps={steps + 500}", "train.checkpoint_every=100", *options]
    command = Command(tmp_path, *words)
    history = tmp_path / "run" / "history.jsonl"

    def steps_done() -> int:
        return len(history.read_bytes().splitlines()) if history.is_file() else 0

    states = []
    for number in (500, steps):
        while steps_done() < number and command.wait(0.2) is None:
            pass
        states.append(min_state(command))
    assert command.end() == 0
    (memory, files, children), last = states
    assert last[0] < GROWTH * memory and last[1:] == (files, children), states


@pytest.mark.reliability
def test_200_evaluations_leave_memory_and_files_as_they_were(trained, tmp_path):
    faults.shutil.copytree(trained.path, tmp_path / "run")
    command = Command(tmp_path, "backbones", prepare=partial(evaluate_often, 201))
    first, last = watch(command, "scored 20 times", "scored 200 times")
    assert last[0] < GROWTH * first[0] and last[1:] == first[1:], (first, last)


def leave_own_notebooks() -> None:
    """In a process of its own: the notebooks of its folder in place of the project's."""
    from setlib.workbook import notebooks

    notebooks.NOTEBOOKS = Path("nb").absolute()


PARAMETERS = (
    'PROFILE: str = ""\nRUN: str = ""\nSOURCE: str = ""\nTARGETS: list = []\nSEED: int = 0\nOVERRIDES: list = []'
)
WAIT = "import os, pathlib, time\npathlib.Path('kernel').write_text(str(os.getpid()))\ntime.sleep(100)"
TRAIN = """import setlib
steps = "train.steps=20000", "train.checkpoint_every=20000"
setlib.train(setlib.Run.open("trained", setlib.Experiment.build("smoke", overrides=steps)))"""
LAST = {
    "dies": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "starves": "memory = bytearray(2**60)",
    "waits": WAIT,
    "trains": TRAIN,
}


def write_notebooks(folder: Path, last: str) -> list[str]:
    """A notebook that ends and one that does not; the words that run them."""
    (folder / "nb").mkdir()
    first = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for name, code in (("01_a", "1 + 1"), ("02_b", LAST[last])):
        cells = [nbformat.v4.new_markdown_cell("# What?"), first, nbformat.v4.new_code_cell(code)]
        nbformat.write(
            nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / f"nb/{name}.ipynb"
        )
    return ["run", "--profile", "smoke", "--run", "run"]


def test_a_notebook_whose_kernel_dies_is_named_with_what_is_saved(tmp_path):
    words = write_notebooks(tmp_path, "dies")
    stopped = Command(tmp_path, *words, prepare=leave_own_notebooks)  # a kernel that ends may complain of its sockets
    assert stopped.wait() == 1 and "Notebook 02_b.ipynb stopped: its process was killed" in stopped.error
    assert "run is kept, 01_a" in stopped.error
    assert [path.name for path in (tmp_path / "run" / "notebooks").iterdir()] == ["01_a.ipynb"]


def test_a_notebook_without_memory_names_the_setting_to_lower(tmp_path):
    words = write_notebooks(tmp_path, "starves")
    stopped = Command(tmp_path, *words, prepare=leave_own_notebooks)  # a kernel that ends may complain of its sockets
    assert stopped.wait() == 1 and "02_b.ipynb stopped in cell" in stopped.error
    assert "Out of memory: lower" in stopped.error and "train.batch_size" in stopped.error


@pytest.mark.reliability
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_training_in_a_notebook_ends_its_step_and_is_saved(tmp_path, kind):
    words = write_notebooks(tmp_path, "trains")
    command = Command(tmp_path, *words, prepare=leave_own_notebooks)
    command.wait_for(", loss=")
    command.kill(kind)
    assert command.wait(20) == 130 and "python -m setlib run --profile smoke --run run" in command.error
    assert "DeadKernelError" not in command.output
    with safe_open(tmp_path / "trained" / "checkpoint.safetensors", "np") as saved:
        assert int(saved.metadata()["step"]) > 0


@pytest.mark.reliability
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_kernel_outlives_its_run(tmp_path, kind):
    words = write_notebooks(tmp_path, "waits")
    command = Command(tmp_path, *words, prepare=leave_own_notebooks)
    command.wait_for_file(tmp_path / "kernel")
    time.sleep(0.3)
    second = faults.run(tmp_path, *words, prepare=leave_own_notebooks)
    assert second.wait() == 2 and f"run is in use by process {command.process.pid}" in second.error
    command.kill(kind)
    assert command.wait(20) == (-kind if kind == signal.SIGKILL else 130), command.output
    assert kind == signal.SIGKILL or "python -m setlib run --profile smoke --run run" in command.error
    kernel = Path("/proc") / (tmp_path / "kernel").read_text()
    for _ in range(100):
        if not kernel.exists():
            break
        time.sleep(0.1)
    assert not kernel.exists()
    faults.check_whole(tmp_path / "run")
