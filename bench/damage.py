"""Ways to damage a bundle: on its way to the board, or before it is signed.

A mutation takes a sound bundle and a random generator and returns the damaged file's bytes. Those of `BEFORE_SIGNING` whose
subject is what a file holds (weights, head, golden outputs, manifest) write a manifest that fits, so that hashes and
signatures are right and only what the board does with the file can tell.
"""

import copy
import io
import json
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from device.contract.manifest import MANIFEST_NAME
from tests.support.tiny_bundle import make_manifest

Rng = np.random.Generator
HEAD, GOLDEN, LABELS = "head.npz", "golden.npz", "labels.txt"
MODELS = ("model.int8.tflite", "model.float32.tflite")


@dataclass(frozen=True, slots=True)
class Sound:
    """A sound bundle of release 2: its bytes, and the files in it but for the manifest. `other`: another sound bundle."""

    bundle: bytes
    files: Mapping[str, bytes]
    other: bytes

    def pack(self, changed: Mapping[str, bytes], **manifest: Any) -> bytes:
        """The bundle with other files, and the manifest that fits them."""
        files = {**self.files, **changed}
        return pack({MANIFEST_NAME: make_manifest(files, release=2, **manifest).to_json().encode(), **files})

    def table(self) -> dict[str, Any]:
        """The manifest, to be changed."""
        return json.loads(make_manifest(self.files, release=2).to_json())

    def with_table(self, table: Any) -> bytes:
        text = table if isinstance(table, bytes) else json.dumps(table).encode()
        return pack({MANIFEST_NAME: text, **self.files})


Mutation = Callable[[Sound, Rng], bytes]


def pack(files: Mapping[str, bytes] | list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of these members, in their order; names may come twice."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items() if isinstance(files, Mapping) else files:
            archive.NameToInfo.pop(name, None)  # else a second member of the name is warned of
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            archive.writestr(info, content)
    return buffer.getvalue()


# ---- bytes, whatever they mean


def bit_flip(content: bytes, rng: Rng) -> bytes:
    return flip_bits(content, rng, 1)


def flip_bits(content: bytes, rng: Rng, count: int) -> bytes:
    array = np.frombuffer(content, np.uint8).copy()
    for position in rng.integers(0, len(array), count):
        array[position] ^= 1 << rng.integers(8)
    return array.tobytes()


def some_bits(content: bytes, rng: Rng) -> bytes:
    return flip_bits(content, rng, int(rng.integers(2, 65)))


def truncated(content: bytes, rng: Rng) -> bytes:
    return content[: rng.integers(0, len(content))]


def extended(content: bytes, rng: Rng) -> bytes:
    return content + rng.bytes(int(rng.integers(1, 5000)))


def zeroed_block(content: bytes, rng: Rng) -> bytes:
    """What a flash block that was never written reads as."""
    size = min(int(rng.choice([512, 4096])), len(content) // 2)
    start = int(rng.integers(0, len(content) - size))
    return content[:start] + bytes(size) + content[start + size :]


def shuffled_blocks(content: bytes, rng: Rng) -> bytes:
    """The right blocks in another order."""
    size = min(512, max(len(content) // 4, 1))
    blocks = [content[start : start + size] for start in range(0, len(content), size)]
    one, other = rng.choice(len(blocks), 2, replace=False)
    blocks[one], blocks[other] = blocks[other], blocks[one]
    return b"".join(blocks)


def noise(content: bytes, rng: Rng) -> bytes:
    return rng.bytes(len(content))


def _any(content: bytes, rng: Rng) -> bytes:
    kinds = (bit_flip, some_bits, truncated, extended, zeroed_block, shuffled_blocks, noise)
    return kinds[rng.integers(len(kinds))](content, rng)


# ---- the zip


def unsafe_path(sound: Sound, rng: Rng) -> bytes:
    """A file that would be written outside of its slot, or nowhere, listed in the manifest as it should be."""
    names = [
        "../evil", "../../root.json", "/etc/evil", "//evil", "a/../../evil", "..\\evil", "\\evil", "C:\\evil", "C:evil",
        "a/./b", "./a", "a//b", "a/", ".", "..", "", " ", "nul", "CON.txt", "com1", "a/LPT9.bin", "evil.", "evil ",
        "a\0b", "a\nb", "\x1b[2J", "a" * 300, "/".join("d" * 200), "head.npz/evil", "HEAD.NPZ", "a:b", "a*", "a?", "a|b",
        "labels.txt\0.exe", "\ud800", "caf\u00e9/../../x", "~/../..", "manifest.json/x", "MANIFEST.JSON",
    ]  # fmt: skip
    name = names[rng.integers(len(names))]
    table = sound.table()
    table["files"][name] = table["files"][LABELS]
    members = {MANIFEST_NAME: json.dumps(table).encode(), **sound.files}
    placeholder = "P" * max(len(name.encode(errors="replace")), 1)
    content = pack({**members, placeholder: sound.files[LABELS]})
    return content.replace(placeholder.encode(), name.encode(errors="replace") or b"P")


def link(sound: Sound, rng: Rng) -> bytes:
    """One member is a symbolic link, a directory or a device by its mode."""
    kind = int(rng.choice([0o120000, 0o040000, 0o060000, 0o020000, 0o010000, 0o140000]))
    buffer = io.BytesIO()
    names = [MANIFEST_NAME, *sound.files]
    chosen = names[rng.integers(len(names))]
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in [(MANIFEST_NAME, json.dumps(sound.table()).encode()), *sound.files.items()]:
            info = zipfile.ZipInfo(name)
            info.external_attr = ((kind if name == chosen else 0o100000) | 0o644) << 16
            archive.writestr(info, content)
    return buffer.getvalue()


def duplicate(sound: Sound, rng: Rng) -> bytes:
    """Two members of one name: which of them counts?"""
    members = [(MANIFEST_NAME, json.dumps(sound.table()).encode()), *sound.files.items()]
    name, content = members[rng.integers(len(members))]
    other = (name, content if rng.random() < 0.3 else bit_flip(content, rng))
    members.insert(int(rng.integers(len(members) + 1)), other)
    return pack(members)


def bomb(sound: Sound, rng: Rng) -> bytes:
    """Much from little: compressed members, sizes that are claimed, arrays that are declared."""
    kind = int(rng.integers(5))
    if kind == 0:
        method = int(rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
        return pack({MANIFEST_NAME: json.dumps(sound.table()).encode(), **sound.files, "zeros": bytes(4 << 20)}, method)
    if kind == 1:  # every size in the zip grows
        size = int(rng.choice([1 << 30, (1 << 32) - 2]))
        content = bytearray(sound.bundle)
        for start in _starts(sound.bundle, b"PK\1\2"):
            struct.pack_into("<2L", content, start + 20, size, size)
        return bytes(content)
    if kind == 2:  # a bomb inside a listed file
        return sound.pack(
            {HEAD if rng.random() < 0.5 else GOLDEN: pack({"zeros.npy": bytes(8 << 20)}, zipfile.ZIP_DEFLATED)}
        )
    if kind == 3:  # an array as large as it says
        shape = [(1 << 40,), (1 << 31, 1 << 31), (-1,), (1 << 62,)][rng.integers(4)]
        name = HEAD if rng.random() < 0.5 else GOLDEN
        return sound.pack({name: _declare(sound.files[name], rng, shape)})
    table = sound.table()
    table["provenance"] = {"x": "y" * (5 << 20)}
    return sound.with_table(table)


def two_headers(sound: Sound, rng: Rng) -> bytes:
    """The directory at the end and the headers in front of the members say different things."""
    content = bytearray(sound.bundle)
    magic, fields = ((b"PK\1\2", range(4, 46)), (b"PK\3\4", range(4, 30)))[rng.integers(2)]
    starts = _starts(sound.bundle, magic)
    start = starts[rng.integers(len(starts))]
    content[start + int(rng.choice(list(fields)))] ^= int(rng.integers(1, 256))
    return bytes(content)


def polyglot(sound: Sound, rng: Rng) -> bytes:
    """Bytes that belong to no member: before, between, behind, or as a comment; two zips in one file."""
    content, junk = sound.bundle, rng.bytes(int(rng.integers(1, 400)))
    kind = int(rng.integers(5))
    if kind == 0:
        return junk + content
    if kind == 1:
        return content + junk
    if kind == 2:
        return content[:-2] + struct.pack("<H", len(junk)) + junk
    if kind == 3:
        return sound.other + content if rng.random() < 0.5 else content + sound.other
    starts = _starts(content, b"PK\3\4")
    start = starts[rng.integers(len(starts))]
    return content[:start] + junk + content[start:]


def _starts(content: bytes, magic: bytes) -> list[int]:
    found, position = [], content.find(magic)
    while position >= 0:
        found.append(position)
        position = content.find(magic, position + 4)
    return found


def _declare(npz: bytes, rng: Rng, shape: tuple[int, ...]) -> bytes:
    """One array of an .npz says another shape."""
    with zipfile.ZipFile(io.BytesIO(npz)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = list(members)[rng.integers(len(members))]
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    members[name] = header.getvalue() + bytes(64)
    return pack(members)


# ---- the manifest


def manifest_value(sound: Sound, rng: Rng) -> bytes:
    """One value of the manifest is another, of whatever type."""
    table = sound.table()
    places = list(_places(table))
    holder, key = places[rng.integers(len(places))]
    odd: list[Any] = [
        None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, -0.0, 0.5, 1e308, 1e-308, "", "x", "../x", "\ud800", "a\nb", "9" * 5000,
        [], {}, [1], {"a": 1}, [[]], "int8", "float32", holder[key], [holder[key]], {"x": holder[key]},
    ]  # fmt: skip
    holder[key] = odd[rng.integers(len(odd))]
    return sound.with_table(table)


def manifest_key(sound: Sound, rng: Rng) -> bytes:
    """A key is missing, is new, or has another name."""
    table = sound.table()
    places = [(holder, key) for holder, key in _places(table) if isinstance(holder, dict)]
    holder, key = places[rng.integers(len(places))]
    kind = int(rng.integers(3))
    value = holder[key] if kind == 1 else holder.pop(key)
    if kind:
        holder[str(key)[::-1] or "x"] = value
    return sound.with_table(table)


def manifest_text(sound: Sound, rng: Rng) -> bytes:
    """The manifest's text is no longer the JSON that it was."""
    text = json.dumps(sound.table(), indent=1).encode()
    kind = int(rng.integers(7))
    if kind == 0:
        return sound.with_table(b"[" * int(rng.integers(1, 100_000)))
    if kind == 1:
        odd = [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"1" * 5000, b"{}" * 3][rng.integers(6)]
        return sound.with_table(text.replace(b"0.001", odd).replace(b"1.0,", odd + b",", 1))
    if kind == 2:
        return sound.with_table(text.decode().encode(["utf-16", "utf-32", "utf-8-sig"][rng.integers(3)]))
    if kind == 3:
        depth = int(rng.integers(10, 5000))
        return sound.with_table(
            text.replace(b'"provenance": {}', b'"provenance": {"a":' + b"[" * depth + b"]" * depth + b"}")
        )
    if kind == 4:  # a key comes twice: the last counts
        return sound.with_table(text.replace(b'"release": 2', b'"release": 2, "release": 1'))
    return sound.with_table(_any(text, rng))


def golden_tolerance(sound: Sound, rng: Rng) -> bytes:
    """The manifest allows whatever the damaged model answers."""
    table = sound.table()
    for artifact in table["artifacts"]:
        artifact["golden_tolerance"] = float(rng.choice([1e9, 1.0, 0.6, -1.0, 0.0]))
    damaged = _model(sound, rng)
    fits = {**sound.files, **damaged}
    table["files"] = json.loads(make_manifest(fits, release=2).to_json())["files"]
    return pack({MANIFEST_NAME: json.dumps(table).encode(), **fits})


def input_record(sound: Sound, rng: Rng) -> bytes:
    """Another pre-processing than the model was trained with."""
    table = sound.table()
    spec = table["input"]
    kind = int(rng.integers(5))
    if kind == 0:
        spec["mean"] = [float(rng.normal(0.5, 0.3))]
    elif kind == 1:
        spec["std"] = [float(rng.uniform(0.05, 3))]
    elif kind == 2:
        spec["height"], spec["width"] = (int(value) for value in rng.integers(1, 4000, 2))
    elif kind == 3:
        spec["channels"], spec["mean"], spec["std"] = 3, [0.5] * 3, [0.5] * 3
    else:
        spec[["layout", "dtype", "interpolation"][rng.integers(3)]] = ["NCHW", "uint8", "nearest"][rng.integers(3)]
    return sound.with_table(table)


def labels(sound: Sound, rng: Rng) -> bytes:
    """Labels are exchanged, missing, too many, twice or unprintable, in the manifest or beside it."""
    table = sound.table()
    names: list[str] = table["labels"]
    kind = int(rng.integers(6))
    if kind == 0:
        one, other = rng.choice(len(names), 2, replace=False)
        names[one], names[other] = names[other], names[one]
    elif kind == 1:
        names.pop()
    elif kind == 2:
        names.append("fifth")
    elif kind == 3:
        names[0] = names[1]
    elif kind == 4:
        names[0] = ["", "a\nb", "\x00", "\ud800", "\u202e"][rng.integers(5)]
    else:
        return sound.pack({LABELS: _any(sound.files[LABELS], rng)})
    return sound.with_table(table)


def _places(table: Any) -> Any:
    for key in list(table) if isinstance(table, dict) else range(len(table)):
        yield table, key
        if isinstance(table[key], dict | list):
            yield from _places(table[key])


# ---- model, head and golden outputs, with a manifest that fits


def weights(sound: Sound, rng: Rng) -> bytes:
    """The model's constants change by much or by little; its structure does not."""
    return sound.pack(_model(sound, rng))


def _model(sound: Sound, rng: Rng) -> dict[str, bytes]:
    model = bytearray(sound.files[MODELS[0]])
    spans = constants(bytes(model))
    start, size = spans[rng.integers(len(spans))]
    words = np.frombuffer(model, "<f4", count=size // 4, offset=start)  # a view: `model` changes with it
    kind = int(rng.integers(6))
    if kind == 0:
        words[:] = words[::-1].copy()
    elif kind == 1:
        words *= np.float32(rng.choice([-1, 0, 0.5, 1.01, 2, 1e6]))
    elif kind == 2:
        words[rng.integers(len(words))] = np.float32(rng.choice([np.nan, np.inf, 1e30, -1e30, 0]))
    elif kind == 3:
        words += rng.normal(0, float(rng.choice([1e-6, 1e-3, 0.1, 10])), len(words)).astype(np.float32)
    elif kind == 4:
        words[:] = rng.permutation(words)
    else:
        model[start : start + size] = flip_bits(bytes(model[start : start + size]), rng, int(rng.integers(1, 9)))
    return dict.fromkeys(MODELS, bytes(model))


def constants(model: bytes) -> list[tuple[int, int]]:
    """Where the float constants of a TFLite file lie, as (start, bytes)."""
    from ai_edge_litert.tools import flatbuffer_utils

    found = []
    for buffer in flatbuffer_utils.convert_bytearray_to_object(bytearray(model)).buffers:
        data = bytes(bytearray(buffer.data)) if buffer.data is not None else b""
        if len(data) >= 64 and len(data) % 4 == 0 and (start := model.find(data)) >= 0:
            found.append((start, len(data)))
    return found


def model_file(sound: Sound, rng: Rng) -> bytes:
    """Anything in the model's file changes."""
    return sound.pack(dict.fromkeys(MODELS, _any(sound.files[MODELS[0]], rng)))


def head_arrays(sound: Sound, rng: Rng) -> bytes:
    return sound.pack({HEAD: _change_array(sound.files[HEAD], rng)})


def head_file(sound: Sound, rng: Rng) -> bytes:
    return sound.pack({HEAD: _any(sound.files[HEAD], rng)})


def golden_arrays(sound: Sound, rng: Rng) -> bytes:
    return sound.pack({GOLDEN: _change_array(sound.files[GOLDEN], rng)})


def golden_file(sound: Sound, rng: Rng) -> bytes:
    return sound.pack({GOLDEN: _any(sound.files[GOLDEN], rng)})


def golden_agrees_with_damage(sound: Sound, rng: Rng) -> bytes:
    """Model and golden outputs are damaged both; golden so that it seems to agree with anything."""
    arrays = _arrays(sound.files[GOLDEN])
    for name in [name for name in arrays if "/" in name]:
        kind = int(rng.integers(4))
        value = np.float32(rng.choice([np.nan, np.inf, 1e30]))
        arrays[name] = [np.full_like(arrays[name], value), arrays[name][:0], arrays[name][:1], arrays[name] * value][
            kind
        ]
    if rng.random() < 0.3:
        arrays["frames"] = arrays["frames"][: rng.integers(0, 2)]
    return sound.pack({**_model(sound, rng), GOLDEN: _npz(arrays)})


def swapped_files(sound: Sound, rng: Rng) -> bytes:
    """Files under each other's names, listed as they are."""
    names = [*sound.files]
    one, other = (names[index] for index in rng.choice(len(names), 2, replace=False))
    return sound.pack({one: sound.files[other], other: sound.files[one]})


def _change_array(npz: bytes, rng: Rng) -> bytes:
    arrays = _arrays(npz)
    name = list(arrays)[rng.integers(len(arrays))]
    array = arrays[name]
    changes: list[Callable[[], np.ndarray]] = [
        lambda: array[::-1],
        lambda: array[:0],
        lambda: array[: len(array) // 2],
        lambda: np.concatenate([array, array]),
        lambda: array.reshape(-1),
        lambda: array[None],
        lambda: np.zeros_like(array),
        lambda: (array * 2).astype(array.dtype),
        lambda: array.astype(np.float64) * -1,
        lambda: array.astype(np.int32),
        lambda: array.astype(np.complex64),
        lambda: array.astype("U8"),
        lambda: np.full(array.shape, np.nan),
        lambda: np.full(array.shape, np.inf, np.float32),
        lambda: np.full(array.shape, 1e300),
        lambda: array + rng.normal(0, float(rng.choice([1e-6, 1e-2, 1, 100])), array.shape).astype(np.float32),
        lambda: np.array(3.0),
        lambda: _bits(array, rng),
    ]
    kind = int(rng.integers(len(changes) + 2))
    if kind < len(changes):
        arrays[name] = changes[kind]()
    else:
        arrays.pop(name)
    if kind == len(changes):
        arrays[name[::-1]] = array
    return _npz(arrays)


def _bits(array: np.ndarray, rng: Rng) -> np.ndarray:
    return np.frombuffer(flip_bits(array.tobytes(), rng, int(rng.integers(1, 9))), array.dtype).reshape(array.shape)


def _arrays(npz: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(npz)) as arrays:
        return copy.deepcopy(dict(arrays))


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _of_bundle(change: Callable[[bytes, Rng], bytes]) -> Mutation:
    return lambda sound, rng: change(sound.bundle, rng)


ON_THE_WAY: dict[str, Mutation] = {
    "one bit": _of_bundle(bit_flip),
    "some bits": _of_bundle(some_bits),
    "cut off": _of_bundle(truncated),
    "longer": _of_bundle(extended),
    "a block of zeros": _of_bundle(zeroed_block),
    "blocks out of order": _of_bundle(shuffled_blocks),
    "noise": _of_bundle(noise),
    "another signed bundle": lambda sound, rng: sound.other,
}
"""Damage to the bundle behind its signature."""
BEFORE_SIGNING: dict[str, Mutation] = {
    "any bytes of the bundle": _of_bundle(_any),
    "unsafe path": unsafe_path,
    "link or device": link,
    "duplicate name": duplicate,
    "bomb": bomb,
    "headers disagree": two_headers,
    "bytes of no file": polyglot,
    "manifest value": manifest_value,
    "manifest key": manifest_key,
    "manifest text": manifest_text,
    "golden tolerance": golden_tolerance,
    "input record": input_record,
    "labels": labels,
    "weights": weights,
    "model file": model_file,
    "head arrays": head_arrays,
    "head file": head_file,
    "golden arrays": golden_arrays,
    "golden file": golden_file,
    "golden that agrees": golden_agrees_with_damage,
    "swapped files": swapped_files,
}
"""Damage that is signed for."""
