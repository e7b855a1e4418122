"""Responses of neurons fitted to the very users who are served, or a large sample of them.

The target is that of `steerrec.fitting`, scores less the prices of list slots, but no training
state is looked at: the exposure that sets the prices is that of the lists which are made now, as
for a re-ranker that goes through all users. No item that anyone took next is needed.

A step moves every user vector down its own gradient. What the responses can do of that is a ridge
regression on the active latents: `Projection` is its solution, so that a user whose neurons fire in
many others gets as far as one whose neurons are rare. Scores are computed for items that are in
question only: each user's best before steering, and the best of the others as they are steered now,
looked up anew every few steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from steerrec.autoencoder import Latents, SparseAutoencoder
from steerrec.compiled import as_arrays, served_kernels
from steerrec.data import Histories
from steerrec.errors import TrainingError
from steerrec.fitting import CELLS, MASKED, ROUNDED, Snapshot, encode_users, temperature
from steerrec.item_dtypes import CompactItemHead
from steerrec.objectives import Objective
from steerrec.operations import respond
from steerrec.progress import track
from steerrec.ranking import check_ranking
from steerrec.recommender import ItemHead
from steerrec.selection import largest

WARM_UP = 10
"""Steps until the full learning rate."""

KEPT = 0.8
"""What comes out is a running mean over steps, which keeps so much of itself in each."""

PRICE_RATE = 0.3
"""Exposure is a running mean over steps, of which the last has this share."""


@dataclass(frozen=True)
class ServedTraining:
    """How steering is learned for the users who are served.

    Attributes
    ----------
    growth
        By how much the highest price grows in a step, in units of the median temperature.
    learning_rate
        How far a user vector moves in a step, in each of its dimensions, in units of the users'
        standard deviation.
    focus
        How far down the list accuracy and exposure count: the perplexity of each user's scores is
        brought to this many list lengths by a temperature.
    ridge
        Pull of responses towards 0, as a share of the mean square that a latent has in all users.
    near, fresh
        Items in question: so many of a user's best before steering, and so many of the best of the
        others as they are steered now.
    look_every
        Steps after which the items in question are looked up anew, and a recipe is kept.
    users
        Learn from at most so many users, drawn at random.
    seed
        Same seed, same recipe.
    """

    growth: float = 0.1
    learning_rate: float = 0.025
    focus: float = 1.0
    ridge: float = 1e-3
    near: int = 200
    fresh: int = 100
    look_every: int = 10
    users: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        for part in fields(self):
            value, is_count = getattr(self, part.name), part.type == "int"
            least = (0 if part.name in ("fresh", "seed") else 1) if is_count else 1e-12
            if (is_count and not isinstance(value, int)) or not least <= value < math.inf:
                kind = "an integer" if is_count else "a number"
                raise TrainingError(f"{part.name} is {value}; expected {kind} of at least {least}")


class Projection:
    """From a wanted change of each user's vector to the responses that come nearest to it.

    Ridge regression on the active latents f of the users, [U, d_sae]:
    ``(f'f + p I)^-1 f' = f' (f f' + p I)^-1``, of which the smaller system is solved, once.

    Parameters
    ----------
    latents
        Active latents of the users.
    d_sae
        How many latents there are.
    ridge
        p, as a share of the mean of ``f_j . f_j`` over latents.
    """

    def __init__(self, latents: Latents, d_sae: int, ridge: float) -> None:
        values, indices = latents
        self.d_sae = d_sae
        fires = torch.bincount(indices[values > 0], minlength=d_sae) > 0
        self.alive = fires.nonzero().squeeze(1)
        if not len(self.alive):
            raise TrainingError(
                "no neuron of this SAE fires for these users: there is nothing to steer by"
            )
        place = (fires.cumsum(0) - 1).clamp_min(0)
        self.latents = Latents(values, place[indices])  # of the latents that are alive
        self.is_dual = len(values) < len(self.alive)
        square = self._between_users() if self.is_dual else self._between_latents()
        penalty = ridge * float(values.double().square().sum()) / d_sae
        square.diagonal().add_(max(penalty, torch.finfo(values.dtype).tiny))
        factor, failed = torch.linalg.cholesky_ex(square)
        if bool(failed):
            raise TrainingError(
                f"these users' neurons are too much alike for a ridge of {ridge:g}; raise it"
            )
        del square
        self.inverse = torch.cholesky_inverse(factor).to(values)

    def __call__(self, change: Tensor) -> Tensor:
        """Responses [d_sae, H] for a change [U, H] of all user vectors."""
        found = change.new_zeros(len(self.alive), change.shape[1])
        if self.is_dual:
            change = self.inverse @ change
        self._scatter(change, found)
        if not self.is_dual:
            found = self.inverse @ found
        responses = change.new_zeros(self.d_sae, change.shape[1])
        responses[self.alive] = found
        return responses

    def _scatter(self, change: Tensor, found: Tensor) -> None:
        """Add ``f' change`` to what is found, [alive, H]."""
        arrays = as_arrays(self.latents.values, change, found)
        loops = None if arrays is None else served_kernels()
        if arrays is not None and loops is not None:
            loops.scattered(arrays[0], self.latents.indices.numpy(), *arrays[1:])
            return
        rows = max(1, CELLS // (self.latents.values.shape[1] * change.shape[1]))
        for part, values, indices in zip(
            change.split(rows), *(t.split(rows) for t in self.latents), strict=True
        ):
            scaled = values[:, :, None] * part[:, None]  # [B, w, H]
            found.index_add_(0, indices.flatten(), scaled.flatten(0, 1))

    def _between_latents(self) -> Tensor:
        """``f'f``, float64 [alive, alive]."""
        values, indices = self.latents
        size = len(self.alive)
        found = values.new_zeros(size * size, dtype=torch.float64)
        rows = max(1, CELLS // values.shape[1] ** 2)
        for f, j in zip(values.double().split(rows), indices.split(rows), strict=True):
            cells = j[:, :, None] * size + j[:, None]
            found.index_add_(0, cells.flatten(), (f[:, :, None] * f[:, None]).flatten())
        return found.view(size, size)

    def _between_users(self) -> Tensor:
        """``f f'``, float64 [U, U]."""
        latents = Latents(self.latents.values.double(), self.latents.indices)
        users, size = len(latents.values), len(self.alive)
        found = latents.values.new_empty(users, users)
        for start in range(0, users, 512):
            stop = min(start + 512, users)
            some = Latents(*(t[start:stop] for t in latents)).dense(size)
            found[:, start:stop] = respond(latents, some.T.contiguous())
        return found


class ServedFit:
    """The responses, while they are learned.

    Parameters
    ----------
    head, sae
        Item head of the frozen recommender, and an SAE of the vector that it scores.
    vectors
        User vectors of those who are served, [U, H].
    objective
        Supplies the prices.
    k
        Length of the lists.
    seen
        What is left out of each user's list; nothing if None.
    training
        Procedure.
    """

    def __init__(
        self,
        head: ItemHead,
        sae: SparseAutoencoder,
        vectors: Tensor,
        objective: Objective,
        *,
        k: int,
        seen: Histories | None,
        training: ServedTraining,
    ) -> None:
        if not len(vectors):
            raise TrainingError("no users to learn steering for; expected at least one")
        if isinstance(head, CompactItemHead):
            raise TrainingError(ROUNDED)
        check_ranking(vectors, head, k, seen)
        if not bool(vectors.isfinite().all()):
            raise TrainingError("a user vector is not finite: steering cannot be learned from it")
        self.head, self.objective, self.k, self.training = head, objective, k, training
        weight = F.normalize(head.weight, dim=-1) if head.normalize else head.weight
        weight = weight.detach().float()
        self.weight = (weight if head.scale == 1.0 else weight * head.scale).contiguous()
        self.bias = None if head.bias is None else head.bias.detach().float()
        self.seen = seen
        if len(vectors) > training.users:
            rng = np.random.default_rng(training.seed)
            some = np.sort(rng.choice(len(vectors), training.users, replace=False))
            vectors = vectors[torch.from_numpy(some)]
            self.seen = None if seen is None else seen.select(some)
        vectors = head.cast(vectors)
        values, indices = encode_users(sae, vectors)
        self.x, self.latents = vectors.float(), Latents(values.float(), indices)
        self.spread = float((self.x - self.x.mean(dim=0)).square().mean().sqrt())
        self.d_sae = sae.d_sae
        self.rows = max(16, CELLS // len(head))  # users whose scores of all items are held
        self.near, self.base = self._nearest()
        spread = training.focus * k
        self.heat = temperature(self.base, spread, items=max(128, math.ceil(2 * spread)))
        self.unit = float(self.heat.median())  # one user with hardly an item left is no measure

    @torch.no_grad()
    def looks(self, price: float) -> Iterator[Snapshot]:
        """Learn until the highest price is this many median temperatures.

        Yields the responses, the price in these units, every `look_every` steps.

        Raises
        ------
        TrainingError
            If the responses are no longer finite.
        """
        training, users = self.training, len(self.x)
        if not 0 < price < math.inf:
            raise TrainingError(f"price is {price}; expected a number above 0")
        project = Projection(self.latents, self.d_sae, training.ridge)
        responses = self.x.new_zeros(self.d_sae, self.x.shape[1])
        mean, change = responses.clone(), torch.zeros_like(self.x)
        first, second = torch.zeros_like(self.x), torch.zeros_like(self.x)  # moments, as in Adam
        items, base = self._in_question(change)
        exposure = self._slots(base, items) / users
        every = training.look_every
        last = max(1, math.ceil(price / training.growth / every - 1e-6)) * every
        for step in track(range(1, last + 1), "learn steering for these users", unit="step"):
            now = price * step / last
            prices = now * self.unit * self.objective.prices(exposure).to(base)
            gradient, slots = self._gradient(items, base, change, prices)
            first.lerp_(gradient, 1 - 0.9)
            second.mul_(0.99).addcmul_(gradient, gradient, value=1 - 0.99)
            size = (second / (1 - 0.99**step)).sqrt_().add_(1e-12)
            rate = training.learning_rate * self.spread
            rate *= min(1.0, step / WARM_UP) / (1 - 0.9**step)
            responses -= project(rate * first / size)
            change = respond(self.latents, responses)
            mean.lerp_(responses, 1 - KEPT)
            exposure.lerp_(slots / users, PRICE_RATE)
            if step % every:
                continue
            if not bool(responses.isfinite().all()):
                raise TrainingError(
                    f"the responses became infinite in step {step}; lower the learning rate "
                    f"({training.learning_rate})"
                )
            kept = mean / (1 - KEPT**step)
            yield Snapshot(kept, kept.new_zeros(kept.shape[1]), step, now)
            if step < last:
                items, base = self._in_question(change)

    def _gradient(
        self, items: Tensor, base: Tensor, change: Tensor, prices: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of each user's loss by the user vector, [U, H]; and list slots of each item, [N].

        The loss is that of `ResponseFit.backward`, over the items in question.
        """
        found, scores = torch.empty_like(self.x), torch.empty_like(base)
        if not self._pull(items, base, change, prices, scores, found):
            rows = max(1, CELLS // 4 // (items.shape[1] * self.x.shape[1]))
            for start in range(0, len(items), rows):
                part = slice(start, start + rows)
                heat, their = self.heat[part], items[part]
                with torch.enable_grad():
                    moved = (self.x[part] + change[part]).requires_grad_()
                    steered = self._scores(moved, their)
                    if self.seen is not None:
                        steered = steered.masked_fill(base[part] <= MASKED, MASKED)
                scores[part] = steered.detach()
                wanted = ((base[part] - prices[their]) / heat).softmax(dim=1)
                off = (scores[part] / heat).softmax(dim=1).sub_(wanted)
                (found[part],) = torch.autograd.grad(steered, moved, off)
        return found, self._slots(scores, items)

    def _pull(
        self,
        items: Tensor,
        base: Tensor,
        change: Tensor,
        prices: Tensor,
        scores: Tensor,
        found: Tensor,
    ) -> bool:
        """Scores and gradients by compiled loops; False, and nothing done, where torch has to."""
        if self.head.normalize:  # scores are not linear in the user vector
            return False
        heat = self.heat.squeeze(1)
        arrays = as_arrays(self.weight, base, change, prices, heat, scores, found)
        loops = None if arrays is None else served_kernels()
        if arrays is None or loops is None:
            return False
        loops.pulled(arrays[0], items.numpy(), *arrays[1:])
        return True

    def _scores(self, vectors: Tensor, items: Tensor) -> Tensor:
        """Scores [B, C] of items [B, C] for user vectors [B, H]."""
        if self.head.normalize:
            vectors = F.normalize(vectors, dim=-1)
        rows = self.weight.index_select(0, items.flatten()).view(*items.shape, -1)
        scores = torch.bmm(rows, vectors[:, :, None]).squeeze(2)
        return scores if self.bias is None else scores + self.bias[items]

    def _slots(self, scores: Tensor, items: Tensor) -> Tensor:
        """List slots of each item, [N], by scores [B, C] of items [B, C]."""
        best, places = largest(scores, min(self.k, scores.shape[1]))
        listed = items.gather(1, places)[best > MASKED / 2]  # the others are masked
        return torch.bincount(listed, minlength=len(self.head)).to(scores)

    def _all_scores(self, vectors: Tensor, start: int) -> Tensor:
        """Scores [B, N] for users from `start` on, those of masked items out of reach."""
        scores = self.head.scores(self.head.cast(vectors)).float()
        if self.seen is not None:
            some = self.seen.select(np.arange(start, start + len(vectors)))
            row = np.repeat(np.arange(len(some)), some.lengths)
            scores[torch.from_numpy(row), torch.from_numpy(some.items)] = MASKED
        return scores

    @torch.no_grad()
    def _nearest(self) -> tuple[Tensor, Tensor]:
        """Each user's best items before steering and their scores, [U, near] each."""
        parts, near = [], max(self.training.near, 2 * self.k)
        for start in range(0, len(self.x), self.rows):
            scores = self._all_scores(self.x[start : start + self.rows], start)
            parts.append(largest(scores, min(near, len(self.head))))
        scores, items = (torch.cat(part) for part in zip(*parts, strict=True))
        return items, scores

    def _in_question(self, change: Tensor) -> tuple[Tensor, Tensor]:
        """Items in question and their scores before steering, [U, C] each."""
        fresh = min(self.training.fresh, len(self.head) - self.near.shape[1])
        if not fresh:
            return self.near, self.base
        parts = []
        for start in range(0, len(self.x), self.rows):
            part = slice(start, start + self.rows)
            scores = self._all_scores(self.x[part] + change[part], start)
            scores.scatter_(1, self.near[part], 2 * MASKED)
            masked, items = largest(scores, fresh)
            own = self._scores(self.x[part], items).masked_fill_(masked <= MASKED, MASKED)
            parts.append((items, own))
        items, base = (torch.cat(part) for part in zip(*parts, strict=True))
        return torch.cat([self.near, items], dim=1), torch.cat([self.base, base], dim=1)
