"""What steering owes to each of its parts: one changed at a time, all else as it was.

Every variant is swept over strengths of its own range, since strengths do not carry over from one
SAE or rule to another, and is then told by the rules of `steerrec.choosing`. Not here: other
methods (`steerrec.comparison`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from steerrec.activations import ActivationSampling, ActivationShards, capture_activations
from steerrec.attribution import AttributionTable, score_groups, score_neurons
from steerrec.autoencoder import SparseAutoencoder
from steerrec.choosing import BUDGETS, CRITERIA, choose, hypervolume, metric_of
from steerrec.comparison_results import plain
from steerrec.data import Split
from steerrec.errors import DataError, MethodError, SiteError
from steerrec.evaluation import (
    CapturedUsers,
    Which,
    capture_held_out,
    measure_lists,
    rank,
    rank_steered,
)
from steerrec.files import write_json
from steerrec.layers import site_at, site_report
from steerrec.profiles import popularity_contrast, users_by_taste
from steerrec.progress import track
from steerrec.recommender import Recommender, fingerprint
from steerrec.sites import Site
from steerrec.steering import Steering
from steerrec.training import SAETraining, reconstruction_report, train_autoencoder

NEURONS = (1, 3, 10, 30, 100, 300, 1000)
KS = (8, 16, 64)
EXPANSIONS = (8, 16, 32, 128)
EPOCHS = (1, 2, 5, 10)
SEEDS = (1, 2)
CONTROL_SEEDS = (0, 1, 2)
SETTINGS = 12
"""Strengths of a variant, beside 0."""

LOST = 0.12
"""They reach up to the one at which validation nDCG has fallen by this share."""

WEAKEST, STRONGEST = 2.0**-6, 2.0**12
"""Where that strength is looked for."""


@dataclass(frozen=True)
class Variant:
    """One thing changed.

    Attributes
    ----------
    study
        What is varied.
    label
        Its value here.
    make
        Gives the SAE, the recipe, the site to steer at, and facts to tell, JSON-able.
    """

    study: str
    label: str
    make: Callable[[], tuple[SparseAutoencoder, Steering, Site, dict[str, Any]]]


@dataclass(frozen=True)
class Ablation:
    """What a variant reaches.

    Attributes
    ----------
    study, label
        What was varied, and its value; `as it is` is the SAE and the rule that all are compared to.
    facts
        What else is known of it, such as the FVU of its SAE.
    alphas
        Its strengths, 0 first.
    valid, test
        Metrics at each of them.
    """

    study: str
    label: str
    facts: dict[str, Any]
    alphas: list[float]
    valid: list[dict[str, float]]
    test: list[dict[str, float]]

    def at(self, budget: float) -> dict[str, float]:
        """Test metrics of the strength that is chosen on validation at a budget, by Gini."""
        return self.test[choose(self.valid, budget)]

    @property
    def hypervolume(self) -> dict[str, float]:
        """Mean gain in Gini and in LTC over all budgets up to 10 %, on test."""
        return {by: hypervolume(self.valid, self.test, by) for by in CRITERIA}


@dataclass(frozen=True)
class Ablations:
    """All variants, the unvaried one first.

    Attributes
    ----------
    protocol
        Split, users, k, masking, and how SAEs were trained for this.
    rows
        One a variant.
    """

    protocol: dict[str, Any]
    rows: tuple[Ablation, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values; what is undefined becomes null."""
        rows = [
            {
                **asdict(row),
                "chosen": {f"{budget:.0%}": row.at(budget) for budget in BUDGETS},
                "hypervolume": row.hypervolume,
            }
            for row in self.rows
        ]
        found: dict[str, Any] = plain({"protocol": self.protocol, "rows": rows})
        return found


STUDIES = ("neurons", "k", "latents", "fvu", "site", "splice", "contrast", "controls", "seeds")
"""What can be varied."""


def ablate(
    rec: Recommender,
    split: Split,
    sae: SparseAutoencoder,
    *,
    site: Site | None = None,
    studies: Sequence[str] = STUDIES,
    layers: Sequence[str] | None = None,
    training: SAETraining | None = None,
    sampling: ActivationSampling | None = None,
    users: int = 8192,
    max_users: int | None = None,
    k: int = 10,
    mask_seen: bool = False,
    seed: int = 0,
    folder: str | Path | None = None,
    device: str = "cpu",
) -> Ablations:
    """Vary one part of steering at a time.

    Parameters
    ----------
    rec, split
        Model and data.
    sae, site
        The SAE that is varied, and where it belongs; the recommender's own site by default.
    studies
        Some of `STUDIES`: how many neurons are turned; k and number of latents of the SAE; how long
        it is trained, and so its FVU; the layer, at the user's position or at every one; how the
        change gets back into the model; synthetic or real users as the contrast; random and
        shuffled neurons and an untrained SAE as controls; seeds of SAE and synthetic users.
    layers
        Paths of the modules to steer at; by default the blocks of the model.
    training, sampling
        How SAEs are trained, where a study trains some; `latents`, `k` and architecture are those
        of `sae`.
    users
        Synthetic users of each group.
    max_users
        How many held-out users are ranked, drawn by the seed; all by default.
    k, mask_seen
        Length of the lists, and whether items of a user's history are left out of them.
    seed
        Of everything that is drawn.
    folder
        Where each variant's result is kept as soon as it is there, and is taken from if it was
        made in the same way.
    device
        Where SAEs are trained.

    Raises
    ------
    MethodError
        If there is no such study.
    SiteError
        If nothing can be attached to one of the layers.
    """
    for study in studies:
        if study not in STUDIES:
            raise MethodError(f"no study {study!r}; there are {', '.join(STUDIES)}")
    training = training or SAETraining()
    training = replace(
        training,
        latents=sae.d_sae,
        k=sae.k or min(training.k, sae.d_sae),  # which an imported one need not say
        architecture=sae.architecture,
        seed=seed,
    )
    captures: dict[Which, Callable[[], CapturedUsers]] = {
        which: partial(capture_held_out, rec, split, which, max_users=max_users, seed=seed)
        for which in ("valid", "test")
    }
    held_out = {which: capture() for which, capture in captures.items()}
    with TemporaryDirectory() as work:
        bench = _Bench(
            rec,
            split,
            sae,
            site or rec.site,
            training,
            sampling or ActivationSampling(seed=seed),
            users,
            seed,
            Path(work),
            device,
        )
        variants = [bench.usual(), *bench.variants(studies, layers)]
        protocol = {
            "split": "test",
            "mask_seen": mask_seen,
            "k": k,
            "items": len(rec.catalogue),
            "users": len(held_out["test"].histories),
            "training": asdict(training),
            "sampling": asdict(bench.sampling),
            "synthetic_users": users,
            "seed": seed,
        }
        made = json.dumps([protocol, fingerprint(rec), bench.site.to_dict()], sort_keys=True)
        about = hashlib.sha256(made.encode() + _bytes(sae)).hexdigest()[:16]
        rows = []
        for variant in track(variants, "variants", unit="variant"):
            file = None
            if folder is not None:
                name = hashlib.sha256(f"{variant.study}-{variant.label}".encode()).hexdigest()[:16]
                file = Path(folder) / "variants" / f"{about}-{name}.json"
            row = None if file is None else _kept(file)
            if row is None:
                row = _measure(rec, variant, held_out, captures, k=k, mask_seen=mask_seen)
                if file is not None:
                    write_json(file, plain(asdict(row)))
            rows.append(row)
    return Ablations(protocol, tuple(rows))


@dataclass
class _Bench:
    """What variants are made of; whatever several of them need is made once."""

    rec: Recommender
    split: Split
    sae: SparseAutoencoder
    site: Site
    training: SAETraining
    sampling: ActivationSampling
    users: int
    seed: int
    work: Path
    device: str
    saes: dict[Any, tuple[SparseAutoencoder, dict[str, Any]]] = field(default_factory=dict)
    tables: dict[Any, AttributionTable] = field(default_factory=dict)

    def usual(self) -> Variant:
        return Variant("as it is", "", lambda: (self.sae, self.rule(self.sae), self.site, {}))

    def variants(self, studies: Sequence[str], layers: Sequence[str] | None) -> Iterator[Variant]:
        for study in studies:
            yield from getattr(self, f"_{study}")(*((layers,) if study == "site" else ()))

    def table(self, sae: SparseAutoencoder, site: Site, seed: int | None = None) -> Any:
        """The table of popularity by synthetic users."""
        drawn = self.seed if seed is None else seed
        key = (id(sae), site, drawn)
        if key not in self.tables:
            contrast, train = popularity_contrast(self.rec.catalogue), self.split.train
            self.tables[key] = score_neurons(
                self.rec, sae, contrast, train, site=site, users=self.users, seed=drawn
            )
        return self.tables[key]

    def rule(self, sae: SparseAutoencoder, **options: Any) -> Steering:
        """The PopSteer rule on the site of the SAE that is varied."""
        return Steering.popsteer(self.table(sae, self.site), **options)

    def trained(
        self, site: Site | None = None, **changes: Any
    ) -> tuple[SparseAutoencoder, dict[str, Any]]:
        """An SAE of its own, and what is to be told of it."""
        site = site or self.site
        training = replace(self.training, **changes)
        if (site, training) not in self.saes:
            shards = self.work / f"activations-{site.folder}"
            if not shards.exists():
                capture_activations(
                    self.rec, self.split.train, shards, site=site, sampling=self.sampling
                )
            seen, held_out = ActivationShards(shards), ActivationShards(shards, "held_out")
            work = self.work / f"training-{len(self.saes)}"
            sae, _ = train_autoencoder(seen, training, work=work, device=self.device)
            sae = sae.cpu().requires_grad_(False)
            report = reconstruction_report(sae, held_out, seen)
            facts = {name: report[name] for name in ("fvu", "l0", "dead_share")}
            self.saes[site, training] = sae, facts
        return self.saes[site, training]

    def fresh(self, study: str, label: str, **changes: Any) -> Variant:
        """A variant with an SAE of its own."""

        def make() -> tuple[SparseAutoencoder, Steering, Site, dict[str, Any]]:
            sae, facts = self.trained(**changes)
            return sae, self.rule(sae), self.site, facts

        return Variant(study, label, make)

    def ruled(self, study: str, label: str, make: Callable[[], Steering]) -> Variant:
        """A variant with another recipe for the same SAE."""
        return Variant(study, label, lambda: (self.sae, make(), self.site, {}))

    def _neurons(self) -> Iterator[Variant]:
        for n in NEURONS:
            if n < self.sae.d_sae:
                yield self.ruled("neurons", f"{n}", partial(self.rule, self.sae, neurons=n))
        yield self.ruled("neurons", f"all {self.sae.d_sae}", partial(self.rule, self.sae))

    def _k(self) -> Iterator[Variant]:
        for k in sorted({*KS, self.training.k}):
            if k <= self.training.latents:
                yield self.fresh("k", f"{k}", k=k)

    def _latents(self) -> Iterator[Variant]:
        for latents in sorted({*(self.sae.d_in * e for e in EXPANSIONS), self.sae.d_sae}):
            if latents >= self.training.k:
                yield self.fresh("latents", f"{latents}", latents=latents)

    def _fvu(self) -> Iterator[Variant]:
        for epochs in sorted({*(e for e in EPOCHS if e < self.training.epochs)}):
            yield self.fresh("fvu", f"{epochs} epochs", epochs=epochs)
        yield self.fresh("fvu", f"{self.training.epochs} epochs")

    def _seeds(self) -> Iterator[Variant]:
        for seed in (self.seed, *(self.seed + s for s in SEEDS)):
            yield self.fresh("seeds", f"SAE {seed}", seed=seed)
        for seed in (self.seed + s for s in SEEDS):
            yield self.ruled("seeds", f"synthetic users {seed}", partial(self.drawn, seed))

    def _site(self, layers: Sequence[str] | None) -> Iterator[Variant]:
        paths = blocks(self.rec) if layers is None else layers
        sites = [site_at(self.rec, path) for path in paths]
        for site in [*(site for site in sites if site.path != self.site.path), self.site]:
            for positions in ("user", "real"):
                if positions == "real" and (
                    site.layout == "BH" or site.positions_from == "last" or site == self.rec.site
                ):  # of the scored vectors only the user's is read
                    continue

                def make(
                    site: Site = site, positions: Any = positions
                ) -> tuple[SparseAutoencoder, Steering, Site, dict[str, Any]]:
                    sae, facts = self.trained(site)
                    steering = Steering.popsteer(self.table(sae, site))
                    return sae, steering, replace(site, positions=positions), facts

                where = {"user": "the user's position", "real": "every position"}[positions]
                yield Variant("site", f"{site.path}, {where}", make)

    def _splice(self) -> Iterator[Variant]:
        yield self.ruled("splice", "delta", partial(self.rule, self.sae))
        yield self.ruled(
            "splice", "reconstruct", partial(self.rule, self.sae, splice="reconstruct")
        )
        compat = partial(self.rule, self.sae, popsteer_compat=True)
        yield self.ruled("splice", "reconstruct, as published", compat)

    def _contrast(self) -> Iterator[Variant]:
        yield self.ruled("contrast", "synthetic users", partial(self.rule, self.sae))

        def real() -> Steering:
            rec = self.rec
            groups = users_by_taste(self.split.train, rec.catalogue, max_length=rec.max_length)
            contrast = popularity_contrast(rec.catalogue).describe()
            return Steering.popsteer(
                score_groups(rec, self.sae, *groups, contrast=contrast, site=self.site)
            )

        yield self.ruled("contrast", "real users, by taste", real)

    def _controls(self) -> Iterator[Variant]:
        for seed in CONTROL_SEEDS:
            for label, make in (
                ("random directions", self.signs),
                ("neurons shuffled", self.shuffled),
            ):
                yield self.ruled("controls", f"{label}, seed {seed}", partial(make, seed))
        yield Variant("controls", "untrained SAE", self.untrained)

    def drawn(self, seed: int) -> Steering:
        """The rule on a table of other synthetic users."""
        return Steering.popsteer(self.table(self.sae, self.site, seed))

    def signs(self, seed: int) -> Steering:
        """The rule's sizes, each up or down by chance; tells whether it matters which way."""
        usual = self.rule(self.sae)
        draw = torch.Generator().manual_seed(seed)
        flips = torch.randint(0, 2, usual.shift.shape, generator=draw) * 2 - 1
        return replace(usual, shift=usual.shift * flips, name="random-directions")

    def shuffled(self, seed: int) -> Steering:
        """The rule's shifts, each given to another neuron; tells whether it matters which."""
        usual = self.rule(self.sae)
        order = torch.randperm(len(usual.shift), generator=torch.Generator().manual_seed(seed))
        return replace(usual, shift=usual.shift[order], name="shuffled")

    def untrained(self) -> tuple[SparseAutoencoder, Steering, Site, dict[str, Any]]:
        """An SAE of random weights with the centre of the trained one."""
        draw = torch.Generator().manual_seed(self.seed)
        sae = SparseAutoencoder(self.sae.d_in, self.sae.d_sae, self.training.k, generator=draw)
        with torch.no_grad():
            sae.b_dec.copy_(self.sae.b_dec)
        sae.requires_grad_(False)
        return sae, self.rule(sae), self.site, {}


def blocks(rec: Recommender) -> list[str]:
    """Paths of the blocks of a model: members of lists of modules that an SAE can be attached to.

    Raises
    ------
    SiteError
        If there are none.
    """
    found = [
        layer.path
        for layer in site_report(rec).layers
        if layer.usable and layer.firings == 1 and layer.path.rpartition(".")[2].isdecimal()
    ]
    outermost = [p for p in found if not any(p.startswith(f"{other}.") for other in found)]
    if not outermost:
        raise SiteError(
            "the model has no list of blocks; name the layers (--layers), `steerrec layers` has "
            "them all"
        )
    return outermost


# --- measuring


def _measure(
    rec: Recommender,
    variant: Variant,
    held_out: dict[Which, CapturedUsers],
    captures: dict[Which, Callable[[], CapturedUsers]],
    *,
    k: int,
    mask_seen: bool,
) -> Ablation:
    sae, steering, site, facts = variant.make()

    def metrics(which: Which, alpha: float) -> dict[str, float]:
        users = held_out[which]
        if alpha == 0:  # the unsteered model, also where a reconstruction would be spliced in
            lists = rank(rec, users, k=k, mask_seen=mask_seen)
        else:
            recipe, capture = steering.with_alpha(alpha), captures[which]
            lists = rank_steered(
                rec, sae, recipe, users, capture, site=site, k=k, mask_seen=mask_seen
            )
        return measure_lists(rec, users, lists, mask_seen=mask_seen).metrics

    own = metric_of(metrics("valid", 0.0), "ndcg")
    if not own > 0:
        raise DataError("the model finds no target of the validation users: nDCG is 0")
    highest = reaching(lambda alpha: 1 - metric_of(metrics("valid", alpha), "ndcg") / own, LOST)
    alphas = [highest * i / SETTINGS for i in range(SETTINGS + 1)]
    valid, test = (
        [metrics(which, alpha) for alpha in track(alphas, f"strengths on {which}", unit="alpha")]
        for which in held_out
    )
    return Ablation(variant.study, variant.label, facts, alphas, valid, test)


def reaching(lost: Callable[[float], float], goal: float) -> float:
    """A strength at which about so much is lost: by doubling or halving, then halving the gap.

    Parameters
    ----------
    lost
        From a strength to the share of nDCG that is lost.
    goal
        The share that is looked for.
    """
    alpha = 1.0
    if lost(alpha) >= goal:
        while alpha > WEAKEST and lost(alpha / 2) >= goal:
            alpha /= 2
        low, high = alpha / 2, alpha
    else:
        while alpha < STRONGEST and lost(alpha) < goal:
            alpha *= 2
        low, high = alpha / 2, alpha
    middle = (low + high) / 2
    return middle if lost(middle) >= goal else high


def _kept(file: Path) -> Ablation | None:
    """A variant that was measured before."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        for part in ("valid", "test"):
            found[part] = [
                {name: float("nan") if value is None else value for name, value in one.items()}
                for one in found[part]
            ]
        return Ablation(**found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # it is made again


def _bytes(sae: SparseAutoencoder) -> bytes:
    return b"".join(t.detach().cpu().numpy().tobytes() for t in sae.state_dict().values())
