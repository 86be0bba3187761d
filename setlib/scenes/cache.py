"""Rendered scenes on disk: PNG files that are made when they are first asked for, by several processes at once."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from setlib.files import LOCK, PROJECT, alone, load_json, write_atomic
from setlib.scenes.render import VERSION, render_scene

WORKER = """
import json, sys
from setlib.scenes.cache import store
for index in store(*json.loads(sys.argv[1])):
    print(index, flush=True)
"""


def cached_scenes(
    folder: Path, style: str, indices: Sequence[int], seed: int, size: tuple[int, int]
) -> list[tuple[Path, Path, str]]:
    """Renders the missing scenes of one style to PNG files; safe to kill and to call again.

    Files: images/<style>/<index:05d>.png, labels/<index:05d>.png (shared by the styles), scenes.json (seed, size).
    Returns (image path, label path, name) per index.
    Raises ValueError if the folder holds scenes of another seed, size or version, or cannot be written.
    """
    notes, content = folder / "scenes.json", {"seed": seed, "size": list(size), "version": VERSION}
    if not notes.exists():
        with alone(folder / LOCK):
            if not notes.exists():  # nor does it meanwhile
                write_atomic(notes, json.dumps(content))
    if (held := load_json(notes)) != content:
        cure = f"name another folder or delete the folder {folder}"
        raise ValueError(f"{folder} holds rendered scenes of {held}, asked for {content}; {cure}")
    paths = {index: _paths(folder, style, index) for index in indices}
    missing = [index for index, pair in paths.items() if not all(path.exists() for path in pair)]
    with tqdm(total=len(missing), desc=f"render {style}", unit="scene", disable=not missing) as bar:
        workers = min(os.cpu_count() or 1, len(missing) // 8)  # one that has few scenes does not pay
        if workers > 1:
            shares = [missing[k::workers] for k in range(workers)]
            _run_workers([[str(folder.absolute()), style, share, seed, size] for share in shares], bar)
        bar.reset()
        for _ in store(folder, style, missing, seed, size):  # what a worker could not do is done here, and says why
            bar.update()
    return [(*paths[index], f"{style}/{index:05d}") for index in indices]


def _paths(folder: Path, style: str, index: int) -> tuple[Path, Path]:
    """Where the image and the label of a scene lie."""
    return folder / f"images/{style}/{index:05d}.png", folder / f"labels/{index:05d}.png"


def store(folder: Path | str, style: str, indices: Sequence[int], seed: int, size: Sequence[int]) -> Iterator[int]:
    """Renders scenes to files where their image or label is missing; yields each index when its files are there."""
    for index in indices:
        missing = [path for path in _paths(Path(folder), style, index) if not path.exists()]
        scene = render_scene(seed, index, style, tuple(size)) if missing else None
        for path in missing:
            pixels = scene.label if path.parent.name == "labels" else scene.image
            Image.fromarray(pixels).save(file := io.BytesIO(), format="PNG", compress_level=4)
            write_atomic(path, file.getvalue())
        yield index


def _run_workers(parts: list[list], bar: tqdm):
    """Stores each part in a fresh Python of one thread; all print to one pipe, a line for each scene.

    Not multiprocessing: its workers run the caller's script again unless that is guarded.
    """
    reading, writing = os.pipe()
    streams = {"stdin": subprocess.DEVNULL, "stdout": writing, "stderr": subprocess.DEVNULL}
    place = {"cwd": PROJECT, "env": os.environ | {"OMP_NUM_THREADS": "1"}}  # there setlib is found without a path
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, json.dumps(part)], **streams, **place) for part in parts]
    os.close(writing)
    try:
        with os.fdopen(reading) as lines:
            for _ in lines:
                bar.update()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
