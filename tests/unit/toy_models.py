"""Small models for the tests that need a real one, and a look at the hooks left on a model."""

from typing import Any

import polars as pl
import torch
from torch import nn

from steerrec.adapters.sasrec import SASRecConfig, SASRecModel, SASRecRecommender
from steerrec.data import Catalogue


def hooked(model: nn.Module) -> list[str]:
    """Names of the modules that have a forward hook of any kind."""
    return [
        name
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    ]


def tiny_catalogue(items: int) -> Catalogue:
    """Items "i0", "i1", …; the first one seen most often."""
    rows = range(items)
    return Catalogue(
        pl.DataFrame(
            {
                "row": rows,
                "item_id": [f"i{row}" for row in rows],
                "title": [f"Item {row}" for row in rows],
                "count": [items - row for row in rows],
            }
        )
    )


def tiny_config(items: int = 12, **settings: Any) -> SASRecConfig:
    """Two layers, two heads, width 8, window 6; weights large enough to matter."""
    small = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "max_position_embeddings": 6,
        "initializer_range": 0.5,
    }
    return SASRecConfig(num_items=items, **(small | settings))


def tiny_sasrec(items: int = 12, *, seed: int = 0, **settings: Any) -> SASRecRecommender:
    """An untrained SASRec with the configuration of `tiny_config`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SASRecModel(tiny_config(items, **settings))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # they start as zeros, which would hide what they do
                nn.init.normal_(parameter, std=0.1)
    return SASRecRecommender(model, tiny_catalogue(items))
