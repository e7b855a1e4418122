"""What is known of neurons, for people: numbers, items, histories, attributes, and a short label.

How it is found out is in `describing`, how an artifact keeps it in `description_files`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from steerrec.attribution import NEUTRAL, RANKING
from steerrec.data import Catalogue
from steerrec.enrichment import GROUP_WORDS, ItemAttributes
from steerrec.errors import ArtifactError

Evidence = Literal["both", "items", "histories", "none"]

_TELLING = 1.5  # times as often as in the population, for a label to say it
LONGEST_TITLE = 120
_SHOWN_ATTRIBUTES = 6


@dataclass(frozen=True)
class ItemNote:
    """An item as people know it.

    Attributes
    ----------
    row
        Its catalogue row.
    title
        Its title in one line of at most 120 characters.
    count
        Training interactions.
    group
        Popularity group: 0 head, 1 mid, 2 tail.
    attributes
        Genres and the like.
    """

    row: int
    title: str
    count: int
    group: int
    attributes: tuple[str, ...]


@dataclass(frozen=True)
class MovedItem:
    """An item, and by how much a neuron changes its score where it fires as it usually does."""

    item: ItemNote
    effect: float


@dataclass(frozen=True)
class FiringHistory:
    """The latest items of a real history, oldest first, and how active a neuron is after it."""

    activation: float
    items: tuple[ItemNote, ...]


@dataclass(frozen=True)
class AttributeNote:
    """An attribute that occurs more often than chance.

    Attributes
    ----------
    name
        `Horror`, say.
    ratio
        How many times as often as in the population.
    hits, drawn
        In how many of how many.
    q
        p-value of the hypergeometric test, corrected by the false discovery rate.
    """

    name: str
    ratio: float
    hits: int
    drawn: int
    q: float


@dataclass(frozen=True)
class SimilarNeuron:
    """A neuron whose decoder row points the same way: their cosine."""

    neuron: int
    cosine: float


@dataclass(frozen=True)
class Histogram:
    """Pre-activations of the synthetic users of both groups, counted in equal bins.

    Attributes
    ----------
    low, high
        Where the first bin begins and the last one ends; values beyond are in these two.
    group_a, group_b
        Users in each bin.
    """

    low: float
    high: float
    group_a: tuple[int, ...]
    group_b: tuple[int, ...]


@dataclass(frozen=True)
class NeuronDescription:
    """All that a report says of one neuron.

    Attributes
    ----------
    neuron
        Its number.
    label
        A few words made of the facts below; a guess at a meaning, no proof of one.
    evidence
        Which facts speak for the label: `both` where the items that it raises and the histories
        that fire it have something in common, `items` or `histories` where only one side says
        anything, `none` where nothing does.
    numbers
        Its row of the attribution table, by column.
    firing_rate
        Share of real histories after which it is active.
    mean_activation
        Its mean where it is.
    histogram
        None where the groups of the contrast are not at hand.
    raises, lowers
        Items that it moves most; empty where scores are not computed from its site's vector.
    raises_attributes
        What the items that it raises most have in common.
    fired_by
        Histories that fire it most.
    fired_by_attributes
        What the last items of these have in common.
    similar
        Neurons most like it.
    """

    neuron: int
    label: str
    evidence: Evidence
    numbers: dict[str, float]
    firing_rate: float
    mean_activation: float
    histogram: Histogram | None
    raises: tuple[MovedItem, ...]
    lowers: tuple[MovedItem, ...]
    raises_attributes: tuple[AttributeNote, ...]
    fired_by: tuple[FiringHistory, ...]
    fired_by_attributes: tuple[AttributeNote, ...]
    similar: tuple[SimilarNeuron, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class ItemFacts:
    """Items that descriptions speak of, by catalogue row.

    Attributes
    ----------
    rows
        Their rows, ascending, int64 [n].
    titles
        Titles in one line each, [n].
    counts
        Training interactions, int64 [n].
    groups
        Popularity groups, int8 [n].
    attributes
        Numbers of attributes, int32 [n, A], -1 where there is no more.
    names
        What all attributes are called; the last three are the popularity groups.
    """

    rows: NDArray[np.int64]
    titles: Sequence[str]
    counts: NDArray[np.int64]
    groups: NDArray[np.int8]
    attributes: NDArray[np.int32]
    names: Sequence[str]

    @classmethod
    def of(
        cls, catalogue: Catalogue, attributes: ItemAttributes, rows: NDArray[np.int64]
    ) -> ItemFacts:
        """The facts of these catalogue rows, which may repeat; -1 is passed over."""
        chosen = np.unique(rows[rows >= 0])
        titles = catalogue.titles
        return cls(
            rows=chosen,
            titles=[one_line(titles[row]) for row in chosen.tolist()],
            counts=catalogue.counts[chosen],
            groups=catalogue.groups.labels[chosen],
            attributes=attributes.of_items[chosen, :-1][:, :_SHOWN_ATTRIBUTES],
            names=attributes.names,
        )

    def __len__(self) -> int:
        return len(self.rows)

    def note(self, row: int) -> ItemNote:
        """One of them."""
        place = int(np.searchsorted(self.rows, row))
        if place == len(self.rows) or self.rows[place] != row:
            raise ArtifactError(f"item {row} is not among the items that are described")
        return ItemNote(
            row=row,
            title=self.titles[place],
            count=int(self.counts[place]),
            group=int(self.groups[place]),
            attributes=tuple(self.names[i] for i in self.attributes[place].tolist() if i >= 0),
        )


@dataclass(frozen=True, eq=False)
class NeuronFacts:
    """What descriptions are made of, for all D neurons.

    Attributes
    ----------
    firing_rate, mean_activation
        Over real histories, float32 [D].
    low, high
        Ends of the histograms, float32 [D].
    histogram_a, histogram_b
        Synthetic users in each bin, int32 [D, bins]; no bins where the groups are not at hand.
    raises, lowers
        Catalogue rows, int32 [D, I]; none where scores are not computed from the site's vector.
    raise_effects, lower_effects
        By how much, float32 [D, I].
    fired_by
        Latest items of the histories that fire it most, int32 [D, H, L], -1 before the first.
    activations
        After these histories, float32 [D, H]; 0 where there are no more.
    similar, cosines
        Neurons most like it, int32 and float32 [D, S].
    raises_attributes, raises_ratios, raises_hits, raises_drawn, raises_q
        `Enrichment` of the items that it raises most.
    fired_attributes, fired_ratios, fired_hits, fired_drawn, fired_q
        `Enrichment` of the last items of the histories that fire it most.
    """

    firing_rate: Tensor
    mean_activation: Tensor
    low: Tensor
    high: Tensor
    histogram_a: Tensor
    histogram_b: Tensor
    raises: Tensor
    raise_effects: Tensor
    lowers: Tensor
    lower_effects: Tensor
    fired_by: Tensor
    activations: Tensor
    similar: Tensor
    cosines: Tensor
    raises_attributes: Tensor
    raises_ratios: Tensor
    raises_hits: Tensor
    raises_drawn: Tensor
    raises_q: Tensor
    fired_attributes: Tensor
    fired_ratios: Tensor
    fired_hits: Tensor
    fired_drawn: Tensor
    fired_q: Tensor


@dataclass(frozen=True, eq=False)
class NeuronDescriptions:
    """What is known of all neurons of an SAE, seen through one contrast.

    Attributes
    ----------
    contrast
        `Contrast.describe()` of the contrast.
    columns
        Columns of its attribution table, float32 [D] each.
    protocol
        How many histories and synthetic users it was found on, and what it depends on.
    facts
        What descriptions are made of.
    items
        The items that these speak of.
    """

    contrast: Mapping[str, Any]
    columns: Mapping[str, Tensor]
    protocol: Mapping[str, Any]
    facts: NeuronFacts
    items: ItemFacts
    _labels: dict[int, tuple[str, Evidence]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.facts.firing_rate)

    def __getitem__(self, neuron: int) -> NeuronDescription:
        if not 0 <= neuron < len(self):
            raise ArtifactError(
                f"there is no neuron {neuron}; expected one of 0 to {len(self) - 1}"
            )
        facts, label = self.facts, self.label(neuron)
        histogram = None
        if facts.histogram_a.shape[1]:
            histogram = Histogram(
                float(facts.low[neuron]),
                float(facts.high[neuron]),
                tuple(facts.histogram_a[neuron].tolist()),
                tuple(facts.histogram_b[neuron].tolist()),
            )
        similar = zip(facts.similar[neuron].tolist(), facts.cosines[neuron].tolist(), strict=True)
        return NeuronDescription(
            neuron=neuron,
            label=label[0],
            evidence=label[1],
            numbers={name: float(values[neuron]) for name, values in self.columns.items()},
            firing_rate=float(facts.firing_rate[neuron]),
            mean_activation=float(facts.mean_activation[neuron]),
            histogram=histogram,
            raises=self._moved(facts.raises[neuron], facts.raise_effects[neuron]),
            lowers=self._moved(facts.lowers[neuron], facts.lower_effects[neuron]),
            raises_attributes=self.attributes(neuron, "raises"),
            fired_by=self._histories(neuron),
            fired_by_attributes=self.attributes(neuron, "fired"),
            similar=tuple(SimilarNeuron(int(other), cosine) for other, cosine in similar),
        )

    @property
    def ranking(self) -> str:
        """The column that neurons are ranked by unless another is named."""
        return next(column for column in RANKING if column in self.columns)

    def strongest(self, n: int, by: str | None = None) -> list[int]:
        """The n neurons that are farthest from neutral in a column of the table.

        Parameters
        ----------
        n
            How many.
        by
            A column; by default `ranking`.
        """
        by = by or self.ranking
        if by not in self.columns:
            raise ArtifactError(f"no column {by!r}; expected one of {', '.join(self.columns)}")
        values = self.columns[by] - NEUTRAL.get(by, 0.0)
        order: list[int] = values.abs().sort(descending=True, stable=True).indices[:n].tolist()
        return order

    def attributes(self, neuron: int, of: str) -> tuple[AttributeNote, ...]:
        """What the items that a neuron `raises`, or that `fired` it, have in common."""
        parts = [self._arrays[f"{of}_{name}"][neuron] for name in ("attributes", "ratios", "hits")]
        drawn, q = int(self._arrays[f"{of}_drawn"][neuron]), self._arrays[f"{of}_q"][neuron]
        return tuple(
            AttributeNote(self.items.names[number], float(ratio), int(hits), drawn, float(chance))
            for number, ratio, hits, chance in zip(*parts, q, strict=True)
            if number >= 0
        )

    def label(self, neuron: int) -> tuple[str, Evidence]:
        """A neuron in a few words, and which facts speak for them.

        What the items that it raises and the histories that fire it have in common comes first,
        then what the items have, then what the histories have; without any such thing two titles
        stand for it.
        """
        if neuron not in self._labels:
            self._labels[neuron] = self._label(neuron)
        return self._labels[neuron]

    def _label(self, neuron: int) -> tuple[str, Evidence]:
        if float(self.facts.firing_rate[neuron]) == 0:
            return "never fires on real histories", "none"
        raised, fired = (
            [note.name for note in self.attributes(neuron, of) if note.ratio >= _TELLING]
            for of in ("raises", "fired")
        )
        shared = [name for name in raised if name in fired]
        ranked = shared + [name for name in raised or fired if name not in shared]
        words = [name for name in ranked if name not in GROUP_WORDS][:2]
        popularity = next((name for name in ranked if name in (GROUP_WORDS[0], GROUP_WORDS[2])), "")
        described = len(self.items.names) > len(GROUP_WORDS)
        evidence: Evidence = (
            "both"
            if any(name != GROUP_WORDS[1] for name in shared)
            or (not described and self._takes_again(neuron))
            else "items"
            if raised
            else "histories"
            if fired
            else "none"
        )
        if words:
            return " · ".join(filter(None, [popularity, ", ".join(words)])), evidence
        telling = self._telling(neuron, "histories" if evidence == "histories" else "items")
        titles = [one_line(self.items.note(row).title, 40) for row in telling]
        examples = " / ".join(titles) or "no items known"
        if popularity:
            return f"{popularity} items, such as {examples}", evidence
        if evidence == "both":
            return examples, evidence
        return f"unclear: {examples}", "none"

    def _telling(self, neuron: int, by: str) -> list[int]:
        """Two items that stand for a neuron: those that it raises most, or that fire it most."""
        rows = [] if by == "histories" else self.facts.raises[neuron].tolist()[:2]
        last = self.facts.fired_by[neuron, :, -1].tolist()
        return rows or list(dict.fromkeys(row for row in last if row >= 0))[:2]

    def _takes_again(self, neuron: int) -> bool:
        """Whether it raises what the histories that fire it hold."""
        held = set(self.facts.fired_by[neuron].flatten().tolist())
        return not held.isdisjoint(self.facts.raises[neuron].tolist())

    def _moved(self, rows: Tensor, effects: Tensor) -> tuple[MovedItem, ...]:
        pairs = zip(rows.tolist(), effects.tolist(), strict=True)
        return tuple(MovedItem(self.items.note(row), effect) for row, effect in pairs if row >= 0)

    def _histories(self, neuron: int) -> tuple[FiringHistory, ...]:
        pairs = zip(
            self.facts.activations[neuron].tolist(),
            self.facts.fired_by[neuron].tolist(),
            strict=True,
        )
        return tuple(
            FiringHistory(activation, tuple(self.items.note(row) for row in rows if row >= 0))
            for activation, rows in pairs
            if activation > 0
        )

    @cached_property
    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {
            name: value.numpy()
            for name, value in vars(self.facts).items()
            if name.startswith(("raises_", "fired_")) and name != "fired_by"
        }


def one_line(text: str, longest: int = LONGEST_TITLE) -> str:
    """A title of somebody else's in one line of at most so many characters."""
    # what is far beyond the limit is not even looked at
    line = " ".join(text[: 4 * longest].split())
    line = "".join(c for c in line if c == " " or c.isprintable() or c in "\u200d\u200c")
    return line if len(line) <= longest else line[: longest - 1].rstrip() + "…"
