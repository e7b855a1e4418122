"""A model of a shape that nobody planned for: wrapped in a few lines, attached, scored, steered."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import steerrec
from steerrec.data import simulate
from steerrec.recommender import ItemHead


class TwoTowers(nn.Module):
    """Cosine of a user and an item tower over a temperature; takes a dict, returns one."""

    def __init__(self, items, width=16):
        super().__init__()
        self.tokens = nn.Embedding(items + 1, width, padding_idx=items)
        self.user_tower = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.item_tower = nn.Linear(width, width)

    def items(self):
        return self.item_tower(self.tokens.weight[:-1])

    def forward(self, batch):
        mask = batch["mask"].unsqueeze(-1)
        mean = (self.tokens(batch["ids"]) * mask).sum(dim=1) / mask.sum(dim=1)
        user = F.normalize(self.user_tower(mean), dim=-1)
        return {"logits": user @ F.normalize(self.items(), dim=-1).T / 0.07}


def test_two_towers_with_string_ids_from_wrapping_to_steering():
    data = simulate(users=120, items=40, seed=0)
    catalogue = steerrec.Catalogue.from_interactions(data)
    torch.manual_seed(0)
    model = TwoTowers(len(catalogue))

    rec = steerrec.wrap(
        model,
        catalogue,
        score=lambda batch: model(batch)["logits"],
        make_batch=lambda ids: {"ids": ids, "mask": ids != len(catalogue)},
        site="user_tower",
        item_head=lambda: ItemHead(model.items(), scale=1 / 0.07, normalize=True),
        padding="right",  # a mean does not tell
        max_length=20,
    )

    assert rec.scheme.first_id == 0
    assert rec.scheme.pad_id == len(catalogue)
    assert isinstance(rec, steerrec.Recommender)
    histories = steerrec.build_histories(data, catalogue)
    split = steerrec.leave_one_out(histories, len(catalogue))
    sae, _ = steerrec.fit_autoencoder(
        rec, split.train, training=steerrec.SAETraining(latents=64, k=8, epochs=3, batch_size=128)
    )
    contrast = steerrec.popularity_contrast(catalogue)
    table = steerrec.score_neurons(rec, sae, contrast, split.train, users=200)
    base = steerrec.recommend(rec, histories)
    with steerrec.attach(rec, sae, steering=steerrec.Steering.popsteer(table, alpha=2.0)):
        lists = steerrec.recommend(rec, histories)
    counts = catalogue.counts
    assert not np.array_equal(lists.ids, base.ids)
    assert counts[lists.ids].mean() < counts[base.ids].mean()
    transform = steerrec.SteerTransform(sae, steerrec.Steering.popsteer(table, alpha=2.0))
    same = steerrec.recommend(rec, histories, transform=transform)
    assert torch.equal(same.ids, lists.ids)
