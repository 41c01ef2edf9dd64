"""Evaluate a saved Core ML program with torch, where Core ML itself cannot run.

It reads the `.mlpackage` back from disk and executes its MIL operations, so a wrong weight, fold or scale in the file
shows. It checks the program's mathematics, not Apple's compiler or the Neural Engine.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from converters.coreml import WEIGHTS, read_specification
from converters.errors import ConversionError, UnsupportedOpError
from converters.mil_ops import OPERATIONS
from converters.quiet import quiet


class MilProgram:
    """One function of a saved program, ready to run.

    Constants and the weights that `constexpr_` operations decode are computed once, at the first run.
    """

    def __init__(self, path: Path, *, function: str = "main", round_to_half: bool = False) -> None:
        """Load a package.

        Args:
            path: the `.mlpackage` directory.
            function: which function of a multifunction package.
            round_to_half: round every value that the program declares float16, as a device would; else float32.

        Raises:
            ConversionError: not a package, or no such function.
            UnsupportedOpError: an operation that the evaluator does not know.
        """
        self._use(load_function(path, function), name=str(path), round_to_half=round_to_half)

    @classmethod
    def from_function(cls, block: Any, *, name: str = "program", round_to_half: bool = False) -> "MilProgram":
        """Wrap a MIL function that is already in memory."""
        program = cls.__new__(cls)
        program._use(block, name=name, round_to_half=round_to_half)
        return program

    def _use(self, block: Any, *, name: str, round_to_half: bool) -> None:
        self._block, self._name, self._round_to_half = block, name, round_to_half
        self._constants: dict[str, Any] = {}
        unknown = sorted({op.op_type for op in block.operations} - OPERATIONS.keys() - {"const", "classify"})
        if unknown:
            raise UnsupportedOpError(
                f"{name}: MIL operations {', '.join(unknown)} are not in converters.mil_ops; add them there"
            )

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(int(size) for size in var.shape) for name, var in self._block.inputs.items()}

    @property
    def op_types(self) -> set[str]:
        return {op.op_type for op in self._block.operations}

    @property
    def operations(self) -> list[Any]:
        """The MIL operations that compute, in order."""
        return [operation for operation in self._block.operations if operation.op_type != "const"]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Evaluate the program.

        Raises:
            ConversionError: input names or shapes are not the program's.
            UnsupportedOpError: an operation is used in a way that the evaluator does not know.
        """
        values = self._all_values(inputs)
        return {var.name: _array(self._value(var, values)) for var in self._block.outputs}

    def run_all(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Evaluate the program and give every float tensor of it by name; errors as of `run`."""
        found = {**self._all_values(inputs), **self._constants}
        return {
            name: value.numpy()
            for name, value in found.items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }

    def run_alone(self, operation: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Evaluate one operation of this program.

        Args:
            operation: one of `operations`.
            inputs: values of some of its arguments, by the arguments' names; the others are its own constants.

        Raises:
            ConversionError: an argument is neither given nor a constant.
        """
        arguments = {}
        for key, item in operation.inputs.items():
            if key in inputs:
                arguments[key] = _tensor(inputs[key])
            elif item is not None:
                variables = item if isinstance(item, list | tuple) else [item]
                if any(var.val is None for var in variables):
                    raise ConversionError(f"{self._name}: {operation.name} needs its argument {key}")
                arguments[key] = self._argument(item, {})
        with torch.no_grad():
            results = OPERATIONS[operation.op_type](arguments)
        return [_array(result) for result in (results if isinstance(results, list) else [results])]

    def _all_values(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        if shapes != self.inputs:
            raise ConversionError(f"{self._name}: inputs must be {self.inputs}, got {shapes}")
        with torch.no_grad():
            return self._compute({name: _tensor(value) for name, value in inputs.items()})

    def run_many(self, inputs: Mapping[str, np.ndarray], *, chunk: int = 64) -> dict[str, np.ndarray]:
        """Evaluate the program for N samples at once, each as if it were alone.

        Args:
            inputs: as for `run`, with one more axis in front: [N, ...].
            chunk: how many samples are in memory together.

        Returns:
            The outputs, with the same axis in front.
        """
        shapes = {name: tuple(value.shape[1:]) for name, value in inputs.items()}
        if shapes != self.inputs:
            raise ConversionError(f"{self._name}: each sample's inputs must be {self.inputs}, got {shapes}")
        with torch.no_grad():
            outputs = torch.vmap(self._evaluate, chunk_size=chunk)(
                {name: _tensor(value) for name, value in inputs.items()}
            )
        return {name: _array(value) for name, value in outputs.items()}

    def _evaluate(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        values = self._compute(inputs)
        return {var.name: self._value(var, values) for var in self._block.outputs}

    def _compute(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        values = {var.name: self._round(var, inputs[name]) for name, var in self._block.inputs.items()}
        for operation in self._block.operations:
            self._execute(operation, values)
        return values

    def _execute(self, operation: Any, values: dict[str, Any]) -> None:
        name = operation.outputs[0].name
        if operation.op_type == "const" or name in self._constants:
            return  # constants are read where they are used
        arguments = {key: self._argument(item, values) for key, item in operation.inputs.items() if item is not None}
        if operation.op_type == "classify":
            self._classify(operation, arguments, values)
            return
        try:
            results = OPERATIONS[operation.op_type](arguments)
        except NotImplementedError as error:
            raise UnsupportedOpError(
                f"{self._name}: {operation.op_type} {name!r}: {error}; add it to converters.mil_ops"
            ) from error
        target = self._constants if operation.op_type.startswith("constexpr_") else values
        for var, result in zip(operation.outputs, results if isinstance(results, list) else [results], strict=True):
            target[var.name] = self._round(var, result)

    def _classify(self, operation: Any, arguments: dict[str, Any], values: dict[str, Any]) -> None:
        probabilities = arguments["probabilities"].reshape(-1)
        classes = list(operation.inputs["classes"].val)
        label, table = operation.outputs
        values[label.name] = str(classes[int(probabilities.argmax())])
        values[table.name] = probabilities

    def _argument(self, item: Any, values: dict[str, Any]) -> Any:
        if isinstance(item, list | tuple):
            return [self._value(var, values) for var in item]
        return self._value(item, values)

    def _value(self, var: Any, values: dict[str, Any]) -> Any:
        if var.name in values:
            return values[var.name]
        if var.name not in self._constants:
            self._constants[var.name] = var.val if isinstance(var.val, str | list) else _tensor(np.asarray(var.val))
        return self._constants[var.name]

    def _round(self, var: Any, value: Any) -> Any:
        is_half = (
            self._round_to_half
            and isinstance(value, Tensor)
            and value.is_floating_point()
            and _dtype_name(var) == "fp16"
        )
        return value.half().float() if is_half else value


def load_function(path: Path, function: str = "main") -> Any:
    """Read a function of the saved program straight from the files: `ct.models.MLModel(path)` would rewrite the package's Manifest.json."""
    specification = read_specification(path)
    with quiet():
        from coremltools.converters.mil.frontend.milproto.load import load

        try:
            program = load(specification, specification.specificationVersion, str((path / WEIGHTS).parent))
        except Exception as error:  # a damaged program fails in many ways, in the graph or in the blob reader
            raise ConversionError(f"{path}: not a readable Core ML program ({error}); export it again") from error
    if function not in program.functions:
        raise ConversionError(f"{path}: has no function {function!r}, only {', '.join(sorted(program.functions))}")
    return program.functions[function]


def _tensor(array: np.ndarray) -> Tensor:
    """float16 to float32, every integer to int32; a copy, because MIL hands out read-only views."""
    if array.dtype.kind == "f":
        return torch.tensor(np.asarray(array, np.float32))
    return torch.tensor(array if array.dtype == bool else np.asarray(array, np.int32))


def _array(value: Any) -> np.ndarray:
    return np.asarray(value) if isinstance(value, str) else value.numpy()


def _dtype_name(var: Any) -> str:
    from coremltools.converters.mil.mil import types

    return str(types.builtin_to_string(var.dtype))
