"""Safetensors files from strangers: nothing is allocated before the header has proved honest.

The format is that of the safetensors library, which opens what is written here. Its own reader
takes many times the size of a hostile file, and copies; its writer orders metadata by chance.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from steerrec.errors import ArtifactError
from steerrec.untrusted import MAX_JSON, open_inside, parse_object, shown

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of a tensor: dtype, shape, and its first and last byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)} of shape {shown(self.shape)}"


class TensorFile:
    """An open safetensors file whose header is checked; tensors are read one by one.

    Parameters
    ----------
    path
        The file.
    root
        The folder that it has to lie in, links followed.

    Attributes
    ----------
    tensors
        What there is, by name, in the order of the file.
    metadata
        Its metadata.

    Raises
    ------
    ArtifactError
        If it cannot be read, or its header does not describe this very file: every byte of every
        tensor once, none beyond its end.
    """

    def __init__(self, path: Path, root: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._stream = open_inside(path, root)
        try:
            self._begin = self._read_header()
        except BaseException as error:
            self._stream.close()
            if isinstance(error, OSError):
                raise ArtifactError(f"{path} cannot be read: {error}") from error
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stream.close()

    def require(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        *,
        others: tuple[int, ...] | None = None,
    ) -> None:
        """Raise ArtifactError unless the tensors are exactly these.

        With `others`, any more of that shape are welcome.
        """
        for name in (*shapes, *self.tensors):
            shape = shapes.get(name, others)
            info = self.tensors.get(name)
            if info is not None and (info.shape, info.dtype) == (shape, dtype):
                continue
            found = "missing" if info is None else str(info)
            expected = "no such tensor"
            if shape is not None:
                expected = f"{dtype_name(dtype)} of shape {shape}"
            raise ArtifactError(
                f"{self.path}: tensor {shown(name)} is {found}; expected {expected}"
            )

    def read(self, name: str) -> Tensor:
        """The tensor of this name, in memory of its own.

        Raises
        ------
        ArtifactError
            If the file has become shorter, or a value is not finite.
        """
        info = self.tensors[name]
        raw = torch.empty(info.stop - info.start, dtype=torch.uint8)
        try:
            self._stream.seek(self._begin + info.start)
            count = self._stream.readinto(raw.numpy())  # type: ignore[attr-defined]
        except OSError as error:
            raise ArtifactError(f"{self.path} cannot be read: {error}") from error
        if count != len(raw):
            raise ArtifactError(f"{self.path} cannot be read: it ends in the middle of {name!r}")
        tensor = raw.view(info.dtype)
        # one pass without a copy: NaN is passed on to both ends
        ends = tensor.aminmax() if info.dtype.is_floating_point and len(tensor) else ()
        if not all(bool(end.isfinite()) for end in ends):
            raise ArtifactError(f"{self.path}: tensor {shown(name)} has values that are not finite")
        return tensor.view(info.shape)

    def _read_header(self) -> int:
        """Fill `tensors` and `metadata`; returns where the tensors begin."""
        size = os.fstat(self._stream.fileno()).st_size
        length = int.from_bytes(self._stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ArtifactError(
                f"{self.path} cannot be read: it has {size} bytes, its header claims {length}"
            )
        if length > MAX_JSON:
            raise ArtifactError(
                f"{self.path} has a header of {length} bytes; expected at most {MAX_JSON}"
            )
        header = parse_object(self._stream.read(length), f"the header of {self.path}")
        metadata = header.pop(_METADATA, {})
        if not isinstance(metadata, dict) or not all(
            isinstance(value, str) for value in metadata.values()
        ):
            raise self._dishonest("its metadata is not text by name")
        infos = sorted(
            ((name, self._info(name, entry)) for name, entry in header.items()),
            key=lambda pair: (pair[1].start, pair[1].stop),
        )
        end = 0
        for name, info in infos:
            if info.start != end:
                raise self._dishonest(f"tensor {shown(name)} begins at {info.start}, not at {end}")
            end = info.stop
        if end != size - 8 - length:
            raise self._dishonest(f"its tensors take {end} bytes of {size - 8 - length}")
        self.tensors, self.metadata = dict(infos), metadata
        return 8 + length

    def _info(self, name: str, entry: Any) -> TensorInfo:
        match entry:
            case {"dtype": str(code), "shape": list(shape), "data_offsets": [start, stop]} if (
                len(entry) == 3
                and code in _DTYPES
                and len(shape) <= 8
                and all(type(number) is int and number >= 0 for number in (*shape, start, stop))
            ):
                dtype = _DTYPES[code]
                if stop - start == math.prod(shape) * dtype.itemsize:
                    return TensorInfo(dtype, tuple(shape), start, stop)
        raise self._dishonest(f"tensor {shown(name)} is described as {shown(entry)}")

    def _dishonest(self, reason: str) -> ArtifactError:
        return ArtifactError(f"{self.path} cannot be read: {reason}; it is damaged")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; equal tensors and metadata give equal bytes."""
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    parts = []
    for name, tensor in sorted(tensors.items()):
        part = tensor.detach().cpu().contiguous()
        start, end = end, end + part.numel() * part.element_size()
        header[name] = {
            "dtype": _NAMES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [start, end],
        }
        parts.append(part)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            stream.write(part.reshape(-1).view(torch.uint8).numpy().data)


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype as SAELens writes it: `float32`."""
    return str(dtype).removeprefix("torch.")
