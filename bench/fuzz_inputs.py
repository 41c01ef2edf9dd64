"""Inputs that are almost right: values of JSON or TOML changed in their structure, and bytes changed after that. Seeded."""

import json
import random
from collections.abc import Callable
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308, -1e308, 5e-324),
    *(
        "",
        " ",
        "\0",
        "\ud800",
        "a" * 10_000,
        "1e999",
        "NaN",
        "../../etc/passwd",
        "%s%n",
        "\U0001f4f7",
        "fieldvit/v1/#",
        "ß\n",
    ),
    *([], {}, [[]], [{}], {"": ""}, {"schema": 1}, [None] * 1000),
)
TOKENS = (
    b"NaN",
    b"Infinity",
    b"-",
    b"1e999",
    b"{",
    b"[" * 2000,
    b'"',
    b"\\u0000",
    b"\xff",
    b"\xed\xa0\x80",
    b"\n",
    b"\0",
    b",",
    b"#",
)


def mutate_value(value: Any, rng: random.Random) -> Any:
    """A copy with one to four changes somewhere inside."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = _change(value, rng, depth=0)
    return value


def _change(value: Any, rng: random.Random, *, depth: int) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        return _change_table(value, rng, depth)
    if isinstance(value, list) and value and rng.random() < 0.9:
        return _change_list(value, rng, depth)
    if depth == 0:
        return value if rng.random() < 0.9 else rng.choice(ODD_VALUES)
    return _odd(value, rng)


def _change_table(table: dict[str, Any], rng: random.Random, depth: int) -> dict[str, Any]:
    name = rng.choice(list(table))
    changed = dict(table)
    match rng.randrange(6):
        case 0:
            del changed[name]
        case 1:
            changed[rng.choice(("", "id", "schema", "x_", name.upper(), name * 50, "\ud800"))] = rng.choice(ODD_VALUES)
        case 2:
            changed[name] = rng.choice(list(table.values()))
        case _:
            changed[name] = _change(table[name], rng, depth=depth + 1)
    return changed


def _change_list(values: list[Any], rng: random.Random, depth: int) -> list[Any]:
    place = rng.randrange(len(values))
    changed = list(values)
    match rng.randrange(6):
        case 0:
            del changed[place]
        case 1:
            changed[place:place] = [changed[place]] * rng.choice((1, 2, 500))
        case 2:
            rng.shuffle(changed)
        case _:
            changed[place] = _change(values[place], rng, depth=depth + 1)
    return changed


def _odd(value: Any, rng: random.Random) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.4:
        return rng.choice((-value, value + 1, value * 10**30, str(value), [value]))
    if isinstance(value, str) and rng.random() < 0.4:
        return rng.choice((value + "\0", value[:-1], value * 300, value.upper(), ascii(value)))
    return rng.choice(ODD_VALUES)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bits turned, parts cut out, doubled or replaced by what parsers dislike."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(changed) + 1)
        match rng.randrange(6):
            case 0 if changed:
                changed[place % len(changed)] ^= 1 << rng.randrange(8)
            case 1:
                del changed[place : place + rng.choice((1, 2, 10, 1000))]
            case 2:
                changed[place:place] = changed[place : place + rng.choice((1, 20, 200))]
            case 3:
                changed[place:place] = rng.choice(TOKENS)
            case 4:
                del changed[place:]
            case _:
                changed[place:place] = rng.randbytes(rng.choice((1, 4, 64)))
    return bytes(changed)


def json_inputs(seeds: list[Any], rng: random.Random) -> Callable[[], bytes]:
    """A source of payloads made of these values: six in ten changed in structure, two in both structure and bytes, one in
    bytes alone; of the rest, half are noise and half intact.
    """

    def make() -> bytes:
        kind = rng.random()
        if kind < 0.05:
            return rng.randbytes(rng.choice((0, 1, 10, 500)))
        value = rng.choice(seeds)
        if kind < 0.85:
            value = mutate_value(value, rng)
        text = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        return mutate_bytes(text, rng) if 0.65 < kind < 0.95 else text

    return make


def text_inputs(seeds: list[str], rng: random.Random) -> Callable[[], bytes]:
    """A source of TOML files: lines changed, moved, doubled or dropped, values replaced, bytes changed."""

    def make() -> bytes:
        lines = rng.choice(seeds).splitlines()
        for _ in range(rng.choice((1, 1, 2, 4))):
            place = rng.randrange(len(lines) + 1)
            match rng.randrange(5):
                case 0 if place < len(lines):
                    del lines[place]
                case 1 if place < len(lines):
                    lines.insert(rng.randrange(len(lines) + 1), lines[place])
                case 2:
                    lines.insert(
                        place, rng.choice(("[", "[broker]", "[[source]]", "x = 1", "a.b = 2", "= 1", "site = []"))
                    )
                case _ if place < len(lines) and "=" in lines[place]:
                    lines[place] = f"{lines[place].partition('=')[0]}= {toml_value(rng)}"
        data = "\n".join(lines).encode("utf-8", "surrogatepass")
        return mutate_bytes(data, rng) if rng.random() < 0.4 else data

    return make


def toml_value(rng: random.Random) -> str:
    """A value as TOML writes it, of any type and often out of range."""
    texts = (
        "inf",
        "nan",
        "-1",
        "0",
        "1e308",
        str(10**30),
        "true",
        "[]",
        "{}",
        '""',
        "1979-05-27",
        "[1, 'a']",
        "'''x'''",
    )
    if rng.random() < 0.7:
        return rng.choice(texts)
    value = rng.choice([value for value in ODD_VALUES if isinstance(value, str | int | float)])
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value).lower()
