"""Training a TopK SAE: rows a second, and time until an FVU is reached, beside other loops.

All take the same batches in the same order, step by step in turn, on one thread; what is counted
is the processor's time of that thread. Every few steps, off the clock, the FVU on held-out rows is
measured, so that loops are compared where they are equally far: a loop may be quick a row and learn
little from it. The race is printed; nothing asserts a time.

`sae-lens` runs where it is installed (`make sae-lens`), at our learning rate and at others, since
it starts from weights of another size and clips gradients. The rows are planted ones, or with
STEERREC_ACTIVATIONS=FOLDER those that `steerrec attach --keep-activations` left there;
STEERREC_RACE_EPOCHS says how many passes are made over them.
"""

import importlib.util
import os
import time
from dataclasses import dataclass, field, replace
from operator import itemgetter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steerrec import training as module
from steerrec.activations import ActivationShards
from steerrec.autoencoder import fraction_of_variance_unexplained
from steerrec.training import SAETraining

from ..unit.test_sae_training import write_shards

WIDTH, ROWS = 64, 16_384
EPOCHS = int(os.environ.get("STEERREC_RACE_EPOCHS", "4"))
TRAINING = SAETraining(epochs=EPOCHS)  # 4,096 latents, k 32, 1,024 rows a step
RATES = (2e-3, 5e-3, 1e-2)
"""Learning rates of both libraries: sae-lens' own default, 3e-4, is for far longer runs."""

LOOKS = 48
"""How often in a race the FVU is measured."""


def planted_rows(rows, seed=0, atoms=512, active=12):
    """Sums of a dozen rows of a planted dictionary, with a little noise."""
    generator = torch.Generator().manual_seed(7)
    dictionary = F.normalize(torch.randn(atoms, WIDTH, generator=generator), dim=1)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(rows, atoms, generator=generator).topk(active, dim=1).indices
    sizes = 0.5 + torch.rand(rows, active, generator=generator)
    coefficients = torch.zeros(rows, atoms).scatter_(1, chosen, sizes)
    noise = 0.05 * torch.randn(rows, WIDTH, generator=generator)
    return coefficients @ dictionary + noise


class Ours:
    """The run of `steerrec attach`.

    With `revive_late` no latent is dead before 1,000 steps, as in sae-lens: AuxK then has nothing
    to do in a race, which gives a lower FVU and leaves more latents without any use.
    """

    def __init__(self, shards, folder, *, revive_late=False, **options):
        training = replace(TRAINING, **options)
        self.run = module._Run(shards, training, folder, torch.device("cpu"))
        if revive_late:
            self.run.dead_after = 1000 * TRAINING.batch_size

    def step(self, x, number, steps):
        self.run.set_learning_rate(number, steps // EPOCHS)
        self.run.step(x)

    def fvu(self, x):
        sae = self.run.finished()
        raw = x * self.run.scale + self.run.mean
        return fraction_of_variance_unexplained(raw, sae(raw).x_hat)

    def fired(self, x):
        found = self.run.finished().encode(x * self.run.scale + self.run.mean)
        return found.indices[found.values > 0].unique()


class DenseLoop:
    """TopK as it is usually written: codes scattered into [B, d_sae], a dense decode, autograd."""

    def __init__(self, start):
        self.sae = start
        self.optimizer = torch.optim.Adam(start.parameters(), lr=TRAINING.learning_rate)

    def codes(self, x):
        sae = self.sae
        z = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
        values, indices = z.relu().topk(TRAINING.k, dim=-1)
        return torch.zeros_like(z).scatter(-1, indices, values)

    def forward(self, x):
        return self.codes(x) @ self.sae.W_dec + self.sae.b_dec

    def fired(self, x):
        return self.codes(x).any(dim=0).nonzero()

    def step(self, x, number, steps):
        self.optimizer.param_groups[0]["lr"] = TRAINING.learning_rate * schedule(number, steps)
        self.optimizer.zero_grad()
        fraction_of_variance_unexplained(x, self.forward(x)).backward()
        self.optimizer.step()
        with torch.no_grad():
            self.sae.W_dec.copy_(F.normalize(self.sae.W_dec, dim=1))

    def fvu(self, x):
        return fraction_of_variance_unexplained(x, self.forward(x))


class SAELens:
    """What `SAETrainer._train_step` of sae-lens does with its `TopKTrainingSAE`."""

    def __init__(self, width, learning_rate):
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

        # its sparse activations have no gradients on a CPU
        config = TopKTrainingSAEConfig(d_in=width, d_sae=TRAINING.latents, k=TRAINING.k)
        torch.manual_seed(0)
        self.sae = TopKTrainingSAE(config)
        self.learning_rate = learning_rate
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=learning_rate)
        self.silent = torch.zeros(TRAINING.latents)
        self.frequency = torch.zeros(TRAINING.latents)

    def step(self, x, number, steps):
        from sae_lens.saes.sae import TrainStepInput

        self.optimizer.param_groups[0]["lr"] = self.learning_rate * schedule(number, steps)
        self.sae.train()
        out = self.sae.training_forward_pass(
            TrainStepInput(
                sae_in=x,
                coefficients={},
                dead_neuron_mask=self.silent > 1000,
                n_training_steps=number,
                is_logging_step=False,
            )
        )
        with torch.no_grad():
            firing = out.feature_acts.bool().float()
            fired = firing.sum(-2).bool()
            self.silent += 1
            self.silent[fired] = 0
            self.frequency += firing.sum(0)
        out.loss.backward()
        nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fvu(self, x):
        return fraction_of_variance_unexplained(x, self.sae.eval()(x))

    def fired(self, x):
        return self.sae.eval().encode(x).any(dim=0).nonzero()


def schedule(number, steps):
    """The schedule of `steerrec attach`."""
    return min(1.0, 2 * (1 - number / steps), (number + 1) / min(100, max(1, steps // 10)))


@dataclass
class Course:
    """How a contestant did: its processor time, and the FVU on held-out rows on the way."""

    contestant: object
    often: bool = True  # whether to look on the way: the thresholds of others take long to find
    rows: int = 0
    seconds: float = 0.0
    used: int = 0  # latents that are active in some held-out row
    looks: list[tuple[int, float, float]] = field(default_factory=list)  # rows, seconds, FVU

    def step(self, x, number, steps):
        begun = time.thread_time()
        self.contestant.step(x, number, steps)
        self.seconds += time.thread_time() - begun
        self.rows += len(x)

    @torch.no_grad()
    def look(self, held_out):
        self.looks.append((self.rows, self.seconds, float(self.contestant.fvu(held_out))))

    @property
    def fvu(self):
        return self.looks[-1][2]

    @torch.no_grad()
    def finish(self, held_out):
        self.look(held_out)
        self.used = len(self.contestant.fired(held_out))

    def until(self, fvu):
        """Rows and seconds until this FVU was first seen; None where it never was."""
        return next(((rows, spent) for rows, spent, seen in self.looks if seen <= fvu), None)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.benchmark(group="SAE training")
def test_rows_a_second_and_fvu(benchmark, tmp_path, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = benchmark.pedantic(race, args=(tmp_path,), rounds=1)
    finally:
        torch.set_num_threads(threads)
    with capsys.disabled():
        print("\n" + "\n".join(results(found)))  # noqa: T201
    benchmark.extra_info.update({name: each.rows / each.seconds for name, each in found.items()})
    same_loss = found[f"{LATE} at {TRAINING.learning_rate:g}"]
    assert same_loss.fvu < 1.1 * found["dense decode, autograd"].fvu


LATE = "steerrec, dead late"


def results(found):
    """Lines: rows a second, FVU, unused latents; then rows and seconds until an FVU is reached."""
    for name, each in found.items():
        speed, unused = each.rows / each.seconds, 1 - each.used / TRAINING.latents
        yield f"{name:28} {speed:8,.0f} rows/s  FVU {each.fvu:.4f}  {100 * unused:4.1f} % unused"
    ours = {name: each for name, each in found.items() if name.startswith(LATE)}
    worst = max(each.fvu for each in ours.values())
    best = min(each.fvu for each in ours.values())
    theirs = [each.fvu for name, each in found.items() if name.startswith("sae-lens")]
    ends = [max(best, min(theirs))] if theirs else []
    for target in sorted({2 * worst, worst, *ends}, reverse=True):
        reached = min(
            filter(None, (each.until(target) for each in ours.values())), key=itemgetter(1)
        )
        yield f"until FVU {target:.4f} (ratios to the quickest of steerrec):"
        for name, each in found.items():
            until = each.until(target) if each.often else None
            if until is not None:
                yield (
                    f"    {name:28} {until[0]:9,} rows ({until[0] / reached[0]:.2f} x) "
                    f"{until[1]:7.2f} s ({until[1] / reached[1]:.2f} x)"
                )


def activations(folder):
    """Shards to train on, and rows of others to measure on."""
    captured = os.environ.get("STEERREC_ACTIVATIONS")
    if not captured:
        return write_shards(folder / "shards", rows=planted_rows(ROWS)), planted_rows(4096, seed=1)
    held_out = ActivationShards(captured, "held_out")
    return ActivationShards(captured), held_out.gather(np.arange(len(held_out))[:4096])


def race(folder):
    """The course of each contestant, by name."""
    shards, held_out = activations(folder)
    ours = Ours(shards, folder)
    start = module._Run(shards, TRAINING, folder, torch.device("cpu")).sae
    contestants = {
        "steerrec topk": Course(ours),
        "steerrec batchtopk": Course(Ours(shards, folder, architecture="batchtopk"), often=False),
        "steerrec jumprelu": Course(Ours(shards, folder, architecture="jumprelu"), often=False),
        "dense decode, autograd": Course(DenseLoop(start)),
    }
    for rate in RATES:
        late = Ours(shards, folder, revive_late=True, learning_rate=rate)
        contestants[f"{LATE} at {rate:g}"] = Course(late)
    if importlib.util.find_spec("sae_lens") is not None:
        for rate in RATES:
            contestants[f"sae-lens TopK at {rate:g}"] = Course(SAELens(shards.width, rate))
    rows = (shards.gather(np.arange(len(shards))) - ours.run.mean) / ours.run.scale
    held_out = (held_out - ours.run.mean) / ours.run.scale
    generator = torch.Generator().manual_seed(0)
    batches = [
        batch
        for _ in range(EPOCHS)
        for batch in torch.randperm(len(rows), generator=generator).split(TRAINING.batch_size)
        if len(batch) == TRAINING.batch_size
    ]
    for number, batch in enumerate(batches):
        last = number + 1 == len(batches)
        for each in contestants.values():
            each.step(rows[batch], number, len(batches))
            if last:
                each.finish(held_out)
            elif each.often and number % max(1, len(batches) // LOOKS) == 0:
                each.look(held_out)
    return contestants
