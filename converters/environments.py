"""Environments beside our own, for tools that pin an old NumPy: each is made by one make target and used by subprocess.

They are looked for in the working directory and in the checkout that this file belongs to.
"""

from dataclasses import dataclass
from pathlib import Path

from converters.errors import MissingEnvironmentError

_CHECKOUT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """One virtual environment: its directory's name, the make target behind it, and what it is for, in words."""

    directory: str
    target: str
    holds: str

    def find(self) -> Path | None:
        """Its interpreter, absolute; None where the environment was not made."""
        for parent in (Path.cwd(), _CHECKOUT):
            # a finished one has a stamp: without it an install is under way, or broke off
            if (parent / self.directory / ".stamp").is_file():
                return parent / self.directory / "bin" / "python"
        return None

    def require(self) -> Path:
        """Its interpreter.

        Raises:
            MissingEnvironmentError: it was not made; the message says how to.
        """
        python = self.find()
        if python is None or not python.exists():
            raise MissingEnvironmentError(f"{self.missing}; make it with: make {self.target}")
        return python

    @property
    def missing(self) -> str:
        """What is not there, in words."""
        return f"{self.holds} is not installed (no finished {self.directory} in {Path.cwd()} or {_CHECKOUT})"


ONNX2TF = Environment(directory=".venv-onnx2tf", target="onnx2tf-env", holds="onnx2tf with TensorFlow")
LEGACY = Environment(directory=".venv-legacy", target="legacy-env", holds="tflite-runtime")
