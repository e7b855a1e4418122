"""Tensors inside what modules take and return: tuples, dicts, ModelOutputs, dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from steerrec.errors import SiteError
from steerrec.sites import SelectPath


def get_in(value: Any, select: SelectPath) -> Any:
    """What is at `select` inside a nested value.

    Raises
    ------
    SiteError
        If nothing is there; the message says what is.
    """
    for key in select:
        if isinstance(value, PackedSequence):
            return value
        if isinstance(value, Tensor):
            raise SiteError(
                f"select={select!r} goes on inside {describe(value)}; expected it to end there"
            )
        try:
            value = getattr(value, str(key)) if _by_attribute(value, key) else value[key]
        except (KeyError, IndexError, TypeError) as error:
            raise SiteError(f"nothing at select={select!r} in {describe(value)}") from error
    return value


def replace_in(value: Any, select: SelectPath, new: Any) -> Any:
    """`value` with what is at `select` exchanged, in new containers of the same types."""
    if not select:
        return new
    key, rest = select[0], select[1:]
    by_attribute = _by_attribute(value, key)
    child = replace_in(getattr(value, str(key)) if by_attribute else value[key], rest, new)
    if isinstance(value, tuple):
        if by_attribute:
            return value._replace(**{str(key): child})  # type: ignore[attr-defined]
        items = list(value)
        items[key] = child  # type: ignore[index]
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    shallow = copy.copy(value)
    if by_attribute:
        object.__setattr__(shallow, str(key), child)  # also where the dataclass is frozen
        return shallow
    if isinstance(value, Mapping) and isinstance(key, int) and key not in value:
        key = list(value)[key]  # a ModelOutput can be read by position, but not written
    shallow[key] = child
    return shallow


def _by_attribute(value: Any, key: int | str) -> bool:
    """Whether a name is a field here: of a named tuple or a dataclass that is no mapping."""
    if not isinstance(key, str) or isinstance(value, Mapping):
        return False
    return key in getattr(value, "_fields", ()) or (
        dataclasses.is_dataclass(value) and hasattr(value, key)
    )


def tensors_in(value: Any, select: SelectPath = ()) -> Iterator[tuple[SelectPath, Tensor]]:
    """Every tensor inside a nested value, with the path that leads to it."""
    if isinstance(value, Tensor):
        yield select, value
    elif isinstance(value, Mapping):
        for key, child in value.items():
            yield from tensors_in(child, (*select, key))
    elif isinstance(value, PackedSequence):
        return  # its rows are in the order of time, not of histories
    elif isinstance(value, tuple | list):
        for index, child in enumerate(value):
            yield from tensors_in(child, (*select, index))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name), (*select, field.name))


def describe(value: Any) -> str:
    """A nested value in a few words, for messages and reports."""
    if isinstance(value, Tensor):
        return "a NestedTensor" if value.is_nested else f"a tensor {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {', '.join(map(str, value))}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
