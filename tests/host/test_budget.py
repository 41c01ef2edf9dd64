"""What a board of the recipe cannot take is refused: by the exporter, and by an estimate before training."""

from dataclasses import replace

import pytest

from device.contract.board import load_board
from host.errors import ExportError
from host.models.registry import find_model, list_models
from host.stages.budget import require_budget, require_room

BOARD = load_board("raspberry-pi-5")
LIMIT = BOARD.budget.artifact_bytes


def test_artifacts_up_to_the_budget_pass():
    require_budget(BOARD, {"int8": LIMIT, "float32": LIMIT})


def test_a_larger_artifact_beside_one_that_fits_does_no_harm():
    require_budget(BOARD, {"int8": 1, "float32": LIMIT + 1})


def test_an_artifact_over_the_budget_is_named():
    with pytest.raises(ExportError, match=f"raspberry-pi-5: the int8 artifact has {LIMIT + 1} bytes"):
        require_budget(BOARD, {"int8": LIMIT + 1, "float32": LIMIT + 2})


def test_core_ml_counts_on_phones_only():
    phone = load_board("iphone-15")
    require_budget(BOARD, {"int8": 1}, coreml_bytes=LIMIT * 100)
    with pytest.raises(ExportError, match="the Core ML artifact"):
        require_budget(phone, {"int8": 1}, coreml_bytes=phone.budget.artifact_bytes + 1)


def test_a_board_that_runs_none_is_named():
    board = replace(BOARD, support=replace(BOARD.support, precisions=("int4",)))
    with pytest.raises(ExportError, match="runs none of the artifacts"):
        require_budget(board, {"int8": 1, "float32": 1})


def test_a_model_that_cannot_fit_is_refused_and_the_largest_that_fits_is_named():
    boards = [load_board("generic-x86-64"), load_board("raspberry-pi-zero-2w")]
    family = [entry for entry in list_models() if entry.family == "mobilevitv2"]
    largest = find_model("mobilevitv2", "175").name
    with pytest.raises(
        ExportError,
        match=r"raspberry-pi-zero-2w: the int8 artifact of mobilevitv2/200 would have about 18\.4 MB \(18,449,329 "
        rf"parameters\), its budget is 16\.8 MB; choose {largest}, or take the board out of export\.boards",
    ):
        require_room("mobilevitv2/200", 18_449_329, boards[1:], family, has_coreml=True)
    require_room("mobilevitv2/175", 14_253_657, boards, family, has_coreml=True)


def test_without_a_smaller_variant_another_family_is_advised():
    with pytest.raises(ExportError, match="choose another family"):
        require_room("nextvit/l", 80_000_000, [BOARD], [find_model("deit", "base")], has_coreml=True)


def test_core_ml_is_estimated_where_it_is_written():
    phone = load_board("iphone-15")
    phone = replace(phone, support=replace(phone.support, precisions=("int8",)))
    parameters = phone.budget.artifact_bytes // 2 + 1
    require_room("own", parameters, [phone], [], has_coreml=False)
    with pytest.raises(ExportError, match="the Core ML artifact of own"):
        require_room("own", parameters, [phone], [], has_coreml=True)
