"""Frozen dataclasses that cost a start little: `dataclasses.dataclass` with methods that all of them share.

`dataclass` writes and compiles up to eight methods for every class, 0.4 ms each time; the agent has sixty of them, and
needs most before it can answer. `record` takes fields, slots and defaults from `dataclass`, and leaves the methods to
the functions below, in 0.05 ms. What is seen from outside is the same: `fields`, `replace`, `asdict`, `is_dataclass`, equality, hash, text,
copies, pickles, `FrozenInstanceError`. Making one takes about 2 µs instead of 1.
"""

import dataclasses
from collections.abc import Callable
from reprlib import recursive_repr
from typing import TYPE_CHECKING, Any, TypeVar

__all__ = ["record"]

T = TypeVar("T")

if TYPE_CHECKING:
    from dataclasses import dataclass as record
else:

    def record(*, frozen: bool, slots: bool, kw_only: bool) -> Callable[[type[T]], type[T]]:
        """Make a dataclass of the class, as `dataclasses.dataclass(frozen=True, slots=True, kw_only=True)` does.

        Raises:
            TypeError: one of the three is not True.
        """
        if not (frozen and slots and kw_only):
            raise TypeError("a record is frozen, has slots and takes keywords only; use dataclasses.dataclass")
        return _record


def _record(cls: type[T]) -> type[T]:
    cls = dataclasses.dataclass(init=False, repr=False, eq=False, slots=True, kw_only=True)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # the line above made it one
    missing = dataclasses.MISSING
    made: dict[str, Any] = {
        "_names": tuple(field.name for field in fields),
        "_defaults": {field.name: field.default for field in fields if field.default is not missing},
        "_factories": {field.name: field.default_factory for field in fields if field.default_factory is not missing},
    }
    for name, value in (made | _METHODS).items():
        if name not in cls.__dict__ or cls.__dict__[name] is None:  # `__hash__` is None where a class has an `__eq__`
            setattr(cls, name, value)
    return cls


def _init(self: Any, /, **values: Any) -> None:
    set_field = object.__setattr__
    for name in self._names:
        if name in values:
            set_field(self, name, values.pop(name))
        elif name in self._defaults:
            set_field(self, name, self._defaults[name])
        elif name in self._factories:
            set_field(self, name, self._factories[name]())
        else:
            raise TypeError(f"{type(self).__name__}() is missing the keyword argument {name!r}")
    if values:
        raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {next(iter(values))!r}")
    if hasattr(self, "__post_init__"):
        self.__post_init__()


def _values(self: Any) -> list[Any]:
    return [getattr(self, name) for name in self._names]


def _restore(self: Any, values: list[Any]) -> None:
    for name, value in zip(self._names, values, strict=True):
        object.__setattr__(self, name, value)


def _eq(self: Any, other: object) -> Any:
    if type(other) is not type(self):
        return NotImplemented
    return tuple(_values(self)) == tuple(_values(other))


def _hash(self: Any) -> int:
    return hash(tuple(_values(self)))


@recursive_repr()
def _repr(self: Any) -> str:
    return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self._names)})"


def _refuse_set(self: Any, name: str, value: object) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_delete(self: Any, name: str) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")


_METHODS = {
    "__init__": _init,
    "__eq__": _eq,
    "__hash__": _hash,
    "__repr__": _repr,
    "__setattr__": _refuse_set,
    "__delattr__": _refuse_delete,
    "__getstate__": _values,
    "__setstate__": _restore,
}
