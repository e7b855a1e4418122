"""Fitting a sparse autoencoder to captured activations: loop, exact resume, report.

What a step computes is in `sae_steps`, which latents are active in it in `sae_rules`.
"""

from __future__ import annotations

import logging
import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from steerrec import distributed
from steerrec.activations import ActivationSampling, ActivationShards, capture_activations
from steerrec.attachment import count_firings
from steerrec.autoencoder import Architecture, SparseAutoencoder
from steerrec.checkpoint import Checkpoint
from steerrec.data import Histories
from steerrec.errors import TrainingError
from steerrec.moments import RunningMoments
from steerrec.progress import track
from steerrec.recommender import Recommender
from steerrec.sae_rules import JumpReLU, rule_of
from steerrec.sae_steps import step
from steerrec.sites import Site
from steerrec.thresholds import largest_so_far
from steerrec.warm_start import check_size, digest, normalised, recentre

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SAETraining:
    """How an SAE is trained.

    Attributes
    ----------
    latents, k
        Number of latents, and how many are active at once (on average, but for topk).
    epochs
        Passes over the captured rows.
    learning_rate
        Peak of Adam's learning rate; it falls linearly to 0 over the second half of the steps.
    aux_k
        How many dead latents the auxiliary loss uses at once.
    aux_weight
        Its weight.
    dead_after
        A latent is dead once it has not been active in this many rows, or in an epoch of them
        where that is less.
    seed
        Same seed, data and machine: same weights.
    architecture
        `topk`: the k largest latents of each row. `batchtopk`: the largest of each batch, k times
        its rows; the result is a jumprelu of one threshold, above which k are active on average.
        `jumprelu`: what is above a threshold of each latent, which is learned.
    bandwidth, sparsity_weight
        Of jumprelu: how far from its threshold a pre-activation moves it, as a share of the
        threshold; and the weight of ``(L0 / k - 1)^2`` in the loss.
    """

    latents: int = 4096
    k: int = 32
    epochs: int = 30
    batch_size: int = 1024
    learning_rate: float = 5e-3
    aux_k: int = 64
    aux_weight: float = 1 / 32
    dead_after: int = 100_000
    seed: int = 0
    architecture: Architecture = "topk"
    bandwidth: float = 0.2
    sparsity_weight: float = 0.1

    def __post_init__(self) -> None:
        if self.architecture not in get_args(Architecture):
            raise TrainingError(
                f"architecture {self.architecture!r}; expected one of "
                f"{', '.join(get_args(Architecture))}"
            )
        if not 0 < self.bandwidth < 2 or not self.sparsity_weight > 0:
            raise TrainingError(
                f"bandwidth {self.bandwidth} and sparsity weight {self.sparsity_weight}; expected "
                "a bandwidth between 0 and 2, and a positive weight"
            )
        if not 0 < self.k <= self.latents:
            raise TrainingError(
                f"k is {self.k}; expected between 1 and the number of latents, {self.latents}"
            )

    @classmethod
    def going_on(cls, sae: SparseAutoencoder, k: int | None = None) -> SAETraining:
        """A short run that goes on from a trained SAE: a sixth of the epochs of a fresh one.

        `k` is wanted for an SAE of another library that does not say how many are active.
        """
        active = sae.k if k is None else k
        if active is None:
            raise TrainingError(
                "the SAE does not say how many latents are active on average; give k"
            )
        return cls(latents=sae.d_sae, k=active, epochs=5, architecture=sae.architecture)


def train_autoencoder(
    shards: ActivationShards,
    training: SAETraining,
    *,
    work: str | Path,
    device: str = "cpu",
    warm_start: SparseAutoencoder | None = None,
) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """Train an SAE from shards, with a true shuffle over all rows and a checkpoint each epoch.

    Inside `distributed.process_group`, under torchrun, all processes train it together.

    Rows are centred and scaled by one number for training; the result is folded back and reads
    raw activations.

    Parameters
    ----------
    shards
        The rows to train on.
    training
        Procedure.
    work
        Folder for the checkpoint; a later call with the same settings goes on from it and ends in
        the very weights of an uninterrupted run.
    device
        Where to train.
    warm_start
        An SAE of raw activations to go on from; by default decoder rows begin at random.

    Returns
    -------
    sae, summary
        The SAE on the CPU, and a JSON-able record of the run.

    Raises
    ------
    TrainingError
        If a checkpoint of other settings is in the way, the loss is not finite, or the SAE to
        start from is of another size.
    """
    run = _Run(shards, training, Path(work), torch.device(device), warm_start)
    run.resume()
    bar = track(range(run.epoch, training.epochs), "SAE epochs", unit="epoch")
    for _ in bar:
        run.train_epoch()
        run.save()
        bar.set_postfix_str(f"FVU {run.log[-1]['fvu']:.4f}, dead {run.log[-1]['dead']}")
    bar.close()
    summary = {"training": asdict(training), "rows": len(shards), "log": run.log}
    return run.finished(), summary


class _Run:
    """The state of one training run between epochs."""

    def __init__(
        self,
        shards: ActivationShards,
        training: SAETraining,
        work: Path,
        device: torch.device,
        warm_start: SparseAutoencoder | None = None,
    ) -> None:
        if len(shards) < training.batch_size // 8 or len(shards) < 2:
            raise TrainingError(
                f"only {len(shards)} rows of activations; expected at least "
                f"{max(2, training.batch_size // 8)}: use more data or a smaller batch size"
            )
        self.shards, self.training, self.device = shards, training, device
        self.mean, self.scale = _normalisation(shards)
        self.rule = rule_of(
            training.architecture,
            training.k,
            training.latents,
            bandwidth=training.bandwidth,
            weight=training.sparsity_weight,
            device=self.device,
        )
        if warm_start is None:
            generator = torch.Generator().manual_seed(training.seed)
            self.sae = SparseAutoencoder(
                shards.width, training.latents, training.k, generator=generator
            ).to(device)
            self.match_length(generator)
        else:
            check_size(warm_start, shards.width, training.latents, training.k)
            self.sae = normalised(warm_start, self.mean, self.scale).to(device)
            recentre(self.sae, self.sample(torch.Generator().manual_seed(training.seed)))
        self.begin()
        self.optimizer = torch.optim.Adam(
            [*self.sae.parameters(), *self.rule.parameters()],
            lr=training.learning_rate,
            betas=(0.9, 0.999),
            fused=True,
        )
        self.epoch = 0
        self.rows_since_fired = torch.zeros(training.latents, dtype=torch.int64, device=device)
        self.log: list[dict[str, float]] = []
        self.dead_after = min(training.dead_after, len(shards))
        settings = {"training": asdict(training), "rows": len(shards), "scale": self.scale}
        if warm_start is not None:
            settings["warm_start"] = digest(warm_start)
        self.checkpoint = Checkpoint(work / "checkpoint.safetensors", settings)

    @torch.no_grad()
    def match_length(self, generator: torch.Generator) -> None:
        """Scale the encoder so that the first reconstructions have the length that fits best.

        With many more latents than dimensions the k chosen decoder rows point much the same way,
        and an encoder equal to their transpose would overshoot several times over.
        """
        x = self.sample(generator)
        x_hat = self.sae(x).x_hat
        self.sae.W_enc.mul_((x * x_hat).sum() / x_hat.square().sum())

    @torch.no_grad()
    def begin(self) -> None:
        """Leave thresholds to the rule: from here on the SAE has none of its own."""
        threshold, self.sae.threshold = self.sae.threshold, None
        if threshold is not None and isinstance(self.rule, JumpReLU):
            self.rule.start_from(threshold)
        elif self.training.architecture != "topk":
            x = self.sample(torch.Generator().manual_seed(self.training.seed))
            self.rule.begin(self.sae.pre_acts(x))

    @torch.no_grad()
    def finished(self) -> SparseAutoencoder:
        """The SAE of raw activations, frozen, on the CPU, with thresholds but for topk."""
        weights: dict[str, Tensor] = dict(self.sae.cpu().state_dict())
        if isinstance(self.rule, JumpReLU):
            weights["threshold"] = self.rule.log_threshold.detach().exp().cpu()
        elif self.training.architecture == "batchtopk":
            weights["threshold"] = self.common_threshold().expand(self.sae.d_sae).contiguous()
        sae = SparseAutoencoder.from_weights(weights, self.training.k)
        return sae.fold_normalisation(self.mean, self.scale).requires_grad_(False)

    def common_threshold(self) -> Tensor:
        """Above it k latents of a row are active on average, over rows drawn at random, []."""
        generator = torch.Generator().manual_seed(self.training.seed + 1)
        x = self.sample(generator, 16_384).cpu()
        count, found = self.training.k * len(x), None
        for part in x.split(1024):
            found = largest_so_far(self.sae.pre_acts(part), count, found)
        return x.new_zeros(()) if found is None or len(found) < count else found[0]

    def sample(self, generator: torch.Generator, rows_at_most: int = 4096) -> Tensor:
        """Some of the rows as they are trained on, [R, H]."""
        rows = torch.randperm(len(self.shards), generator=generator)[:rows_at_most]
        rows = rows.sort().values
        return (self.shards.gather(rows.numpy()) - self.mean).to(self.device) / self.scale

    @property
    def dead(self) -> Tensor:
        """Numbers of the latents that are dead now."""
        return (self.rows_since_fired >= self.dead_after).nonzero().squeeze(1)

    def train_epoch(self) -> None:
        training = self.training
        rng = np.random.default_rng([training.seed, self.epoch])
        order = rng.permutation(len(self.shards))
        size = min(training.batch_size, len(order))
        batches = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        fvu = torch.zeros((), device=self.device)
        mean = self.mean.to(self.device)
        for number, rows in enumerate(track(batches, f"epoch {self.epoch + 1}", unit="batch")):
            x = (self.shards.gather(rows).to(self.device) - mean) / self.scale
            self.set_learning_rate(self.epoch * len(batches) + number, len(batches))
            fvu += self.step(*distributed.share(x))
        value = float(fvu) / len(batches)
        if not all(bool(tensor.isfinite().all()) for tensor in self.sae.parameters()):
            value = math.nan
        if not math.isfinite(value):
            raise TrainingError(
                f"the SAE's loss became {value} in epoch {self.epoch + 1}; lower the learning rate "
                f"({training.learning_rate})"
            )
        self.epoch += 1
        self.log.append({"epoch": self.epoch, "fvu": value, "dead": len(self.dead)})
        logger.info("SAE epoch %d: %s", self.epoch, self.log[-1])

    def step(self, x: Tensor, weight: float = 1.0) -> Tensor:
        """One optimiser step on a batch, or this process's share of it; returns its FVU."""
        sae, training = self.sae, self.training
        dead = self.dead
        fvu, fired = step(
            sae,
            self.rule,
            x,
            dead,
            aux_k=training.aux_k,
            aux_weight=training.aux_weight,
        )
        distributed.sum_gradients([*sae.parameters(), *self.rule.parameters()], weight)
        _project_decoder_gradient(sae)
        self.optimizer.step()
        active = torch.tensor(len(fired) / len(x), device=self.device)
        self.rule.after_step(dead, float(distributed.summed(active, 1 / distributed.size())))
        with torch.no_grad():
            sae.W_dec.copy_(F.normalize(sae.W_dec, dim=1))
            self.rows_since_fired += len(x) * distributed.size()
            self.rows_since_fired[fired] = 0
            distributed.smallest(self.rows_since_fired)
        return distributed.summed(fvu, weight)

    def set_learning_rate(self, step: int, steps_per_epoch: int) -> None:
        total = steps_per_epoch * self.training.epochs
        warmup = min(100, max(1, total // 10))
        factor = min(1.0, 2 * (1 - step / total), (step + 1) / warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.learning_rate * factor

    def save(self) -> None:
        if distributed.rank():
            return
        parts = {
            "sae": self.sae.state_dict(),
            "dead": {"rows_since_fired": self.rows_since_fired},
            "rule": {str(n): tensor for n, tensor in enumerate(self.rule.parameters())},
        }
        self.checkpoint.save(parts, self.optimizer, {"epoch": self.epoch, "log": self.log})

    def resume(self) -> None:
        found = self.checkpoint.load(self.optimizer)
        if found is None:
            return
        parts, state = found
        self.sae.load_state_dict(parts["sae"])
        for number, parameter in enumerate(self.rule.parameters()):
            parameter.data.copy_(parts["rule"][str(number)])
        self.rows_since_fired = parts["dead"]["rows_since_fired"].to(self.device)
        self.epoch, self.log = state["epoch"], state["log"]


@torch.no_grad()
def _project_decoder_gradient(sae: SparseAutoencoder) -> None:
    """Take out of the gradient what would only change the length of the decoder rows."""
    gradient = sae.W_dec.grad
    if gradient is not None:
        gradient -= (gradient * sae.W_dec).sum(dim=1, keepdim=True) * sae.W_dec


def _normalisation(shards: ActivationShards) -> tuple[Tensor, float]:
    """Mean [H] of the rows and the root mean square of what is left, over all values."""
    moments = RunningMoments(shards.width)
    for rows in shards.chunks():
        moments.update(shards.gather(rows))
    scale = float(moments.variance.mean().sqrt())
    if scale == 0:
        raise TrainingError("all activations are equal; there is nothing for an SAE to learn")
    return moments.mean.float(), scale


@torch.no_grad()
def reconstruction_report(
    sae: SparseAutoencoder, held_out: ActivationShards, seen: ActivationShards
) -> dict[str, Any]:
    """How well an SAE reconstructs.

    Parameters
    ----------
    sae
        The SAE.
    held_out
        Rows of users that it was not trained on: FVU and L0 are measured there.
    seen
        Rows that it was trained on; a latent that is active on none of either is dead.

    Returns
    -------
    dict
        `fvu`, None if the rows held out are all alike; `l0`, the mean number of latents with a
        positive value; `dead_share`; `rows`.
    """
    moments = RunningMoments(sae.d_in)
    for rows in held_out.chunks():
        moments.update(held_out.gather(rows))
    mean = moments.mean.to(sae.W_enc)
    alive = torch.zeros(sae.d_sae, dtype=torch.bool)
    residual = total = 0.0
    active = 0
    for shards in (held_out, seen):
        for rows in shards.chunks():
            x = shards.gather(rows).to(sae.W_enc)
            out = sae(x)
            positive = out.latents.values > 0
            alive[out.latents.indices[positive]] = True
            if shards is held_out:
                residual += float((x - out.x_hat).square().sum(dtype=torch.float64))
                total += float((x - mean).square().sum(dtype=torch.float64))
                active += int(positive.sum())
    return {
        "fvu": residual / total if total else None,
        "l0": active / len(held_out),
        "dead_share": float((~alive).double().mean()),
        "rows": len(held_out),
    }


def fit_autoencoder(
    rec: Recommender,
    train: Histories,
    *,
    site: Site | None = None,
    training: SAETraining | None = None,
    sampling: ActivationSampling | None = None,
    work: str | Path | None = None,
    device: str = "cpu",
    warm_start: SparseAutoencoder | None = None,
) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """Capture activations of a frozen recommender and train an SAE on them.

    Parameters
    ----------
    rec
        The frozen recommender.
    train
        Training histories.
    site
        Where to attach; the recommender's own site by default.
    training, sampling
        Procedure (from a warm start `SAETraining.going_on`), and which prefixes to learn from.
    work
        Folder for shards and checkpoint, to be continued after an interruption; a temporary one
        by default.
    device
        Where to train.
    warm_start
        An SAE to go on from: that of the same site before the recommender was retrained.

    Returns
    -------
    sae, summary
        The SAE, and a JSON-able record: settings, `log` by epoch, and `reconstruction` with FVU,
        L0 and dead share; `warm_start` has the same of the SAE that training went on from.
    """
    if work is None:
        if distributed.size() > 1:
            raise TrainingError("several processes train from one folder of activations; give work")
        with tempfile.TemporaryDirectory() as folder:
            return fit_autoencoder(
                rec,
                train,
                site=site,
                training=training,
                sampling=sampling,
                work=folder,
                device=device,
                warm_start=warm_start,
            )
    if warm_start is not None:
        training = training or SAETraining.going_on(warm_start)
        count_firings(rec, site or rec.site, width=warm_start.d_in)  # before anything is captured
    shards = Path(work) / "activations"
    if distributed.rank() == 0:
        capture_activations(rec, train, shards, site=site, sampling=sampling)
    distributed.wait()
    seen, held_out = ActivationShards(shards), ActivationShards(shards, "held_out")
    sae, summary = train_autoencoder(
        seen, training or SAETraining(), work=work, device=device, warm_start=warm_start
    )
    summary["sampling"] = vars(sampling or ActivationSampling()) | {}
    summary["reconstruction"] = reconstruction_report(sae, held_out, seen)
    if warm_start is not None:
        summary["warm_start"] = reconstruction_report(warm_start.cpu(), held_out, seen)
    return sae, summary
