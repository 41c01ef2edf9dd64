"""What a board's iOS allows, and which deployment target goes with it."""

import pytest

from converters import coreml
from converters.coreml_target import ios_of_specification, require_ios
from converters.errors import ConversionError
from device.contract.board import load_board
from tests.converters.tiny import INPUT_SHAPE, TinyHybrid, board_of_ios


@pytest.mark.parametrize(("form", "ios"), [("w8", 17), ("palette6", 17), ("w8a8", 17), ("ios18", 18), ("w8_train", 18)])
def test_each_form_is_for_the_oldest_ios_that_runs_it(forms, form, ios):
    assert ios_of_specification(coreml.read_specification(forms[form]).specificationVersion) == ios


def test_a_new_enough_board_is_accepted():
    require_ios(board_of_ios(18), 18, form="a grouped palette")
    require_ios(load_board("iphone-12"), 17, form="int8 weights")


def test_a_board_without_core_ml_is_named():
    with pytest.raises(ConversionError, match="board raspberry-pi-5 does not run Core ML"):
        require_ios(load_board("raspberry-pi-5"), 17, form="int8 weights")


@pytest.mark.parametrize("ios", [16, 19])
def test_other_targets_are_refused(tmp_path, ios):
    with pytest.raises(ConversionError, match=rf"minimum_ios must be 17\.\.18, got {ios}"):
        coreml.convert(
            TinyHybrid().eval(),
            INPUT_SHAPE,
            tmp_path / "x.mlpackage",
            input_spec_metadata={},
            labels=[],
            minimum_ios=ios,
        )
