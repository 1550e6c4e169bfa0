"""What all configurations share: rules for their fields, and the way in from and out to a dict."""

import dataclasses
import math
import numbers
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple, Self


class Rule(NamedTuple):
    """What a value must be.

    Attributes:
        what: Words behind "must be" in an error.
        fits: Whether a value is that.
    """

    what: str
    fits: Callable[[Any], bool]


# Sizes are indices and shapes of 32 bits on the way to the accelerator.
LARGEST = 2**31 - 1
LONGEST_SHOWN = 200


def integer(low: int, high: int = LARGEST) -> Rule:
    what = f"an integer, {low} to {high}"
    if high == LARGEST:
        what = f"an integer of at least {low}, below 2**31"
    return Rule(what, lambda value: _is_integer(value) and low <= value <= high)


def optional_integer(low: int) -> Rule:
    rule = integer(low)
    return Rule(f"None or {rule.what}", lambda value: value is None or rule.fits(value))


def number(what: str, fits: Callable[[float], bool]) -> Rule:
    """A finite number for which `fits` holds; `what` says so in words."""
    return Rule(what, lambda value: _is_finite(value) and fits(value))


def one_of(names: Iterable[str]) -> Rule:
    known = list(names)
    return Rule(f"one of {known}", lambda value: isinstance(value, str) and value in known)


BOOLEAN = Rule("a bool", lambda value: isinstance(value, bool))
NOT_NEGATIVE = number("at least 0", lambda value: value >= 0)
POSITIVE = number("above 0", lambda value: value > 0)
OPTIONAL_NUMBER = Rule(
    "None or a finite number",
    lambda value: value is None or _is_finite(value),
)
DROPOUT_RATE = number("in [0, 1)", lambda value: 0 <= value < 1)
# `""` is where the program runs, which nobody means by it.
PATH = Rule("a path", lambda value: isinstance(value, str | os.PathLike) and value != "")


def is_list_of(value: Any, fits: Callable[[Any], bool]) -> bool:
    """Whether a value is a list or a tuple of such items."""
    return isinstance(value, list | tuple) and all(fits(item) for item in value)


def require(rule: Rule, name: str, value: Any) -> None:
    """Raises `ValueError` that names the argument and its value unless the value fits the rule."""
    if not rule.fits(value):
        raise ValueError(f"`{name}` must be {rule.what}. Received: {name}={shown(value)}")


def shown(value: Any) -> str:
    """A value as an error shows it: not all of a long one."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        return f"a {type(value).__name__} too long to print"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


class Config:
    """Base of the frozen dataclasses that describe a model.

    A subclass has a rule for each of its fields in `RULES`.
    """

    RULES: ClassVar[dict[str, Rule]]

    def check_fields(self) -> None:
        """Raises `ValueError` for the first field whose value breaks its rule; NumPy's numbers
        become Python's, which JSON knows."""
        for name, value in self._fields().items():
            require(self.RULES[name], name, value)
            if hasattr(value, "item"):
                object.__setattr__(self, name, value.item())

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """Builds a configuration; an unknown key raises `ValueError` that lists the known ones."""
        if not isinstance(fields, dict):
            raise ValueError(f"Fields of {cls.__name__} must be a dict. Received: {shown(fields)}")
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        unknown = sorted(set(fields) - set(known), key=str)
        if unknown:
            raise ValueError(f"Unknown fields of {cls.__name__}: {unknown}. Known fields: {known}")
        return cls(**fields)

    @classmethod
    def missing_from(cls, fields: dict[str, Any]) -> list[str]:
        """Fields that a saved configuration lacks, but for those that are `None` by default."""
        own = dataclasses.fields(cls)  # type: ignore[arg-type]
        return [f.name for f in own if f.default is not None and f.name not in fields]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return {name: _jsonable(value) for name, value in self._fields().items()}

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return self.from_dict({**self.to_dict(), **changes})

    def _fields(self) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return {name: getattr(self, name) for name in names}


def _jsonable(value):
    if isinstance(value, Config):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


def _is_integer(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_finite(value):
    if _is_integer(value):
        return abs(value) <= sys.float_info.max
    real = isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational)
    return real and math.isfinite(value)
