"""A sequence model small enough for hand work, SAEs to put on it, and recipes that steer them."""

import torch
from torch import Tensor, nn

from steerrec.autoencoder import SparseAutoencoder
from steerrec.sites import Site, TokenIds
from steerrec.steering import Steering

WIDTH = 8
IDS = torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 7, 8]])
TOKENS = TokenIds("embedding")
USER = Site("norm", positions_from=TOKENS)
REAL = Site("norm", positions="real", positions_from=TOKENS)
ALL = Site("norm", positions="all")


class Sequence(nn.Module):
    """Vectors [B, L, 8] of token ids [B, L]; `encode` is `forward` without its hooks."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embedding = nn.Embedding(12, WIDTH, padding_idx=0)
            self.layer = nn.Linear(WIDTH, WIDTH)
            self.norm = nn.LayerNorm(WIDTH)
        self.eval().requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.encode(ids)

    def encode(self, ids: Tensor) -> Tensor:
        return self.norm(torch.relu(self.layer(self.embedding(ids))))


def random_sae(d_in: int = WIDTH, d_sae: int = 32, k: int = 4, seed: int = 0) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(seed)
    sae = SparseAutoencoder(d_in, d_sae, k, generator=generator)
    for parameter in sae.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return sae.requires_grad_(False)


def random_steering(
    d_sae: int = 32, *, alpha: float = 1.0, splice: str = "delta", seed: int = 0
) -> Steering:
    """A recipe that moves every vector a good deal."""
    shift = 2 * torch.randn(d_sae, generator=torch.Generator().manual_seed(seed))
    return Steering(shift, alpha=alpha, splice=splice)


def some_ids(batch: int, length: int = 4, *, seed: int = 0) -> Tensor:
    """Right-padded token ids [B, L] of 1 to L items each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 12, (batch, length), generator=generator)
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    return ids * (torch.arange(length) < lengths)


def replica_of(model: nn.Module, factor: float = 1.0) -> nn.Module:
    """What DataParallel makes of a model for each of several devices, its weights multiplied."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copy in copies.items():
        for name, child in module._modules.items():
            copy._modules[name] = None if child is None else copies[child]
        for name, weight in module._parameters.items():
            setattr(copy, name, None if weight is None else weight.detach() * factor)
    return copies[model]
