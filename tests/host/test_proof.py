"""When an artifact counts as equal to the float model."""

import pytest

from converters.errors import ParityError
from host.stages.proof import Proof


def make_proof(*, others: int, images: int, min_cosine: float = 0.9999, difference: float = 0.0) -> Proof:
    """An artifact that answers `others` of `images` otherwise."""
    agreement = 1 - others / images
    return Proof(
        accuracy=0.5,
        argmax_agreement=agreement,
        min_cosine=min_cosine,
        max_abs_difference=0.1,
        max_relative_difference=difference,
        images=images,
    )


@pytest.mark.parametrize(("others", "images"), [(0, 60), (1, 60), (5, 1000), (50, 10_000)])
def test_answers_on_a_border_may_differ(others, images):
    make_proof(others=others, images=images).require("coreml")


@pytest.mark.parametrize(
    ("others", "images", "cosine"), [(2, 60, 0.9999), (6, 1000, 0.9999), (1, 60, 0.9), (1, 1, 0.5)]
)
def test_other_answers_are_refused(others, images, cosine):
    with pytest.raises(
        ParityError, match=rf"coreml: argmax agreement .* is below 0.995, over {images} images; do not ship"
    ):
        make_proof(others=others, images=images, min_cosine=cosine).require("coreml")


@pytest.mark.parametrize(
    ("cosine", "difference", "message"),
    [(0.999, 0.0, "lowest cosine 0.999"), (1.0, 1e-3, "features differ by 0.001 of the largest, 0.0002 is allowed")],
)
def test_float32_is_held_to_its_features(cosine, difference, message):
    proof = make_proof(others=0, images=60, min_cosine=cosine, difference=difference)
    assert [problem for problem in proof.problems("float32") if message in problem]
    assert proof.problems("int8") == ()
