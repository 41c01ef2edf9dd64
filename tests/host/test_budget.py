"""The exporter refuses what a board of the recipe cannot take."""

from dataclasses import replace

import pytest

from device.contract.board import load_board
from host.errors import ExportError
from host.stages.budget import require_budget

BOARD = load_board("raspberry-pi-5")
LIMIT = BOARD.budget.artifact_bytes


def test_artifacts_up_to_the_budget_pass():
    require_budget(BOARD, {"int8": LIMIT, "float32": LIMIT})


def test_an_artifact_over_the_budget_is_named():
    with pytest.raises(ExportError, match=f"raspberry-pi-5: the float32 artifact has {LIMIT + 1} bytes"):
        require_budget(BOARD, {"int8": 1, "float32": LIMIT + 1})


def test_core_ml_counts_on_phones_only():
    phone = load_board("iphone-15")
    require_budget(BOARD, {"int8": 1}, coreml_bytes=LIMIT * 100)
    with pytest.raises(ExportError, match="the Core ML artifact"):
        require_budget(phone, {"int8": 1}, coreml_bytes=phone.budget.artifact_bytes + 1)


def test_a_board_that_runs_none_is_named():
    board = replace(BOARD, support=replace(BOARD.support, precisions=("int4",)))
    with pytest.raises(ExportError, match="runs none of the artifacts"):
        require_budget(board, {"int8": 1, "float32": 1})
