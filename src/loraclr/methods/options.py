"""The hyper-parameters of a method, described once: the command line, the docs and the checks are made from its fields."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

from loraclr.errors import UsageError


class Option(NamedTuple):
    """What a field's annotation carries: `ridge: Annotated[float, Option("what it does", 0)] = 1e-3`."""

    help: str
    minimum: float | None = None
    maximum: float | None = None


class Parameter(NamedTuple):
    """One hyper-parameter of a method, as a table row."""

    name: str
    type: Any  # float, int, bool, tuple[float, ...], int | None, or Literal[...]
    default: Any
    help: str
    choices: tuple[str, ...]
    minimum: float | None
    maximum: float | None


def parameters(method: type) -> tuple[Parameter, ...]:
    """The hyper-parameters of a method class, in order."""
    hints = get_type_hints(method, include_extras=True)
    rows = []
    for item in dataclasses.fields(method):
        kind, option = get_args(hints[item.name])
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        rows.append(Parameter(item.name, kind, item.default, option.help, choices, option.minimum, option.maximum))
    return tuple(rows)


def nearest(word: str, words: Iterable[str]) -> str:
    """` Did you mean ...?`, or nothing. Capitals do not count."""
    lower = {known.lower(): known for known in words}
    close = difflib.get_close_matches(word.lower(), list(lower), 1, 0.5)
    return f" Did you mean {lower[close[0]]!r}?" if close else ""


def faults(method: type, values: Mapping[str, object]) -> list[str]:
    """What is wrong with these hyper-parameters, one sentence each."""
    known = {row.name: row for row in parameters(method)}
    found = []
    for name, value in values.items():
        row = known.get(name)
        if row is None:
            found.append(f"no parameter {name!r}.{nearest(name, known)} It has: {', '.join(known) or 'none'}.")
        elif row.choices and value not in row.choices:
            found.append(f"{name}={value!r} is not one of {', '.join(row.choices)}.{nearest(str(value), row.choices)}")
        elif not row.choices and (fault := _fault(row, value)):
            found.append(f"{name}={value!r} must be {fault}.")
    return found


def _fault(row: Parameter, value: object) -> str:
    kinds = get_args(row.type) if get_origin(row.type) is not tuple else ()
    if get_origin(row.type) is tuple:
        if isinstance(value, tuple) and all(_is(item, float) and item >= (row.minimum or 0) for item in value):
            return ""
        return "a tuple of finite numbers, none below 0"
    least = -math.inf if row.minimum is None else row.minimum
    most = math.inf if row.maximum is None else row.maximum
    if any(_is(value, kind) for kind in kinds or (row.type,)) and not (isinstance(value, int | float) and not least <= value <= most):
        return ""
    words = {bool: "true or false", int: "a whole number", float: "a finite number", type(None): "None"}
    bounds = [f"{word} {bound:g}" for word, bound in (("at least", row.minimum), ("at most", row.maximum)) if bound is not None]
    return ", ".join([" or ".join(words[kind] for kind in kinds or (row.type,)), *([" and ".join(bounds)] if bounds else [])])


def _is(value: object, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


class Checked:
    """Base of the methods: their hyper-parameters are checked when they are made.

    `presets` are named settings of them, `aliases` other names for the method.
    """

    aliases: ClassVar[tuple[str, ...]] = ()
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = MappingProxyType({})

    def __post_init__(self) -> None:
        found = faults(type(self), {row.name: getattr(self, row.name) for row in parameters(type(self))})
        if found:
            raise UsageError(f"method {getattr(self, 'name', type(self).__name__)!r}: " + " ".join(found))

    def check(self, concepts: int) -> None:
        """Raises UsageError where the hyper-parameters are not for that many concepts."""

    def check_tokens(self, tokens: int) -> None:
        """Raises MergeError where it has nothing to merge in adapters that bring that many learned tokens."""
