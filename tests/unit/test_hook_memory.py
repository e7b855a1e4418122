"""Whose memory is whose: what a model writes into after a site, and what stays out of its reach."""

import pytest
import torch
from torch import nn

from steerrec.attachment import attach
from steerrec.hooks import edit
from steerrec.sites import Site
from steerrec.steering import SteerTransform

from .small_models import ALL, REAL, USER, WIDTH, random_sae, random_steering, some_ids

SAE, STEERING = random_sae(), random_steering()
SITES = {"user": USER, "real": REAL, "all": ALL, "last": Site("norm", positions_from="last")}


class Writing(nn.Module):
    """Keeps what its norm emits, and writes zeros into what the hooks make of it."""

    def __init__(self, newest_only: bool) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embedding = nn.Embedding(12, WIDTH, padding_idx=0)
            self.norm = nn.LayerNorm(WIDTH)
        self.newest_only = newest_only
        self.emitted = None
        self.norm.register_forward_hook(self.keep)
        self.eval().requires_grad_(False)

    def keep(self, _, __, output):
        self.emitted = output

    def forward(self, ids):
        states = self.embedding(ids)
        if self.newest_only:
            last = (ids != 0).sum(dim=1).clamp_min(1) - 1
            states = states[torch.arange(len(ids)), last][:, None]
        found = self.norm(states)
        copied = found.clone()
        found.zero_()
        return copied


def rows_of(site, ids, emitted):
    if emitted.shape[1] == 1 or site.positions == "all":
        return emitted.reshape(-1, WIDTH)
    if site.positions == "real":
        return emitted[ids != 0]
    last = (ids != 0).sum(dim=1) - 1
    if site.positions_from == "last":
        last = torch.full_like(last, ids.shape[1] - 1)
    return emitted[torch.arange(len(ids)), last]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("newest_only", [False, True])
@pytest.mark.parametrize("name", SITES)
def test_what_the_model_writes_changes_neither_latents_nor_what_it_emitted(
    name, newest_only, batch
):
    if name in ("real",) and newest_only:
        pytest.skip("a layer that ran for one item has no other positions")
    model, ids, site = Writing(newest_only), some_ids(batch, seed=batch), SITES[name]
    plain = model(ids)
    rows = rows_of(site, ids, plain)
    for steering in (None, STEERING):
        with attach(model, SAE, site=site, steering=steering) as attachment:
            output = model(ids)
            expected = SAE.encode(rows)
            assert torch.equal(attachment.latents.indices, expected.indices)
            assert torch.equal(attachment.latents.values, expected.values)
        if steering is None:
            assert torch.equal(output, plain)
        else:
            torch.testing.assert_close(
                rows_of(site, ids, output), SteerTransform(SAE, STEERING)(rows)
            )
            assert torch.equal(model.emitted, plain)  # the hook gave the model another tensor


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("newest_only", [False, True])
@pytest.mark.parametrize("name", ["user", "all", "last"])
def test_an_edit_may_keep_what_it_returns(name, newest_only, batch):
    model, ids, site = Writing(newest_only), some_ids(batch, seed=batch), SITES[name]
    kept = []

    def function(rows):
        kept.append(rows + 1.0)
        return kept[-1]

    with edit(model, site, function):
        output = model(ids)
    assert kept[0].abs().sum() > 0
    assert torch.equal(rows_of(site, ids, output), kept[0])


@pytest.mark.parametrize("layout", ["BH", "BLH"])
def test_a_layer_whose_rows_are_all_of_its_tensor(layout):
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.ReLU(inplace=True))
    shape = (4, WIDTH) if layout == "BH" else (2, 2, WIDTH)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    site = Site("0", layout=layout, positions="user" if layout == "BH" else "all")
    rows = model[0](x).reshape(-1, WIDTH)
    with attach(model, SAE, site=site, steering=STEERING) as attachment, torch.no_grad():
        output = model(x)
        assert torch.equal(attachment.latents.dense(32), SAE.encode(rows).dense(32))
    steered = SteerTransform(SAE, STEERING)(rows).relu().reshape(shape)
    torch.testing.assert_close(output, steered)
