"""Join two TFLite files into one: every signature of both, each with its graph and its constants."""

from pathlib import Path
from typing import Any

from converters.errors import ConversionError
from converters.flatbuffer import read_model, write_model


def join(first: Path, second: Path, out: Path) -> Path:
    """Write a file with the signatures of `first` and those of `second` behind them; metadata of neither.

    Args:
        first: its graphs keep their numbers.
        second: another file, of other signatures.
        out: where to write.

    Raises:
        ConversionError: both have a signature of the same name, or the second refers to its graphs by number.
    """
    model, other = read_model(first), read_model(second)
    shared = _signatures(model) & _signatures(other)
    if shared:
        raise ConversionError(f"{first} and {second} both have a signature {', '.join(sorted(shared))}; rename one")
    if len(other.subgraphs) != len(other.signatureDefs):
        raise ConversionError(f"{second}: holds graphs beside those of its signatures, which cannot be moved")
    _shift(other, graphs=len(model.subgraphs), codes=len(model.operatorCodes), buffers=len(model.buffers))
    _rename_shared(model, other)
    model.subgraphs += other.subgraphs
    model.operatorCodes += other.operatorCodes
    model.buffers += other.buffers
    model.signatureDefs += other.signatureDefs
    model.metadata, model.description = [], other.description
    write_model(model, out)
    return out


def _signatures(model: Any) -> set[str]:
    return {definition.signatureKey.decode() for definition in model.signatureDefs or []}


def _rename_shared(model: Any, other: Any) -> None:
    """Put the signature before the other's tensor names that the model has too: quantizers know tensors by their names."""
    taken = {tensor.name for graph in model.subgraphs for tensor in graph.tensors}
    for definition in other.signatureDefs:
        for tensor in other.subgraphs[definition.subgraphIndex - len(model.subgraphs)].tensors:
            while tensor.name in taken:
                tensor.name = definition.signatureKey + b"_" + tensor.name
            taken.add(tensor.name)


def _shift(model: Any, *, graphs: int, codes: int, buffers: int) -> None:
    """Renumber a model's parts as they will be behind so many others; buffer 0 stays the empty one of all."""
    for graph in model.subgraphs:
        for operator in graph.operators:
            operator.opcodeIndex += codes
        for tensor in graph.tensors:
            tensor.buffer = tensor.buffer + buffers if tensor.buffer else 0
    for definition in model.signatureDefs:
        definition.subgraphIndex += graphs
