"""The table of conversions: what passes, and that its jobs are all different."""

import pytest

from bench.conversion_matrix import COREML, TFLITE, Cell, _verdict, list_jobs
from bench.family_parity import FULL_SIZE, SMALL

FLOAT32 = TFLITE[0]
QUANTIZED = Cell("int8", make=lambda *_: None, stock=lambda *_: None)
SAME = {"min_cosine": 1.0, "mean_cosine": 1.0, "argmax_agreement": 1.0, "accuracy": None}


def verdict(cell: Cell, refusal: str = "", **changes: object) -> tuple[str, str | None]:
    found = _verdict(cell, SAME | changes, refusal)
    return found["verdict"], found["why"]


def test_every_family_is_in_it_small_and_full_in_both_formats():
    keys = [tuple(job.key.values()) for job in list_jobs()]
    assert len(set(keys)) == len(keys) == 2 * (len(SMALL) + len(FULL_SIZE))
    assert {name.split("/")[0] for name in SMALL} == {name.split("/")[0] for name in FULL_SIZE}
    names = [cell.name for cell in (*TFLITE, *COREML)]
    assert names == ["float32", "float16", "dynamic", "int8 static", "int8 mixed", "float16", "w8", "w8a8", "palette6"]


def test_float_is_held_to_its_cosine_and_float32_to_every_answer():
    assert verdict(FLOAT32) == ("passes", None)
    assert verdict(FLOAT32, min_cosine=0.9998) == ("fails", "lowest cosine below 0.9999")
    assert verdict(FLOAT32, argmax_agreement=0.99) == ("fails", "answers differ")
    assert verdict(COREML[0], argmax_agreement=0.99) == ("passes", None)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"stock_mean_cosine": 1.0, "stock_argmax_agreement": 1.0}, None),
        ({"stock_mean_cosine": 1.1, "stock_argmax_agreement": 1.0}, "mean cosine below the stock tool's"),
        (
            {"stock_mean_cosine": 0.9, "stock_argmax_agreement": 1.1},
            "argmax_agreement below the stock tool's",
        ),
        (
            {"accuracy": 0.5, "stock_mean_cosine": 0.9, "stock_accuracy": 0.6, "stock_argmax_agreement": 1.1},
            "accuracy below the stock tool's",
        ),
    ],
)
def test_quantized_forms_are_held_to_their_rival(changes, why):
    assert verdict(QUANTIZED, **changes) == ("passes" if why is None else "fails", why)


def test_a_rival_that_fails_is_told():
    assert verdict(QUANTIZED, "the stock tool fails: X") == ("passes", "the stock tool fails: X")
