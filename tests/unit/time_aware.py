"""Small models that read when interactions were made, or what kind they were, beside items."""

import torch
from torch import Tensor, nn

HOUR = 3600


class TimeAware(nn.Module):
    """Attention from the newest item back, with a bias by how long ago each one was.

    Ids 1..N and times in seconds, [B, L] each, padded with 0 on the right or on the left.
    """

    def __init__(self, items: int, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.items = nn.Embedding(items + 1, width, padding_idx=0)
        self.gaps = nn.Embedding(16, width)  # by the power of two of the hours
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        ids, times = batch["ids"], batch["times"]
        real = ids != 0
        newest = torch.where(real, times, times.min()).amax(dim=1, keepdim=True)
        hours = (newest - times).clamp(min=0) / HOUR
        buckets = (hours + 1).log2().long().clamp(max=15)  # [B, L]
        x = self.items(ids)
        last = (real * torch.arange(1, ids.shape[1] + 1)).argmax(dim=1)
        query = self.query(x[torch.arange(len(ids)), last])  # [B, H]
        logits = (query[:, None] * (self.key(x) + self.gaps(buckets))).sum(dim=-1)
        weights = logits.masked_fill(~real, -torch.inf).softmax(dim=1)
        users = self.norm((weights[..., None] * x).sum(dim=1))
        return users @ self.items.weight[1:].T


class EventAware(nn.Module):
    """A GRU over item vectors plus a vector for the kind of event, which takes both at once."""

    def __init__(self, items: int, events: int, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = EventEncoder(items, events, width)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        states = self.encoder(batch["events"], batch["ids"])  # the ids come second
        last = (batch["ids"] != 0).sum(dim=1) - 1
        users = states[torch.arange(len(states)), last]
        return users @ self.encoder.items.weight[1:].T


class EventEncoder(nn.Module):
    def __init__(self, items: int, events: int, width: int) -> None:
        super().__init__()
        self.items = nn.Embedding(items + 1, width, padding_idx=0)
        self.events = nn.Embedding(events, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.out = nn.Linear(width, width)

    def forward(self, events: Tensor, ids: Tensor) -> Tensor:
        states, _ = self.gru(self.events(events) + self.items(ids))
        states: Tensor = self.out(states)
        return states
