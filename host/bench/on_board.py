"""Measure on a board over SSH: send what is measured and the code that measures it, and take the answer."""

import ast
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from device.contract.records import to_table
from host.bench import board_job
from host.bench.board_job import BoardJob, Entry, LabeledFrames
from host.bench.contestants import Contestant
from host.bench.measure import Extent, Measured, Times
from host.errors import BenchError
from host.files import sha256_of
from host.fleet.ssh import Remote

IMAGE_BYTES = 32 << 20
"""Of test images sent for one contestant; of larger sets evenly spread images go."""
_HOST = Path(board_job.__file__).parents[1]
_MAIN = "import sys\nfrom host.bench.board_job import main\nsys.exit(main())\n"


def bench_on_board(
    contestants: Sequence[Contestant], extent: Extent, board: Remote, *, directory: Path
) -> tuple[list[Measured], float, dict[str, Any]]:
    """Measure all contestants there; returns what each showed, the seconds it took, and the machine.

    Args:
        contestants: what to measure.
        extent: how long.
        board: where; its runtime is what `fieldvit flash` installed.
        directory: for what is sent.

    Raises:
        BenchError: a file's runtime is not on boards.
        FleetError: the board cannot be reached, has no runtime, or cannot run a file.
    """
    folder = directory / "job"
    folder.mkdir()
    for contestant in contestants:
        if contestant.subject.runtime == "onnx":
            raise BenchError(f"{contestant.file}: boards have no onnxruntime; leave it out, or measure it without --on")
    files = dict(_write_job(contestants, extent, folder))
    files["bench.pyz"] = _pack(folder / "bench.pyz")
    hashes = {name: sha256_of(path) for name, path in files.items()}
    root = board.target.root
    found = board.ask("look", {"root": root, "names": []})
    board.send_all({hashes[name]: path for name, path in files.items()}, found["incoming"])
    answer = board.ask("bench", {"root": root, "files": hashes})
    return [_measured(table) for table in answer["measured"]], answer["seconds"], answer["machine"]


def _write_job(contestants: Sequence[Contestant], extent: Extent, folder: Path) -> Iterator[tuple[str, Path]]:
    entries = []
    for index, contestant in enumerate(contestants):
        subject, data = contestant.subject, ""
        file = f"{index}{subject.path.suffix}"
        yield file, subject.path
        if contestant.test:
            data = f"{index}.npz"
            _test_data(contestant).save(folder / data)
            yield data, folder / data
        spec = contestant.test[1] if contestant.test else None
        name = " ".join(filter(None, (contestant.file, contestant.artifact)))
        entries.append(Entry(name=name, runtime=subject.runtime, file=file, data=data, input=spec))
    job = BoardJob(
        entries=tuple(entries),
        queries=extent.queries,
        seconds=extent.seconds,
        num_threads=contestants[0].subject.num_threads,
    )
    (folder / "job.json").write_text(json.dumps(to_table(job)), "utf-8")
    yield "job.json", folder / "job.json"


def _test_data(contestant: Contestant) -> LabeledFrames:
    assert contestant.test
    assert contestant.subject.head
    labeled, _ = contestant.test
    most = max(1, IMAGE_BYTES // labeled.images[0].nbytes)
    chosen = np.unique(np.linspace(0, len(labeled) - 1, min(len(labeled), most)).astype(int))
    images = [np.asarray(labeled.images[int(index)]) for index in chosen]
    return LabeledFrames(images=images, labels=labeled.labels[chosen], head=contestant.subject.head)


def _pack(path: Path) -> Path:
    """The measuring code as one archive that Python runs; the same code gives the same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in {"__main__.py": _MAIN, **dict(_sources())}.items():
            archive.writestr(zipfile.ZipInfo(name), text)
    return path


def _sources() -> Iterator[tuple[str, str]]:
    """`host.bench.board_job`, the worker that it starts, and all of `host` that they import, directly or through others."""
    todo, found = ["host.bench.board_job", "host.bench.worker"], {"host", "host.bench"}
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            tree = ast.parse(_path(module).read_text("utf-8"))
            imports = (node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module)
            todo += [name for name in imports if name.startswith("host.")]
    for module in sorted(found):
        yield _path(module).relative_to(_HOST.parent).as_posix(), _path(module).read_text("utf-8")


def _path(module: str) -> Path:
    path = _HOST.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _measured(table: dict[str, Any]) -> Measured:
    times = Times(**{name: np.array(values) for name, values in table["times"].items()})
    return Measured(**{**table, "times": times})
