"""The checkpoint of a training run: one safetensors file with all tensors and a JSON state."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from steerrec.errors import TrainingError
from steerrec.files import atomic_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Where a run keeps what it needs to go on, and what it must have been started with.

    Attributes
    ----------
    path
        The file.
    settings
        JSON-able; a checkpoint of other settings is refused.
    """

    path: Path
    settings: Mapping[str, Any]

    def save(
        self, parts: Mapping[str, Mapping[str, Tensor]], optimizer: Optimizer, state: Any
    ) -> None:
        """Write named groups of tensors, the optimizer's moments and a JSON-able state."""
        tensors = {f"{part}.{key}": t for part, group in parts.items() for key, t in group.items()}
        for number, slot in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{key}": value for key, value in slot.items()}
        save_checkpoint(self.path, tensors, {"settings": dict(self.settings), "state": state})

    def load(self, optimizer: Optimizer) -> tuple[dict[str, dict[str, Tensor]], Any] | None:
        """The groups of tensors and the state, if there are any; the optimizer gets its moments.

        Raises
        ------
        TrainingError
            If the file is damaged, or was written under other settings.
        """
        if not self.path.is_file():
            return None
        tensors, saved = load_checkpoint(self.path)
        found = saved.get("settings") if isinstance(saved, dict) else None
        if found != json.loads(json.dumps(dict(self.settings))):
            raise TrainingError(
                f"{self.path} is a checkpoint of other settings or data; run with the settings it "
                "was started with, or delete its folder to start afresh"
            )
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, key = name.partition(".")
            parts.setdefault(part, {})[key] = tensor
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts.pop("optimizer", {}).items():
            number, _, key = name.partition(".")
            slots.setdefault(int(number), {})[key] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
        logger.info("going on from %s", self.path)
        return parts, saved["state"]


def save_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], state: Any) -> None:
    """Write the tensors and the JSON-able state of a run as one safetensors file, atomically."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(contiguous, temporary, metadata={"state": json.dumps(state)})


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], Any]:
    """Read back what `save_checkpoint` wrote.

    Raises
    ------
    TrainingError
        If the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            state = json.loads(file.metadata()["state"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(
            f"{path} is not a usable checkpoint ({error}); delete it to start afresh"
        ) from error
    return tensors, state
