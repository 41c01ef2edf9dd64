"""Sets that torchvision downloads: with files in its format, from a local server, and without a network."""

import gzip
import hashlib
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import host.models  # noqa: F401  # repairs torchvision
from host.data.sources import load_splits
from host.data.spec import DataSpec
from host.errors import DataError

COUNTS = {"train": 30, "t10k": 10}


def idx_files() -> dict[str, bytes]:
    """A small set in MNIST's format: names and contents."""
    files = {}
    for part, count in COUNTS.items():
        pixels = np.arange(count, dtype=np.uint8).repeat(28 * 28)
        files[f"{part}-images-idx3-ubyte"] = struct.pack(">4i", 0x803, count, 28, 28) + pixels.tobytes()
        files[f"{part}-labels-idx1-ubyte"] = struct.pack(">2i", 0x801, count) + bytes(i % 10 for i in range(count))
    return files


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fieldvit" / "torchvision"


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def served(tmp_path, monkeypatch) -> Iterator[Path]:
    """Let torchvision fetch the small set from a folder behind a local server, checksums included."""
    from torchvision.datasets import MNIST

    folder = tmp_path / "served"
    folder.mkdir()
    packed = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in idx_files().items()}
    for name, content in packed.items():
        (folder / name).write_bytes(content)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, name="served")
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(
        MNIST, "resources", [(name, hashlib.md5(content).hexdigest()) for name, content in packed.items()]
    )
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


def check_small_mnist() -> None:
    splits = load_splits(DataSpec(source="torchvision:MNIST", validation_share=0.4), seed=0)
    assert (splits.channels, len(splits.train), len(splits.validation), len(splits.test)) == (1, 20, 10, 10)
    assert (splits.train.images[:, 5, 5, 0] % 10 == splits.train.labels).all()
    assert (splits.label_names[3], splits.terms) == ("3 - three", "CC BY-SA 3.0")


def test_files_in_the_cache_need_no_network(cache):
    raw = cache / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in idx_files().items():
        (raw / name).write_bytes(content)
    check_small_mnist()


def test_a_set_is_downloaded_once(cache, served, capsys):
    check_small_mnist()
    for file in served.iterdir():
        file.unlink()
    check_small_mnist()


def test_a_damaged_download_is_refused(cache, served, capsys):
    (served / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"something else"))
    with pytest.raises(DataError, match=r"torchvision:MNIST cannot be downloaded .*corrupted"):
        load_splits(DataSpec(source="torchvision:MNIST"), seed=0)


WITHOUT_NETWORK = """
from host.data.sources import load_splits
from host.data.spec import DataSpec
from host.errors import DataError
for name in ("CIFAR100", "MNIST"):
    try:
        load_splits(DataSpec(source=f"torchvision:{name}"), seed=0)
    except DataError as error:
        print(error)
"""


def test_without_a_network_one_line_says_what_to_do(tmp_path):
    closed = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment |= {**closed, "XDG_CACHE_HOME": str(tmp_path)}
    out = subprocess.check_output([sys.executable, "-c", WITHOUT_NETWORK], env=environment, text=True, timeout=120)
    lines = out.splitlines()
    assert len(lines) == 2
    for line, name in zip(lines, ("CIFAR100", "MNIST"), strict=True):
        assert line.startswith(f"torchvision:{name} cannot be downloaded (")
        assert "Connection refused" in line
        assert line.endswith(f"copy torchvision's files of {name} into {tmp_path / 'fieldvit' / 'torchvision'}")
