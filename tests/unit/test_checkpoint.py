"""Checkpoints: what was saved comes back, the optimizer goes on, what does not fit is refused."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from steerrec.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from steerrec.errors import TrainingError

SETTINGS = {"seed": 0, "betas": (0.9, 0.999), "name": "é"}


@pytest.fixture
def checkpoint(tmp_path):
    return Checkpoint(tmp_path / "checkpoint.safetensors", SETTINGS)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.1, fused=True)


def step(optimizer, parameters, number):
    for parameter in parameters:
        parameter.grad = torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(number)
        )
    optimizer.step()


def test_tensors_and_state_come_back_as_they_were(tmp_path):
    tensors = {
        "weight": torch.randn(3, 4, requires_grad=True),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "step": torch.tensor(7.0),
        "counts": torch.arange(5),
    }
    state = {"epoch": 3, "log": [{"fvu": 0.1}], "name": "é", "scale": 1 / 3}
    save_checkpoint(tmp_path / "c.safetensors", tensors, state)
    loaded, again = load_checkpoint(tmp_path / "c.safetensors")
    assert again == state
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


def test_without_a_file_there_is_nothing_to_go_on_from(checkpoint):
    assert checkpoint.load(adam([torch.zeros(1)])) is None


def test_groups_come_back_under_their_names(checkpoint):
    parts = {
        "sae": {"W_dec": torch.ones(2, 3), "inner.bias": torch.zeros(3)},
        "run": {"rows": torch.arange(4)},
    }
    checkpoint.save(parts, adam([torch.zeros(1)]), {"epoch": 2})
    loaded, state = checkpoint.load(adam([torch.zeros(1)]))
    assert state == {"epoch": 2}
    assert {part: set(group) for part, group in loaded.items()} == {
        "sae": {"W_dec", "inner.bias"},
        "run": {"rows"},
    }
    assert torch.equal(loaded["run"]["rows"], torch.arange(4))


def test_a_loaded_optimizer_goes_on_to_the_bit_as_if_never_stopped(checkpoint):
    whole = [torch.ones(3, 4), torch.ones(5)]
    optimizer = adam(whole)
    for number in range(3):
        step(optimizer, whole, number)
    checkpoint.save({}, optimizer, None)
    resumed = [parameter.clone() for parameter in whole]
    other = adam(resumed)
    checkpoint.load(other)
    for number in range(3, 6):
        step(optimizer, whole, number)
        step(other, resumed, number)
    assert all(torch.equal(one, two) for one, two in zip(whole, resumed, strict=True))


@pytest.mark.parametrize("settings", [{**SETTINGS, "seed": 1}, {}, {**SETTINGS, "more": None}])
def test_a_checkpoint_of_other_settings_is_refused_and_kept(checkpoint, settings):
    optimizer = adam([torch.zeros(1)])
    checkpoint.save({}, optimizer, None)
    before = checkpoint.path.read_bytes()
    with pytest.raises(TrainingError, match="is a checkpoint of other settings or data"):
        replace(checkpoint, settings=settings).load(optimizer)
    assert checkpoint.path.read_bytes() == before


@pytest.mark.parametrize("state", [None, {"epoch": 1}, [1]])
def test_a_checkpoint_of_something_else_is_refused(checkpoint, state):
    save_checkpoint(checkpoint.path, {"weight": torch.ones(1)}, state)
    with pytest.raises(TrainingError, match="is a checkpoint of other settings or data"):
        checkpoint.load(adam([torch.zeros(1)]))


def empty(path):
    path.write_bytes(b"")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-50])


def write_text(path):
    path.write_text("not a checkpoint at all")


def drop_metadata(path):
    save_file({"weight": torch.ones(1)}, path)


def drop_state(path):
    save_file({"weight": torch.ones(1)}, path, metadata={"format": "pt"})


def halve_state(path):
    save_file({"weight": torch.ones(1)}, path, metadata={"state": "{"})


@pytest.mark.parametrize(
    "damage", [empty, truncate, write_text, drop_metadata, drop_state, halve_state]
)
def test_a_damaged_checkpoint_is_refused(checkpoint, damage):
    save_checkpoint(checkpoint.path, {"weight": torch.ones(100)}, {"epoch": 1})
    damage(checkpoint.path)
    with pytest.raises(TrainingError, match=r"checkpoint\.safetensors is not a usable checkpoint"):
        checkpoint.load(adam([torch.zeros(1)]))
