"""Responses of neurons fitted to scores less prices: the inner loop of learned steering.

Model and SAE stay frozen. Each list slot of an item has a price (`steerrec.objectives`); users'
scores less the prices are what the steered scores are fitted to, as distributions that live on the
items near the top of each user's list. Prices follow the exposure that the steered lists have now,
and grow. Not here: when to stop, and which responses to use (`steerrec.learning`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerrec.activations import collect_user_vectors
from steerrec.autoencoder import Latents, SparseAutoencoder
from steerrec.data import Histories
from steerrec.errors import TrainingError
from steerrec.objectives import Objective
from steerrec.operations import respond
from steerrec.progress import track
from steerrec.recommender import ItemHead, Recommender
from steerrec.selection import largest

CELLS = 4_000_000
"""At most so many scores are held at once: users of a step times items."""

MASKED = -1e4
"""Score of an item that must not be recommended: finite, so that no gradient is NaN."""

ROUNDED = (
    "the item matrix is rounded; learn with the model's own, and rank by the rounded one afterwards"
)

LOOK_EVERY = 10
"""Steps between two looks at validation."""


WARM_UP = 20
"""Steps until the full learning rate: the first of Adam are as long as any, and know nothing."""

KEPT = 0.9
"""What comes out is a running mean over steps, which keeps so much of itself in each."""

PRICE_RATE = 0.05
"""Exposure is a running mean over steps, of which the last has this share."""


@dataclass(frozen=True)
class SteeringTraining:
    """How steering is learned.

    Attributes
    ----------
    neurons
        Only so many neurons respond: those that contribute most when all do, fitted again alone.
        All of them by default.
    l1
        Pull of each response towards 0, as a share of the fastest that it could grow; what is
        pulled harder than it is used becomes exactly 0.
    steps
        At most so many; it ends when the budget is spent.
    users
        User vectors in a step, fewer for a large catalogue.
    learning_rate
        Adam's.
    growth
        By how much the highest price grows in a step, in units of the mean temperature.
    focus
        How far down the list accuracy and exposure count: the perplexity of each user's scores is
        brought to this many list lengths by a temperature.
    latest
        How many of each user's latest training states are learned from.
    rows
        At most so many states, of users drawn at random.
    valid_users
        Choose on at most so many validation users, drawn at random.
    seed
        Same seed, same recipe.
    """

    neurons: int | None = None
    l1: float = 0.0
    steps: int = 300
    users: int = 1024
    learning_rate: float = 0.01
    growth: float = 0.05
    focus: float = 1.5
    latest: int = 12
    rows: int = 100_000
    valid_users: int = 10_000
    seed: int = 0


class Snapshot(NamedTuple):
    """Responses after some steps."""

    vectors: Tensor
    constant: Tensor
    step: int
    price: float


class ResponseFit:
    """The responses, while they are learned.

    Parameters
    ----------
    rec, sae
        The frozen recommender, and an SAE of its own site.
    train
        Training histories.
    objective
        Supplies the prices.
    k, mask_seen
        Length of the lists, and whether items of a user's history are left out of them.
    training
        Procedure.
    """

    def __init__(
        self,
        rec: Recommender,
        sae: SparseAutoencoder,
        train: Histories,
        objective: Objective,
        *,
        k: int,
        mask_seen: bool,
        training: SteeringTraining,
    ) -> None:
        self.head: ItemHead = rec.item_head
        self.objective, self.training, self.k = objective, training, k
        self.size = max(16, min(training.users, CELLS // len(self.head)))
        self.train, self.mask_seen = train, mask_seen
        rng = np.random.default_rng(training.seed)
        self.users, self.lengths = latest_states(train, training.latest, training.rows, rng)
        states = train.prefixes(self.users, self.lengths, rec.max_length)
        x = collect_user_vectors(rec, states, description="training states")
        self.x = x.to(self.head.weight)
        self.latents = encode_users(sae, self.x)
        self.heat = self.x.new_zeros(len(self.x), 1)  # 0 where it has not been asked for yet
        self.generator = torch.Generator().manual_seed(training.seed)
        self.allowed = torch.ones(sae.d_sae, 1, device=self.x.device)
        self.start()

    def start(self) -> None:
        """Forget what has been learned."""
        d_sae, like = len(self.allowed), self.x
        self.vectors = torch.zeros(d_sae, like.shape[1], device=like.device, requires_grad=True)
        self.constant = torch.zeros(like.shape[1], device=like.device, requires_grad=True)
        self.mean = [self.vectors.detach().clone(), self.constant.detach().clone()]
        self.step, self.price = 0, 0.0
        self.exposure = torch.zeros(len(self.head), device=like.device)
        temperatures = []
        for rows in self.batches(4):
            scores = self.scores(self.x[rows], rows)
            self.exposure += self.slots(scores) / 4
            temperatures.append(self.temperatures(rows, scores))
        self.unit = float(torch.cat(temperatures).mean())
        self.prices = self.objective.prices(self.exposure).to(like)

    def keep(self, neurons: int) -> None:
        """Let only the neurons that contribute most take part, and start again."""
        values, indices = self.latents
        square = torch.zeros_like(self.allowed[:, 0])
        square.index_add_(0, indices.flatten(), values.flatten().square())
        size = square.sqrt() * self.vectors.detach().norm(dim=1)
        self.allowed.zero_()
        self.allowed[size.argsort(descending=True, stable=True)[:neurons]] = 1
        self.start()

    def looks(self) -> Iterator[Snapshot]:
        """Learn, and yield the responses as they are after every `LOOK_EVERY` steps.

        Whoever takes them decides when it is enough.

        Raises
        ------
        TrainingError
            If the responses are no longer finite.
        """
        training = self.training
        optimizer = torch.optim.Adam(
            [self.vectors, self.constant], lr=training.learning_rate, betas=(0.9, 0.99)
        )
        warming = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARM_UP, total_iters=WARM_UP)
        for rows in track(self.batches(training.steps), "learn steering", unit="step"):
            self.price += training.growth * self.unit
            optimizer.zero_grad()
            exposure = self.backward(rows)
            assert self.vectors.grad is not None
            self.vectors.grad *= self.allowed
            optimizer.step()
            warming.step()
            self.shrink()
            for mean, now in zip(self.mean, (self.vectors, self.constant), strict=True):
                mean.lerp_(now.detach(), 1 - KEPT)
            self.exposure.lerp_(exposure, PRICE_RATE)
            self.prices = self.objective.prices(self.exposure).to(self.prices)
            self.step += 1
            if self.step % LOOK_EVERY and self.step < training.steps:
                continue
            if not bool(self.constant.isfinite().all() and self.vectors.isfinite().all()):
                raise TrainingError(
                    f"the responses became infinite in step {self.step}; lower the learning rate "
                    f"({training.learning_rate})"
                )
            yield self.snapshot()

    def snapshot(self) -> Snapshot:
        """The responses as they are now, without the noise of the last steps."""
        share = 1 - KEPT**self.step if self.step else 1.0
        vectors, constant = (mean / share for mean in self.mean)
        vectors *= self.vectors.detach().any(dim=1, keepdim=True)  # what was pulled to 0 is 0
        return Snapshot(vectors, constant, self.step, self.price)

    def backward(self, rows: Tensor) -> Tensor:
        """Gradients of the loss of these rows [B], and the exposure that they have now, [N].

        The loss is the KL divergence of the steered scores from the base scores less the prices,
        in units of score (times the temperature), so that a user's weight does not depend on it.
        Its gradient by the steered scores is the difference of the two distributions.
        """
        x = self.x[rows]
        latents = Latents(self.latents.values[rows], self.latents.indices[rows])
        with torch.no_grad():
            base = self.scores(x, rows)
            heat = self.temperatures(rows, base)  # [B, 1]
            wanted = base.sub_(self.price * self.prices).div_(heat).softmax(dim=1)
        change = self.constant + respond(latents, self.vectors)
        steered = self.scores(x + change, rows)
        with torch.no_grad():
            gradient = (steered / heat).softmax(dim=1).sub_(wanted).div_(len(rows))
            exposure = self.slots(steered.detach())
        steered.backward(gradient)
        return exposure

    @torch.no_grad()
    def temperatures(self, rows: Tensor, scores: Tensor) -> Tensor:
        """The temperature of each of these states, [B, 1], from their base scores [B, N]."""
        found = self.heat[rows]
        new = found[:, 0] == 0
        if bool(new.any()):
            found[new] = temperature(scores[new], self.training.focus * self.k)
            self.heat[rows] = found
        return found

    @torch.no_grad()
    def shrink(self) -> None:
        """The proximal step of the L1 norm over neurons (of their responses' L2 norms)."""
        if self.training.l1:
            norm = self.vectors.norm(dim=1, keepdim=True)
            reach = self.training.learning_rate * math.sqrt(self.vectors.shape[1])
            pull = self.training.l1 * reach / norm.clamp_min(1e-12)
            self.vectors.mul_((1 - pull).clamp_min(0))

    def batches(self, steps: int) -> list[Tensor]:
        """Rows of that many steps: all states in random order, and again."""
        size = min(self.size, len(self.x))
        per_pass = len(self.x) // size
        order: list[Tensor] = []
        while len(order) < steps:
            shuffled = torch.randperm(len(self.x), generator=self.generator)
            order += shuffled[: per_pass * size].split(size)
        return order[:steps]

    def scores(self, vectors: Tensor, rows: Tensor) -> Tensor:
        """Scores [B, N] of user vectors [B, H], those of masked items out of reach."""
        scores = self.head.scores(vectors)
        if not self.mask_seen:
            return scores
        users, ends = self.users[rows.numpy()], self.lengths[rows.numpy()]
        seen = self.train.prefixes(users, ends, int(ends.max()))
        row = np.repeat(np.arange(len(seen)), seen.lengths)
        cells = torch.from_numpy(row), torch.from_numpy(seen.items)
        return scores.index_put(cells, scores.new_tensor(MASKED))

    def slots(self, scores: Tensor) -> Tensor:
        """List slots of each item per user, [N]."""
        listed = largest(scores, self.k)[1].flatten()
        return torch.bincount(listed, minlength=scores.shape[1]) / len(scores)


def latest_states(
    train: Histories, latest: int, rows: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each user's training history, and the same without its last 1, 2, … items.

    Parameters
    ----------
    train
        Training histories.
    latest
        How many states of a user.
    rows
        At most so many in all; users are drawn at random if there are more.
    rng
        Source of randomness.

    Returns
    -------
    users, lengths
        Index of the user and number of items of each state, [R].
    """
    chosen = np.flatnonzero(train.lengths > 0)
    if len(chosen) == 0:
        raise TrainingError("no training histories to learn steering from; expected at least one")
    states = np.minimum(train.lengths[chosen], latest)
    if states.sum() > rows:
        order = rng.permutation(len(chosen))
        kept = np.sort(order[: max(1, int((states[order].cumsum() <= rows).sum()))])
        chosen, states = chosen[kept], states[kept]
    users = np.repeat(chosen, states)
    first = np.repeat(states.cumsum() - states, states)
    return users, train.lengths[users] - (np.arange(len(users)) - first)


@torch.no_grad()
def temperature(scores: Tensor, perplexity: float, *, items: int = 128) -> Tensor:
    """The temperature at which the softmax of each row over its best items has this perplexity.

    By bisection between 0.0001 and 1,000; a row of equal scores gets the highest.

    Parameters
    ----------
    scores
        [B, N].
    perplexity
        exp of the entropy, below the number of items that are not masked.
    items
        How many of the best items count.

    Returns
    -------
    Tensor
        [B, 1], positive.
    """
    best = largest(scores, min(items, scores.shape[1]))[0]
    left = (best > MASKED).sum(dim=1, keepdim=True)
    goal = (0.9 * left).clamp(max=perplexity).log()  # [B, 1]
    low, high = (best.new_full((len(best), 1), math.log(end)) for end in (1e-4, 1e3))
    for _ in range(24):
        middle = (low + high) / 2
        log_share = (best / middle.exp()).log_softmax(dim=1)
        flat = -(log_share.exp() * log_share).sum(dim=1, keepdim=True) > goal
        low, high = torch.where(flat, low, middle), torch.where(flat, middle, high)
    return ((low + high) / 2).exp()


@torch.no_grad()
def encode_users(sae: SparseAutoencoder, vectors: Tensor, chunk: int = 4096) -> Latents:
    """Active latents of user vectors [U, H], in chunks of rows."""
    parts = [sae.encode(part.to(sae.W_enc)) for part in vectors.split(chunk)]
    return Latents.joined(parts)
