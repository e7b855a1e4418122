"""A safetensors file as the weights of a model, checked before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import nn

from steerrec.errors import ModelError

_MAX_HEADER = 25_000_000  # bytes; what a Hub refuses too


class Weights:
    """The tensors of a safetensors file, not read yet.

    Parameters
    ----------
    file
        The file.

    Raises
    ------
    ModelError
        If its header is longer than that of any model.
    """

    def __init__(self, file: Path) -> None:
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
        if header > _MAX_HEADER:
            raise ModelError(f"{file} has a header of {header} bytes; not one of a model")
        self.file = file
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            self.shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in names}

    def __len__(self) -> int:
        return len(self.shapes)

    def fill(self, model: nn.Module) -> None:
        """Give a model on the meta device its weights, in the precision that they are stored in.

        Raises
        ------
        ModelError
            If names or shapes are not those of the model, or a value is not a finite number.
        """
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        refuse_misfits(self.file, self.shapes, expected)
        with safe_open(self.file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in self.shapes}
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                raise ModelError(f"{self.file}: {name} holds what is not a finite number")
        model.load_state_dict(tensors, assign=True)


def refuse_misfits(
    source: object,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    """Raise ModelError unless these are the names and shapes that a configuration wants."""
    misfits = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    misfits += [f"{name} is not expected" for name in sorted(found.keys() - expected.keys())]
    misfits += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in sorted(expected.items())
        if name in found and found[name] != shape
    ]
    if misfits:
        more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise ModelError(f"{source} does not fit its configuration: {'; '.join(misfits[:3])}{more}")
