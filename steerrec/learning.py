"""Learned steering: responses of neurons, fitted so that lists meet an exposure objective.

Model and SAE stay frozen. Each list slot of an item has a price (`steerrec.objectives`); users'
scores less the prices are what the steered scores are fitted to, as distributions that live on the
items near the top of each user's list. Prices follow the exposure that the steered lists have now,
and grow until validation accuracy has fallen past the budget; the strength is then chosen on
validation within it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerrec.activations import collect_user_vectors
from steerrec.autoencoder import Latents, SparseAutoencoder
from steerrec.data import Histories, Split
from steerrec.errors import ArtifactError, TrainingError
from steerrec.metrics import RankingMetrics
from steerrec.objectives import Objective, named_objective
from steerrec.operations import ResponseSteering, respond
from steerrec.progress import track
from steerrec.ranking import top_k
from steerrec.recommender import ItemHead, Recommender
from steerrec.selection import largest

CELLS = 4_000_000
"""At most so many scores are held at once: users of a step times items."""

MASKED = -1e4
"""Score of an item that must not be recommended: finite, so that no gradient is NaN."""

STRENGTHS = tuple(i / 16 for i in range(1, 21))
"""Strengths tried on validation."""

CHECK_EVERY = 10
"""Steps between two looks at validation."""

PATIENCE = 3
"""Looks in a row that find too much accuracy lost before learning ends."""

LEAST_REACH = 0.1
"""For however small a budget responses are learned up to this loss: a little of what gives a lot
is better than what gives a little, whose effect drowns in the noise of validation."""


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
    growth: float = 0.06
    focus: float = 1.5
    latest: int = 12
    rows: int = 100_000
    valid_users: int = 10_000
    seed: int = 0


def learn_steering(
    rec: Recommender,
    sae: SparseAutoencoder,
    split: Split,
    *,
    objective: str | Objective = "gini",
    budget: float = 0.05,
    k: int = 10,
    mask_seen: bool = False,
    training: SteeringTraining | None = None,
) -> ResponseSteering:
    """Learn steering on training histories, and choose its strength on validation.

    Parameters
    ----------
    rec, sae
        The frozen recommender, and an SAE of its own site.
    split
        Training histories to learn from; validation users to choose on. Test is not looked at.
    objective
        `gini`, `popularity`, `tail_share`, or an `Objective`.
    budget
        Share of validation nDCG that may be given. At the strength of the result it is kept, and
        so is nDCG on tail targets; if no strength keeps both, the result is the identity.
    k, mask_seen
        Length of the lists, and whether items of a user's history are left out of them.
    training
        Procedure.

    Returns
    -------
    ResponseSteering
        `alpha` is the strength chosen; for other budgets up to this one take another strength.

    Raises
    ------
    TrainingError
        If there is nothing to learn from, or a setting makes no sense.
    """
    if not 0 <= budget < 1:
        raise TrainingError(f"budget is {budget}; expected a share of nDCG from 0 to below 1")
    training = training or SteeringTraining()
    if training.neurons is not None and not 0 < training.neurons <= sae.d_sae:
        raise TrainingError(
            f"{training.neurons} neurons asked for; this SAE has {sae.d_sae}, and at least 1 is "
            "needed"
        )
    if sae.d_in != rec.item_head.width:
        raise ArtifactError(
            f"the SAE reads vectors of width {sae.d_in}, the item head {rec.item_head.width}; "
            "learned steering needs an SAE of the vector that the scores are computed from"
        )
    if isinstance(objective, str):
        groups = torch.from_numpy(rec.catalogue.groups.labels.copy())
        objective = named_objective(objective, torch.from_numpy(split.counts.copy()), groups)
    nothing = torch.zeros_like(sae.W_dec, device="cpu")
    record: dict[str, Any] = {
        "rule": "learned",
        "objective": objective.name,
        "budget": budget,
        "k": k,
        "mask_seen": mask_seen,
        "training": asdict(training),
    }
    name = f"learned-{objective.name}"
    if budget == 0:
        return ResponseSteering(nothing, nothing[0].clone(), 0.0, name, record)
    judge = _Judge(rec, sae, split, objective, budget, k, mask_seen, training)
    fit = _Fit(rec, sae, split, objective, judge, k, mask_seen, training)
    found = fit.run()
    if training.neurons is not None:
        fit.keep(training.neurons)
        found = fit.run()
    alpha, chosen, measured = judge.choose(found)
    record |= {"steps": chosen.step, "price": chosen.price, "valid": measured}
    return ResponseSteering(chosen.vectors.cpu(), chosen.constant.cpu(), alpha, name, record)


class _Snapshot(NamedTuple):
    """Responses after some steps."""

    vectors: Tensor
    constant: Tensor
    step: int
    price: float


class _Judge:
    """What steering does to the lists of the validation users."""

    def __init__(
        self,
        rec: Recommender,
        sae: SparseAutoencoder,
        split: Split,
        objective: Objective,
        budget: float,
        k: int,
        mask_seen: bool,
        training: SteeringTraining,
    ) -> None:
        histories, targets = split.held_out("valid")
        if len(histories) > training.valid_users:
            rng = np.random.default_rng(training.seed)
            drawn = np.sort(rng.choice(len(histories), training.valid_users, replace=False))
            histories, targets = histories.select(drawn), targets[drawn]
        self.head, self.objective, self.budget, self.k = rec.item_head, objective, budget, k
        self.seen = histories if mask_seen else None
        self.targets = torch.from_numpy(targets.copy())
        self.counts = torch.from_numpy(split.counts.copy())
        self.groups = torch.from_numpy(rec.catalogue.groups.labels.copy())
        vectors = collect_user_vectors(rec, histories, description="valid users")
        self.vectors = vectors.to(self.head.weight)
        self.latents = _encode(sae, self.vectors)
        self.base = self.measure(self.vectors)

    def measure(self, vectors: Tensor) -> dict[str, float]:
        """nDCG, nDCG on tail targets, and the objective."""
        lists = top_k(vectors, self.head, self.k, seen=self.seen)
        metrics = RankingMetrics(self.counts, self.groups, self.k)
        metrics.update(lists.ids, self.targets)
        found = metrics.compute()
        return {
            "ndcg": found[f"ndcg@{self.k}"],
            "ndcg_tail": found[f"ndcg_tail@{self.k}"],
            self.objective.name: self.objective.value(metrics.exposure),
        }

    def admits(self, measured: dict[str, float], budget: float) -> bool:
        """Whether a budget is kept, and nDCG on tail targets (NaN where there are none)."""
        return (
            measured["ndcg"] >= (1 - budget) * self.base["ndcg"]
            and not measured["ndcg_tail"] < self.base["ndcg_tail"]
        )

    def at_full_strength(self, snapshot: _Snapshot) -> dict[str, float]:
        """What responses do at strength 1."""
        change = snapshot.constant + respond(self.latents, snapshot.vectors)
        return self.measure(self.vectors + change)

    def choose(self, snapshots: list[_Snapshot]) -> tuple[float, _Snapshot, dict[str, float]]:
        """The admissible strength and responses with the lowest objective; strength 0 is one."""
        best, found, chosen = 0.0, self.base, snapshots[0]
        for snapshot in snapshots:
            change = snapshot.constant + respond(self.latents, snapshot.vectors)
            for alpha in track(STRENGTHS, "strengths", unit="alpha"):
                there = self.measure(self.vectors + alpha * change)
                better = there[self.objective.name] < found[self.objective.name]
                if better and self.admits(there, self.budget):
                    best, found, chosen = alpha, there, snapshot
        return best, chosen, found


class _Fit:
    """The responses, while they are learned."""

    def __init__(
        self,
        rec: Recommender,
        sae: SparseAutoencoder,
        split: Split,
        objective: Objective,
        judge: _Judge,
        k: int,
        mask_seen: bool,
        training: SteeringTraining,
    ) -> None:
        self.head: ItemHead = rec.item_head
        self.objective, self.judge, self.training, self.k = objective, judge, training, k
        self.size = max(16, min(training.users, CELLS // len(self.head)))
        self.train = split.train
        self.mask_seen = mask_seen
        rng = np.random.default_rng(training.seed)
        self.users, self.lengths = latest_states(split.train, training.latest, training.rows, rng)
        states = split.train.prefixes(self.users, self.lengths, rec.max_length)
        x = collect_user_vectors(rec, states, description="training states")
        self.x = x.to(self.head.weight)
        self.latents = _encode(sae, self.x)
        self.generator = torch.Generator().manual_seed(training.seed)
        self.allowed = torch.ones(sae.d_sae, 1, device=self.x.device)
        self.start()

    def start(self) -> None:
        """Forget what has been learned."""
        d_sae, like = len(self.allowed), self.x
        self.vectors = torch.zeros(d_sae, like.shape[1], device=like.device, requires_grad=True)
        self.constant = torch.zeros(like.shape[1], device=like.device, requires_grad=True)
        self.step, self.price = 0, 0.0
        self.exposure = torch.zeros(len(self.head), device=like.device)
        temperatures = []
        for rows in self.batches(4):
            scores = self.scores(self.x[rows], rows)
            self.exposure += self.slots(scores) / 4
            temperatures.append(temperature(scores, self.training.focus * self.k))
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

    def run(self) -> list[_Snapshot]:
        """Learn until validation no longer admits what comes out.

        Returns
        -------
        list
            The responses that were best within the budget, and the last within twice the budget:
            at a lower strength these may be better still.
        """
        training, judge = self.training, self.judge
        optimizer = torch.optim.Adam(
            [self.vectors, self.constant], lr=training.learning_rate, betas=(0.9, 0.99)
        )
        best = last = self.snapshot()
        lowest, refused = judge.base[self.objective.name], 0
        for rows in track(self.batches(training.steps), "learn steering", unit="step"):
            self.price += training.growth * self.unit
            loss, exposure = self.loss(rows)
            optimizer.zero_grad()
            loss.backward()
            assert self.vectors.grad is not None
            self.vectors.grad *= self.allowed
            optimizer.step()
            self.shrink()
            self.exposure.lerp_(exposure, 0.05)
            self.prices.lerp_(self.objective.prices(self.exposure).to(self.prices), 0.05)
            self.step += 1
            if self.step % CHECK_EVERY:
                continue
            if not bool(loss.isfinite()):
                raise TrainingError(
                    f"the loss became {float(loss)} in step {self.step}; lower the learning rate "
                    f"({training.learning_rate})"
                )
            now = self.snapshot()
            measured = judge.at_full_strength(now)
            if judge.admits(measured, judge.budget) and measured[self.objective.name] < lowest:
                best, lowest = now, measured[self.objective.name]
            if judge.admits(measured, max(2 * judge.budget, LEAST_REACH)):
                last, refused = now, 0
            elif (refused := refused + 1) == PATIENCE:
                break
        return [last] if best.step in (0, last.step) else [best, last]

    def snapshot(self) -> _Snapshot:
        """The responses as they are now."""
        vectors, constant = self.vectors.detach().clone(), self.constant.detach().clone()
        return _Snapshot(vectors, constant, self.step, self.price)

    def loss(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """KL divergence of the steered scores from the base scores less the prices, and exposure.

        In units of score (times the temperature), so that a user's weight does not depend on it.
        """
        x = self.x[rows]
        latents = Latents(self.latents.values[rows], self.latents.indices[rows])
        with torch.no_grad():
            base = self.scores(x, rows)
            heat = temperature(base, self.training.focus * self.k)  # [B, 1]
            wanted = ((base - self.price * self.prices) / heat).log_softmax(dim=1)
            weight = wanted.exp()
        change = self.constant + respond(latents, self.vectors)
        steered = self.scores(x + change, rows)
        got = (steered / heat).log_softmax(dim=1)
        divergence = (weight * (wanted - got)).sum(dim=1, keepdim=True)
        return (divergence * heat).mean(), self.slots(steered.detach())

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
        exp of the entropy, below the number of items.
    items
        How many of the best items count.

    Returns
    -------
    Tensor
        [B, 1], positive.
    """
    best = largest(scores, min(items, scores.shape[1]))[0]
    goal = math.log(min(perplexity, 0.9 * best.shape[1]))
    low, high = (best.new_full((len(best), 1), math.log(end)) for end in (1e-4, 1e3))
    for _ in range(24):
        middle = (low + high) / 2
        log_share = (best / middle.exp()).log_softmax(dim=1)
        flat = -(log_share.exp() * log_share).sum(dim=1, keepdim=True) > goal
        low, high = torch.where(flat, low, middle), torch.where(flat, middle, high)
    return ((low + high) / 2).exp()


@torch.no_grad()
def _encode(sae: SparseAutoencoder, vectors: Tensor, chunk: int = 4096) -> Latents:
    """Active latents of user vectors [U, H], in chunks of rows."""
    parts = [sae.encode(part.to(sae.W_enc)) for part in vectors.split(chunk)]
    return Latents.joined(parts)
