"""A variant with arguments of one's own: what `[model] options` of a recipe turn into.

TOML has lists and tables where builders take tuples and dataclasses such as `nextvit.Stage`; the builder's signature
says which. A builder that takes `**options` hands them to the class it returns, whose arguments then count too.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import make_dataclass, replace
from functools import partial
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import nn

from device.contract.records import from_table
from host.errors import ModelError, RecipeError
from host.models.entry import ModelEntry
from host.models.measure import count_macs, count_parameters

_OF_THE_DATA = ("num_classes", "in_chans", "tasks")


def with_options(entry: ModelEntry, options: Mapping[str, Any]) -> ModelEntry:
    """The entry of the same variant with other arguments, its sizes counted anew; without options the entry itself.

    Args:
        entry: of the registry.
        options: names that `option_names` lists, values as TOML or JSON has them.

    Raises:
        RecipeError: an unknown option, a value of the wrong type, or no such model; the message lists the options.
    """
    if not options:
        return entry
    known = f"options of {entry.name} are {', '.join(option_names(entry)) or 'none'}"
    unknown = sorted(options.keys() - set(option_names(entry)))
    if unknown:
        raise RecipeError(f"model.options: {entry.name} has no option {', '.join(map(repr, unknown))}; {known}")
    try:
        return _rebuilt(entry, _converted(entry, options))
    except Exception as error:  # our builders check most values, PyTorch and timm the others, each with its own errors
        what = str(error) or type(error).__name__
        given = ", ".join(sorted(options))
        raise RecipeError(f"model.options of {entry.name} ({given}) make no model: {what}; {known}") from error


def option_names(entry: ModelEntry) -> list[str]:
    """What can be set of this variant, by name."""
    return sorted(_option_hints(entry))


def count_for(entry: ModelEntry, *, num_classes: int, in_chans: int) -> int:
    """Parameters of an entry's model for other classes or channels; no numbers are held."""
    with torch.device("meta"):
        return count_parameters(entry.build(num_classes=num_classes, in_chans=in_chans))


def build_model(entry: ModelEntry, *, num_classes: int, in_chans: int, seed: int = 0) -> nn.Module:
    """Build an entry's model, its initial weights drawn from `seed`; the caller's random state is left alone.

    Raises:
        ModelError: a count below 1.
    """
    if num_classes < 1 or in_chans < 1:
        raise ModelError(f"{entry.name}: num_classes and in_chans must be 1 or more, got {num_classes}, {in_chans}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return entry.build(num_classes=num_classes, in_chans=in_chans)


def _rebuilt(entry: ModelEntry, arguments: Mapping[str, Any]) -> ModelEntry:
    """The entry with these arguments; one forward pass without numbers shows that the model works at its size."""
    own = replace(entry, build=partial(entry.build, **arguments), is_exact=False)
    with torch.device("meta"):
        model = own.create().eval()
    size = getattr(model, "image_size", entry.image_size)
    return replace(
        own, image_size=size, parameters=count_parameters(model), macs=count_macs(model, size, entry.in_chans)
    )


def _converted(entry: ModelEntry, options: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the builder takes them: tuples for lists, the family's dataclasses for tables."""
    hints = _option_hints(entry)
    record = make_dataclass("Options", [(name, hints[name]) for name in options])
    values = from_table(record, options, where="options", error=RecipeError)
    return {name: getattr(values, name) for name in options}


def _option_hints(entry: ModelEntry) -> dict[str, Any]:
    """Name and type of each keyword argument that TOML can express."""
    hints = _keyword_hints(entry.build)
    return {
        name: _as_tuple(hint)
        for name, hint in hints.items()
        if name not in _OF_THE_DATA and get_origin(hint) is not Callable
    }


def _keyword_hints(build: Callable[..., Any]) -> dict[str, Any]:
    function = build.func if isinstance(build, partial) else build
    hints = get_type_hints(function.__init__ if inspect.isclass(function) else function)
    parameters = inspect.signature(build).parameters.values()
    own = {p.name: hints[p.name] for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    hands_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return _keyword_hints(hints["return"]) | own if hands_on else own


def _as_tuple(hint: Any) -> Any:
    """`tuple[X, ...]` for any sequence of X: a TOML list becomes one."""
    return tuple[get_args(hint)[0], ...] if get_origin(hint) in (Iterable, Sequence) else hint
