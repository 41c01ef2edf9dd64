"""The tiny model, converted once, and a board that has it."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from device.contract.manifest import ProjectorEntry
from tests.support.agent import Field
from tests.support.broker import mosquitto
from tests.support.delegates import compile_delegate
from tests.support.tiny_bundle import TinyModel, convert_tiny_model, projector_between, ready_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Converted here, or, in an environment that cannot, the one in the directory FIELDVIT_TINY_MODELS."""
    return ready_tiny_model() or convert_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """The same task with another backbone."""
    return ready_tiny_model(seed=1) or convert_tiny_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="session")
def projector(
    tiny_model: TinyModel, other_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ProjectorEntry, bytes]:
    """From the tiny model's features to the other's."""
    return projector_between(tiny_model, other_model, tmp_path_factory.mktemp("projector"))


@pytest.fixture
def field(tmp_path: Path, tiny_model: TinyModel) -> Field:
    """A board without a model, and a repository that offers release 1."""
    field = Field.create(tmp_path, tiny_model)
    field.publish(1)
    return field


@pytest.fixture(scope="session")
def broker_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with mosquitto(tmp_path_factory.mktemp("broker")) as port:
        yield port


@pytest.fixture
def delegate_library(tmp_path: Path) -> Callable[..., Path]:
    """Compiles a delegate for one test; see `tests.support.delegates`."""
    return partial(compile_delegate, tmp_path)
