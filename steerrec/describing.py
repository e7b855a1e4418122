"""Finding out what neurons mean: one pass over real histories, one over a contrast's two groups.

Memory is that of a batch and of a few numbers for each neuron; never [users, latents] nor
[latents, items].
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from steerrec.activations import digest, length_batches
from steerrec.attribution import AttributionTable
from steerrec.autoencoder import SparseAutoencoder
from steerrec.contrasts import item_contrast
from steerrec.data import Catalogue, Histories
from steerrec.enrichment import Enrichment, enriched, item_attributes
from steerrec.errors import ArtifactError, DataError
from steerrec.neurons import ItemFacts, NeuronDescription, NeuronDescriptions, NeuronFacts
from steerrec.profiles import Contrast, popularity_contrast, synthetic_users
from steerrec.progress import track
from steerrec.ranking import top_k
from steerrec.recommender import ItemHead, Recommender, fingerprint, user_vectors
from steerrec.sites import Site

BINS = 24
TESTED = 50
"""Items that are raised most, and histories that fire most, whose attributes are tested."""

_ITEMS, _HISTORIES, _LATEST, _SIMILAR = 8, 4, 5, 6
_SPREAD = 4.0  # standard deviations that a histogram reaches from the means
_NEURONS_AT_ONCE = 512

Groups = tuple[Histories, Histories]


@torch.no_grad()
def describe_neurons(
    rec: Recommender,
    sae: SparseAutoencoder,
    table: AttributionTable,
    histories: Histories,
    *,
    site: Site | None = None,
    groups: Groups | None = None,
    catalogue: Catalogue | None = None,
    max_histories: int = 50_000,
    batch_size: int = 256,
) -> NeuronDescriptions:
    """What every neuron of an SAE stands for: the facts of the report, for people and programs.

    Parameters
    ----------
    rec
        The frozen recommender.
    sae
        Its SAE.
    table
        Attribution table of the contrast.
    histories
        Real histories: the training part.
    site
        Where the SAE is attached; the recommender's own site by default. What a neuron does to
        items is said only there, where scores are computed from its vector.
    groups
        Users of the two groups of the contrast. By default those of the table are made again,
        where it says how; where it does not, there are no histograms.
    catalogue
        The recommender's catalogue with more attributes, if the data has some.
    max_histories
        Of more histories than that a sample is looked at, the same each time.
    batch_size
        Histories in one forward pass.

    Raises
    ------
    ArtifactError
        If the table is of another SAE.
    """
    if len(table) != sae.d_sae:
        raise ArtifactError(
            f"the table is of {len(table)} neurons, the SAE has {sae.d_sae}; use the table that "
            "`steerrec score` made with this SAE"
        )
    own = site is None or site == rec.site
    catalogue = catalogue or rec.catalogue
    attributes = item_attributes(catalogue)
    protocol = protocol_of(
        rec, sae, table, histories, site=site, catalogue=catalogue, max_histories=max_histories
    )
    groups = groups or contrast_groups(rec, table, histories, catalogue=catalogue)
    people = _sample(histories, max_histories).truncate(rec.max_length)

    low, high = _ends(table)
    counted = [
        _histogram(rec, sae, group, low, high, site, batch_size, label)
        for group, label in zip(groups or (), _labels(table), strict=False)
    ] or [torch.zeros(sae.d_sae, 0, dtype=torch.int32)] * 2
    fired = _Firing(sae.d_sae, min(TESTED, len(people)))
    batches = length_batches(people.lengths, batch_size)
    for users in track(batches, "histories", unit="batch"):
        latents = sae.encode(user_vectors(rec, people.select(users), site).to(sae.W_enc))
        fired.add(latents.values, latents.indices, torch.from_numpy(users))

    raised, lowered = _moved(sae, rec.item_head, fired.mean) if own else (None, None)
    last = people.items[people.offsets[1:] - 1]  # [U]
    who = fired.users.numpy()  # [D, T], -1 where there are no more
    facts = NeuronFacts(
        firing_rate=(fired.count / max(len(people), 1)).float(),
        mean_activation=fired.mean.float(),
        low=low,
        high=high,
        histogram_a=counted[0],
        histogram_b=counted[1],
        **_lists(raised, sae.d_sae, "raises", "raise_effects", 1.0),
        **_lists(lowered, sae.d_sae, "lowers", "lower_effects", -1.0),
        fired_by=torch.from_numpy(_latest(people, who[:, :_HISTORIES])),
        activations=fired.best[:, :_HISTORIES].clone(),
        **_alike(sae.W_dec),
        **_tested(
            "raises",
            attributes.count,
            np.full((sae.d_sae, 0), -1) if raised is None else raised[0].numpy(),
            np.arange(len(rec.catalogue)),
            fired.count.numpy() > 0,
        ),
        **_tested(
            "fired",
            attributes.count,
            np.where(who >= 0, last[who], -1),
            last,
            fired.count.numpy() > 0,
        ),
    )
    spoken = (facts.raises, facts.lowers, facts.fired_by)
    rows = np.concatenate([part.numpy().ravel() for part in spoken]).astype(np.int64)
    return NeuronDescriptions(
        contrast=table.contrast,
        columns=dict(table.columns),
        protocol=protocol,
        facts=facts,
        items=ItemFacts.of(catalogue, attributes, rows),
    )


def describe_neuron(
    rec: Recommender,
    sae: SparseAutoencoder,
    table: AttributionTable,
    histories: Histories,
    neuron: int,
    **options: Any,
) -> NeuronDescription:
    """What one neuron stands for; see `describe_neurons`, which does the same work for all."""
    if not 0 <= neuron < sae.d_sae:
        raise ArtifactError(f"there is no neuron {neuron}; expected one of 0 to {sae.d_sae - 1}")
    return describe_neurons(rec, sae, table, histories, **options)[neuron]


def protocol_of(
    rec: Recommender,
    sae: SparseAutoencoder,
    table: AttributionTable,
    histories: Histories,
    *,
    site: Site | None = None,
    catalogue: Catalogue | None = None,
    max_histories: int = 50_000,
) -> dict[str, Any]:
    """What descriptions depend on, JSON-able: equal protocols, equal descriptions."""
    return {
        "histories": min(len(histories), max_histories),
        "synthetic_users": table.provenance.get("synthetic_users"),
        "seed": table.provenance.get("seed"),
        "tested": TESTED,
        "items": len(rec.catalogue),
        "columns": (catalogue or rec.catalogue).frame.columns,
        "site": (site or rec.site).path,
        "contrast": table.name,
        "model_sha256": fingerprint(rec)["model_sha256"],
        "sae_sha256": _sha256(*sae.state_dict().values()),
        "table_sha256": _sha256(table["cohens_d"]),
        "data": digest(histories),
    }


def _sha256(*tensors: Tensor) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return sha.hexdigest()


def contrast_groups(
    rec: Recommender,
    table: AttributionTable,
    train: Histories,
    *,
    catalogue: Catalogue | None = None,
) -> Groups | None:
    """The synthetic users that a table was made with; None where that cannot be told from it."""
    users, seed = table.provenance.get("synthetic_users"), table.provenance.get("seed")
    contrast = _contrast(catalogue or rec.catalogue, table.contrast)
    if contrast is None or type(users) is not int or type(seed) is not int:
        return None
    a, b = (
        synthetic_users(train, group, n=users, max_length=rec.max_length, seed=seed)
        for group in (contrast.group_a, contrast.group_b)
    )
    return a, b


def _contrast(catalogue: Catalogue, described: Mapping[str, Any]) -> Contrast | None:
    """The contrast that a table describes, if it can be made of this catalogue alone."""
    definition = described.get("definition")
    definition = definition if isinstance(definition, Mapping) else {}
    text = definition.get("text")
    if definition.get("kind") == "popularity":
        return popularity_contrast(catalogue)
    if not isinstance(text, str) or "items:" in text:  # no file is opened on a table's word
        return None
    try:
        found = item_contrast(catalogue, text)
    except DataError:
        return None
    same = all(found.describe()[group] == described.get(group) for group in ("group_a", "group_b"))
    return found if same else None


def _labels(table: AttributionTable) -> list[str]:
    return [f"{table.contrast[group]['label']} users" for group in ("group_a", "group_b")]


def _sample(histories: Histories, most: int) -> Histories:
    """Those histories that are not empty, or a fixed sample of them."""
    some = np.flatnonzero(histories.lengths > 0)
    if len(some) > most:
        some = np.sort(np.random.default_rng(0).choice(some, most, replace=False))
    return histories.select(some)


def _ends(table: AttributionTable) -> tuple[Tensor, Tensor]:
    """Where the histogram of each neuron begins and ends, [D] each."""
    if not {"mean_a", "mean_b"} <= table.columns.keys():
        zeros = torch.zeros(len(table))
        return zeros, zeros + 1
    sides = [
        (table[f"mean_{group}"], (_SPREAD * table[f"std_{group}"]).clamp_min(1e-6))
        for group in "ab"
    ]
    (mean_a, reach_a), (mean_b, reach_b) = sides
    low = torch.minimum(mean_a - reach_a, mean_b - reach_b)
    high = torch.maximum(mean_a + reach_a, mean_b + reach_b)
    return low, torch.maximum(high, low + 1e-6 * (1 + low.abs()))


def _histogram(
    rec: Recommender,
    sae: SparseAutoencoder,
    group: Histories,
    low: Tensor,
    high: Tensor,
    site: Site | None,
    batch_size: int,
    label: str,
) -> Tensor:
    """Pre-activations of a group counted in bins, int32 [D, BINS]."""
    counts = torch.zeros(sae.d_sae * BINS, dtype=torch.int64)
    scale, first = (BINS / (high - low)), torch.arange(sae.d_sae) * BINS
    for rows in track(length_batches(group.lengths, batch_size), label, unit="batch"):
        vectors = user_vectors(rec, group.select(rows), site)
        pre_acts = sae.pre_acts(vectors.to(sae.W_enc)).float().cpu()  # [B, D]
        bins = ((pre_acts - low) * scale).clamp_(0, BINS - 1).long()
        counts += torch.bincount((bins + first).flatten(), minlength=len(counts))
    return counts.view(sae.d_sae, BINS).int()


class _Firing:
    """How often neurons fire, and after which histories most, fed a batch at a time."""

    def __init__(self, neurons: int, most: int) -> None:
        self.count = torch.zeros(neurons, dtype=torch.int64)
        self.total = torch.zeros(neurons, dtype=torch.float64)
        self.best = torch.zeros(neurons, most)
        self.users = torch.full((neurons, most), -1)

    def add(self, values: Tensor, indices: Tensor, users: Tensor) -> None:
        """Add the active latents [B, k] of a batch of users [B]."""
        values, indices = values.float().cpu(), indices.cpu()
        neurons, here = indices.unique(return_inverse=True)
        dense = (
            values.new_zeros(len(values), len(neurons)).scatter_add_(1, here, values).T
        )  # [J, B]
        self.count[neurons] += (dense > 0).sum(dim=1)
        self.total[neurons] += dense.double().sum(dim=1)
        known = torch.cat([self.best[neurons], dense], dim=1)
        best, places = known.topk(self.best.shape[1], dim=1)
        owners = torch.cat([self.users[neurons], users.expand(len(neurons), -1)], dim=1)
        self.best[neurons] = best
        self.users[neurons] = owners.gather(1, places).masked_fill(best <= 0, -1)

    @property
    def mean(self) -> Tensor:
        """Mean of each neuron where it is active, float64 [D]; 0 where it never is."""
        return self.total / self.count.clamp_min(1)


def _moved(
    sae: SparseAutoencoder, head: ItemHead, usual: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Rows [D, T] of the items that neurons raise, and lower most; effects at usual activation."""
    weight = F.normalize(head.weight, dim=-1) if head.normalize else head.weight
    plain = ItemHead(weight, scale=head.scale)
    vectors = sae.W_dec * usual.clamp_min(1e-12).to(sae.W_dec)[:, None]
    count = min(TESTED, max(1, len(head) // 10))
    raised, lowered = (
        top_k(sign * vectors, plain, count, user_chunk=_NEURONS_AT_ONCE) for sign in (1.0, -1.0)
    )
    return (raised.ids.cpu(), raised.scores.cpu()), (lowered.ids.cpu(), lowered.scores.cpu())


def _lists(
    found: tuple[Tensor, Tensor] | None, neurons: int, rows: str, effects: str, sign: float
) -> dict[str, Tensor]:
    if found is None:
        return {rows: torch.zeros(neurons, 0, dtype=torch.int32), effects: torch.zeros(neurons, 0)}
    return {rows: found[0][:, :_ITEMS].int(), effects: sign * found[1][:, :_ITEMS].float()}


def _latest(people: Histories, who: NDArray[np.int64]) -> NDArray[np.int32]:
    """The latest items of these users, int32 [D, H, L], oldest first; -1 where there is none."""
    ends, lengths = people.offsets[1:][who], people.lengths[who]  # [D, H]
    back = np.arange(_LATEST, 0, -1)  # [L]
    rows = people.items[np.maximum(ends[..., None] - back, 0)]
    there = (who >= 0)[..., None] & (back <= lengths[..., None])
    return np.where(there, rows, -1).astype(np.int32)


def _alike(decoder: Tensor) -> dict[str, Tensor]:
    """Neurons whose decoder rows have the largest cosine with each one's, and these cosines."""
    rows = F.normalize(decoder.float(), dim=1)
    count = min(_SIMILAR, len(rows) - 1)
    neurons, cosines = [], []
    for start in range(0, len(rows), _NEURONS_AT_ONCE):
        part = rows[start : start + _NEURONS_AT_ONCE] @ rows.T  # [C, D]
        place = torch.arange(len(part))
        part[place, place + start] = -torch.inf  # itself
        best = part.topk(count, dim=1)
        neurons.append(best.indices.int().cpu())
        cosines.append(best.values.cpu())
    return {"similar": torch.cat(neurons), "cosines": torch.cat(cosines)}


def _tested(
    of: str,
    count: Any,
    rows: NDArray[np.int64],
    population: NDArray[np.int64],
    live: NDArray[np.bool_],
) -> dict[str, Tensor]:
    """`Enrichment` of the items [D, T] of neurons against a population of items, as tensors.

    Neurons that never fire take no part, and so cost the others nothing in the correction.
    """
    rows = np.where(live[:, None], rows, -1)
    there = rows >= 0
    owners = np.broadcast_to(np.arange(len(rows))[:, None], rows.shape)[there]
    counts = count(rows[there], owners, len(rows))
    whole = count(population, np.zeros(len(population), dtype=np.int64), 1)[0]
    found: Enrichment = enriched(counts, there.sum(axis=1), whole, len(population))
    return {f"{of}_{name}": torch.from_numpy(values) for name, values in vars(found).items()}
