"""Training the reference SASRec: losses, batches, early stopping, exact resume."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from steerrec.activations import digest, length_batches
from steerrec.adapters.sasrec import SASRecConfig, SASRecModel, SASRecRecommender
from steerrec.checkpoint import Checkpoint
from steerrec.data import Catalogue, Histories, Split
from steerrec.errors import TrainingError
from steerrec.evaluation import evaluate
from steerrec.progress import track

logger = logging.getLogger(__name__)

Loss = Literal["softmax", "bce", "gbce"]


@dataclass(frozen=True)
class SASRecTraining:
    """How a SASRec is trained.

    Attributes
    ----------
    loss
        `softmax`: cross-entropy over the whole catalogue at every position. For big catalogues
        `bce` (Kang & McAuley 2018) or `gbce` (Petrov & Macdonald 2023) on sampled negatives.
    negatives
        Sampled negatives per position, for `bce` and `gbce`.
    gbce_t
        Calibration t of gBCE, between 0 (plain BCE) and 1.
    epochs
        Upper bound; each epoch sees every training position once. None for as many as make 7,000
        steps, but no fewer than 30: a small data set has few steps an epoch.
    validate_every
        Epochs between validations; None for 30 validations a run.
    patience
        Stop after this many validations without a better nDCG@10. The best weights are kept.
    warmup_steps
        Steps over which the learning rate rises from 0; afterwards it follows a half cosine down
        to a tenth at the last epoch.
    validation_users
        Validate on a seeded sample of at most this many users.
    mask_seen
        Whether validation leaves out the items of the history.
    """

    loss: Loss = "softmax"
    negatives: int = 256
    gbce_t: float = 0.75
    epochs: int | None = None
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup_steps: int = 100
    max_grad_norm: float = 5.0
    patience: int = 6
    validate_every: int | None = None
    validation_users: int = 10_000
    mask_seen: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in get_args(Loss):
            raise TrainingError(f"loss is one of {', '.join(get_args(Loss))}; got {self.loss!r}")


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of ``hidden @ weight.T``; gradients are made chunk by chunk on the way.

    Only one chunk of logits exists at a time, and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        total = hidden.new_zeros(())
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = hidden[part] @ weight.T  # [chunk, N]
            log_norm = logits.logsumexp(dim=1)
            rows = torch.arange(len(logits), device=logits.device)
            total += (log_norm - logits[rows, targets[part]]).sum()
            residual = logits.sub_(log_norm[:, None]).exp_()
            residual[rows, targets[part]] -= 1
            torch.mm(residual, weight, out=grad_hidden[part])
            grad_weight.addmm_(residual.T, hidden[part])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.rows = max(len(hidden), 1)
        return total.div_(ctx.rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        factor = grads[0] / ctx.rows
        return grad_hidden * factor, grad_weight * factor, None, None


def softmax_loss(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int = 512) -> Tensor:
    """Mean full-softmax cross-entropy of P positions, memory bounded by ``chunk * N``.

    Parameters
    ----------
    hidden
        Hidden states [P, H].
    weight
        Item matrix [N, H].
    targets
        The next item's row at each position, [P].
    chunk
        Positions whose logits exist at the same time.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, chunk)
    return loss


class _SampledLoss(torch.autograd.Function):
    """Mean (g)BCE over positives and sampled negatives; one chunk of embeddings at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        negatives: Tensor,
        beta: float,
        chunk: int,
    ) -> Tensor:
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        total = hidden.new_zeros(())
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            h, rows = hidden[part], torch.cat([targets[part, None], negatives[part]], dim=1)
            items = F.embedding(rows, weight)  # [chunk, 1 + n, H], the positive first
            scores = torch.bmm(items, h[:, :, None]).squeeze(2)
            total -= beta * F.logsigmoid(scores[:, 0]).sum() + F.logsigmoid(-scores[:, 1:]).sum()
            residual = scores.sigmoid_()
            residual[:, 0] = beta * (residual[:, 0] - 1)
            grad_hidden[part] = torch.bmm(residual[:, None, :], items).squeeze(1)
            items = torch.mul(residual[:, :, None], h[:, None, :], out=items)
            grad_weight.index_add_(0, rows.flatten(), items.flatten(0, 1))
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.logits = max(len(hidden), 1) * (1 + negatives.shape[1])
        return total.div_(ctx.logits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        factor = grads[0] / ctx.logits
        return grad_hidden * factor, grad_weight * factor, None, None, None, None


def sampled_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    negatives: Tensor,
    *,
    t: float = 0.0,
    chunk: int = 512,
) -> Tensor:
    """Mean gBCE of P positions (gSASRec, Petrov & Macdonald 2023); ``t = 0`` is plain BCE.

    Like theirs, it is a mean over the positive and its n negatives.

    Parameters
    ----------
    hidden
        Hidden states [P, H].
    weight
        Item matrix [N, H].
    targets
        The next item's row at each position, [P].
    negatives
        Sampled rows, [P, n].
    t
        Calibration: the positive's log-likelihood is multiplied by ``a (t (1 - 1/a) + 1/a)`` with
        the sampling rate ``a = n / (N - 1)``.
    chunk
        Positions whose negatives' embeddings exist at the same time.
    """
    rate = negatives.shape[1] / max(len(weight) - 1, 1)
    beta = rate * (t * (1 - 1 / rate) + 1 / rate)
    loss: Tensor = _SampledLoss.apply(hidden, weight, targets, negatives, beta, chunk)
    return loss


def training_windows(train: Histories, max_length: int) -> Histories:
    """Every training position once: histories cut from their end into windows of L + 1 items.

    Consecutive windows share one item: it is the last target of one, the first input of the next.
    """
    lengths = train.lengths
    positions = np.maximum(lengths - 1, 0)
    counts = -(-positions // max_length)
    users = np.repeat(np.arange(len(train)), counts)
    rank = np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)
    ends = lengths[users] - rank * max_length
    return train.prefixes(users, ends, max_length + 1)


def fit_sasrec(
    split: Split,
    catalogue: Catalogue,
    *,
    config: SASRecConfig,
    training: SASRecTraining,
    work: str | Path,
    device: str | torch.device = "cpu",
) -> tuple[SASRecRecommender, dict[str, Any]]:
    """Train a SASRec on the training part of a split.

    After every epoch a checkpoint is written to `work`; a later call with the same arguments and
    data goes on from it and ends in the very weights of an uninterrupted run.

    Parameters
    ----------
    split
        Leave-one-out split; only its training part is learned from, its validation targets decide
        when to stop.
    catalogue
        The items, with training counts.
    config, training
        Architecture and procedure.
    work
        Folder for the checkpoint.
    device
        Where to train.

    Returns
    -------
    rec, summary
        The model with the best validation weights, and a JSON-able record of the run.

    Raises
    ------
    TrainingError
        If a checkpoint of other settings is in the way, or the loss is not finite.
    """
    run = _Run(split, catalogue, config, training, Path(work), torch.device(device))
    run.resume()
    bar = track(range(run.epoch, run.epochs), "epochs", unit="epoch")
    for _ in bar:
        if run.finished:
            break
        run.train_epoch()
        run.validate()
        run.save()
        bar.set_postfix_str(f"loss {run.log[-1]['loss']:.3f}, best nDCG@10 {run.best:.4f}")
    bar.close()
    return run.result()


class _Run:
    """The state of one training run between epochs."""

    def __init__(
        self,
        split: Split,
        catalogue: Catalogue,
        config: SASRecConfig,
        training: SASRecTraining,
        work: Path,
        device: torch.device,
    ) -> None:
        self.split, self.catalogue = split, catalogue
        self.config, self.training, self.device = config, training, device
        self.windows = training_windows(split.train, config.max_position_embeddings)
        if config.padding_side == "left":
            raise TrainingError(
                "padding_side is 'left', which is for models of other libraries; expected 'right': "
                "training windows are padded there"
            )
        if len(catalogue) < 10:
            raise TrainingError(
                f"the catalogue has {len(catalogue)} items; expected at least 10, since nDCG@10 "
                "decides when to stop"
            )
        if not len(self.windows):
            raise TrainingError("nothing to learn from: every training history has a single item")
        steps = -(-len(self.windows) // training.batch_size)
        self.epochs = training.epochs or max(30, -(-7000 // steps))
        self.validate_every = training.validate_every or max(1, self.epochs // 30)
        with _seeded(training.seed, torch.device("cpu")):
            self.model = SASRecModel(config)
        self.model.to(device)  # type: ignore[arg-type]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=training.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=training.weight_decay,
            fused=True,
        )
        self.epoch, self.best, self.stale = 0, -1.0, 0
        self.best_weights = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.log: list[dict[str, float]] = []
        names = {f.name for f in fields(SASRecConfig)} & set(vars(config))
        settings = {
            "config": {name: getattr(config, name) for name in names if _plain(config, name)},
            "training": asdict(training),
            "data": digest(split.train),
        }
        self.checkpoint = Checkpoint(work / "checkpoint.safetensors", settings)

    @property
    def finished(self) -> bool:
        return self.epoch >= self.epochs or self.stale >= self.training.patience

    def batches(self) -> Iterator[np.ndarray]:
        """Window numbers in batches of similar length, in an order of this epoch's own."""
        rng = np.random.default_rng([self.training.seed, self.epoch])
        size = self.training.batch_size
        order = rng.permutation(len(self.windows))
        pools = [order[i : i + 32 * size] for i in range(0, len(order), 32 * size)]
        lengths = self.windows.lengths
        batches = [pool[b] for pool in pools for b in length_batches(lengths[pool], size)]
        yield from (batches[i] for i in rng.permutation(len(batches)))

    def train_epoch(self) -> None:
        started = time.perf_counter()
        batches = list(self.batches())
        losses = torch.zeros((), device=self.device)
        positions = 0
        with _seeded(self.training.seed * 100_003 + self.epoch, self.device):
            self.model.train()
            bar = track(batches, f"epoch {self.epoch + 1}", unit="batch")
            for step, rows in enumerate(bar):
                loss, count = self.loss(rows)
                self.set_learning_rate(self.epoch * len(batches) + step, len(batches))
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.max_grad_norm)
                self.optimizer.step()
                losses += loss.detach() * count
                positions += count
        mean = float(losses) / positions
        if not math.isfinite(mean):
            raise TrainingError(
                f"the loss became {mean} in epoch {self.epoch + 1}; lower the learning rate "
                f"({self.training.learning_rate})"
            )
        self.epoch += 1
        seconds = time.perf_counter() - started
        self.log.append({"epoch": self.epoch, "loss": mean, "seconds": round(seconds, 2)})

    def loss(self, rows: np.ndarray) -> tuple[Tensor, int]:
        """Loss of a batch of windows, and how many positions it is the mean of."""
        windows = self.windows.select(rows)
        width = int(windows.lengths.max())
        ids = torch.from_numpy(windows.padded(width, -1, side="right")).to(self.device)
        inputs, targets = ids[:, :-1] + 1, ids[:, 1:]
        real = targets >= 0
        inputs = inputs * real  # the window's last item is a target only
        hidden = self.model(inputs).last_hidden_state[real]  # [P, H]
        targets = targets[real]
        weight = self.model.item_matrix
        if self.training.loss == "softmax":
            return softmax_loss(hidden, weight, targets), len(targets)
        shape = (len(targets), self.training.negatives)
        negatives = torch.randint(len(weight), shape, device=self.device)
        t = self.training.gbce_t if self.training.loss == "gbce" else 0.0
        return sampled_loss(hidden, weight, targets, negatives, t=t), len(targets)

    def set_learning_rate(self, step: int, steps_per_epoch: int) -> None:
        warmup = self.training.warmup_steps
        done = min(step / (steps_per_epoch * self.epochs), 1.0)
        factor = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))
        if step < warmup:
            factor *= (step + 1) / warmup
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.learning_rate * factor

    def validate(self) -> None:
        if self.epoch % self.validate_every and self.epoch < self.epochs:
            return
        rec = SASRecRecommender(self.model, self.catalogue)
        result = evaluate(
            rec,
            self.split,
            which="valid",
            k=10,
            mask_seen=self.training.mask_seen,
            max_users=self.training.validation_users,
        )
        self.model.requires_grad_(True)
        score = result.metrics["ndcg@10"]
        self.log[-1]["valid_ndcg@10"] = score
        logger.info("epoch %d: %s", self.epoch, self.log[-1])
        if score > self.best:
            self.best, self.stale = score, 0
            self.best_weights = {k: v.clone() for k, v in self.model.state_dict().items()}
        else:
            self.stale += 1

    def save(self) -> None:
        parts = {"model": self.model.state_dict(), "best": self.best_weights}
        state = {"epoch": self.epoch, "best": self.best, "stale": self.stale, "log": self.log}
        self.checkpoint.save(parts, self.optimizer, state)

    def resume(self) -> None:
        found = self.checkpoint.load(self.optimizer)
        if found is None:
            return
        parts, state = found
        self.model.load_state_dict(parts["model"])
        self.best_weights = parts["best"]
        self.epoch, self.best = state["epoch"], state["best"]
        self.stale, self.log = state["stale"], state["log"]

    def result(self) -> tuple[SASRecRecommender, dict[str, Any]]:
        self.model.load_state_dict(self.best_weights)
        summary = {
            "training": asdict(self.training),
            "epochs": self.epoch,
            "best_valid_ndcg@10": self.best,
            "log": self.log,
        }
        return SASRecRecommender(self.model, self.catalogue), summary


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators of the CPU and of a CUDA device; the caller's streams go on untouched."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for used in devices:
            with torch.cuda.device(used):
                torch.cuda.manual_seed(seed)
        yield


def _plain(config: SASRecConfig, key: str) -> bool:
    return isinstance(getattr(config, key), str | int | float | bool | None)
