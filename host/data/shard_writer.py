"""Write images as tar shards that `host.data.shards`, and webdataset, read: for photos on a slow or networked disk."""

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from host.data.shards import CLASSES_FILE
from host.data.splits import Chosen, Images, LabeledImages
from host.errors import DataError

_KIND = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


def write_shards(
    images: LabeledImages,
    label_names: Sequence[str],
    folder: Path,
    images_per_shard: int = 1000,
    *,
    part: str = "train",
) -> list[Path]:
    """Write images in their order to `folder/PART-000000.tar`, ..., and the names of the classes beside them.

    Files that are JPEG, PNG or WebP are copied byte for byte; everything else becomes PNG. Shuffle first: images that
    are read together later lie in one shard. The folder appears when it is complete; equal images give equal bytes.

    Args:
        images: of any source.
        label_names: what the labels index.
        folder: must not exist.
        images_per_shard: a shard may have fewer, when it reaches 3 GB.
        part: which split it is: train, val or test. Splits go to folders of their own.

    Returns:
        The shards.

    Raises:
        DataError: the folder exists, or webdataset is not installed.
    """
    if folder.exists():
        raise DataError(f"{folder}: there is such a folder already; name a new one, or remove it")
    try:
        from webdataset import ShardWriter  # only whoever writes shards needs it
    except ImportError as error:
        raise DataError("writing shards needs webdataset; install it with: pip install webdataset") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
        unfinished = Path(work).absolute() / folder.name
        unfinished.mkdir()
        pattern = f"{unfinished}/{part}-".replace("%", "%%") + "%06d.tar"
        with ShardWriter(pattern, maxcount=images_per_shard, verbose=0, mtime=0) as writer:
            for index, label in enumerate(images.labels.tolist()):
                kind, content = _file(images.images, index)
                writer.write({"__key__": f"{index:09d}", kind: content, "cls": label})
        (unfinished / CLASSES_FILE).write_text("".join(f"{name}\n" for name in label_names), encoding="utf-8")
        unfinished.rename(folder)
    return sorted(folder.glob("*.tar"))


def _file(images: Images, index: int) -> tuple[str, bytes]:
    """An image as a file, and its extension."""
    if isinstance(images, Chosen):
        return _file(images.images, int(images.indices[index]))
    if not isinstance(images, np.ndarray):
        content = images.encoded(index)
        with Image.open(io.BytesIO(content)) as picture:
            kind = _KIND.get(picture.format or "")
        if kind:
            return kind, content
    buffer = io.BytesIO()
    image = images[index]
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, "PNG")
    return "png", buffer.getvalue()
