"""Simulated interactions: a small world with popularity bias and order that a model can learn.

Items have a category, a latent vector and a Zipf popularity; users have a taste over categories
and over latent vectors. What a user takes next either follows from their last items, along a
sparse graph of items that go together, or comes from their taste and from what is popular.
"""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from steerrec.data.interactions import Interactions, Preparation, recode
from steerrec.errors import DataError
from steerrec.progress import track

_LATENT = 8
_SUCCESSORS = 8  # items that go with an item
_DRAWS = 12  # candidates from taste and popularity, a step
_PULL = 0.6  # of popularity on what goes with what
_TASTE = 0.6  # weight of a user's own categories against everybody's
_LIKING = 0.5  # of latent taste
_FOLLOW_LAST, _FOLLOW_BEFORE = 0.75, 0.25  # which of the last two items is followed
_USERS_AT_ONCE = 8192
_YEAR = 365 * 24 * 3600

_NOUNS = {
    "Drama": "Harbor Letter Orchard Winter Promise Daughter River Silence Portrait Farewell",
    "Comedy": "Wedding Neighbour Holiday Butler Dentist Picnic Twin Parrot Landlord Reunion",
    "Thriller": "Witness Signal Deadline Courier Alibi Tunnel Verdict Stranger Ransom Cipher",
    "Romance": "Garden Summer Kiss Balcony Waltz Letterbox Island Violin Sunrise Bakery",
    "Science Fiction": "Orbit Colony Android Nebula Archive Gravity Clone Beacon Airlock Horizon",
    "Horror": "Cellar Doll Marsh Chapel Whisper Mirror Asylum Attic Scarecrow Lantern",
    "Fantasy": "Dragon Crown Oracle Forest Sword Witch Kingdom Amulet Giant Prophecy",
    "Crime": "Heist Detective Ledger Alley Informer Vault Inspector Fugitive Syndicate Motive",
    "Adventure": "Expedition Compass Jungle Treasure Summit Caravan Shipwreck Desert Map Voyage",
    "Animation": "Fox Robot Balloon Penguin Toymaker Cloud Rabbit Lighthouse Kite Bear",
    "Documentary": "Glacier Factory Ocean Village Orchestra Railway Election Coast Harvest Museum",
    "Western": "Saloon Rider Canyon Sheriff Outlaw Ranch Stagecoach Frontier Prairie Duel",
}
_ADJECTIVES = (
    "Silent Golden Broken Hidden Crimson Distant Last Forgotten Paper Midnight Burning Velvet "
    "Hollow Electric Northern Frozen Lonely Secret Wandering Glass Scarlet Restless Borrowed "
    "Invisible Crooked Endless Faithful Savage Gentle Second Blue Lost Iron Quiet Bitter Wild"
)


def simulate(
    users: int = 3000,
    items: int = 1000,
    *,
    seed: int = 0,
    categories: int = 12,
    min_length: int = 10,
    max_length: int = 60,
    zipf: float = 1.0,
    follow: float = 0.45,
) -> Interactions:
    """Draw a simulated log of interactions, oldest first.

    Parameters
    ----------
    users, items : int
        How many. Items that nobody takes do not show in the result.
    seed : int
        Same seed and sizes, same interactions.
    categories : int
        Number of item categories.
    min_length, max_length : int
        Interactions per user, skewed to the short side. Nobody takes an item twice, unless
        there are too few.
    zipf : float
        Exponent of item popularity; 0 makes all items alike.
    follow : float
        Weight, in 0..1, of what goes with the last two items against taste and popularity.

    Returns
    -------
    Interactions
        With times (seconds), ids from 1, titles and the attribute `category`; `write_csv`
        writes them, and its preparation is that of the files.

    Raises
    ------
    DataError
        If a size is out of range.
    """
    if users < 1 or items < 2 or not 1 <= min_length <= max_length:
        raise DataError(
            f"cannot simulate {users} users, {items} items, {min_length} to {max_length} "
            "interactions each; expected users >= 1, items >= 2, 1 <= min_length <= max_length"
        )
    if not 0 <= follow <= 1 or zipf < 0 or categories < 1:
        raise DataError(
            f"cannot simulate follow={follow}, zipf={zipf}, categories={categories}; expected "
            "0 <= follow <= 1, zipf >= 0, categories >= 1"
        )
    rng = np.random.default_rng(seed)
    world = _World(rng, items, min(categories, items), zipf)
    lengths = min_length + (rng.beta(1.1, 3.0, users) * (max_length - min_length + 1)).astype(int)
    starts = track(range(0, users, _USERS_AT_ONCE), "simulate", unit="chunk")
    parts = [_walk(rng, world, lengths[i : i + _USERS_AT_ONCE], follow) for i in starts]
    item = np.concatenate(parts)
    user = np.repeat(np.arange(users, dtype=np.int32), lengths)
    gaps = 1 + rng.exponential(2 * 24 * 3600, len(item)).astype(np.int64)
    first = np.cumsum(lengths) - lengths
    since = np.cumsum(gaps)
    time = since - np.repeat(since[first], lengths)
    time += np.repeat(1_600_000_000 + rng.integers(0, _YEAR, users), lengths)

    order = np.argsort(time, kind="stable")
    user_codes, seen_users = recode(user[order])
    item_codes, seen_items = recode(item[order])
    return Interactions(
        user=user_codes,
        item=item_codes,
        time=time[order],
        user_ids=pl.Series("user_id", seen_users + 1),
        item_ids=pl.Series("item_id", seen_items + 1),
        item_attributes=world.attributes()[seen_items],
        preparation=Preparation("csv", "user_id", "item_id", "timestamp"),
    )


class _World:
    """The items: category, latent vector, popularity, and what goes with what."""

    def __init__(self, rng: np.random.Generator, items: int, categories: int, zipf: float) -> None:
        self.categories = categories
        self.category = np.arange(items) * categories // items  # [N], items lie by category
        self.bounds = np.searchsorted(self.category, np.arange(categories + 1))
        self.popularity = rng.permutation(np.arange(1, items + 1) ** -zipf)  # [N]
        centres = rng.normal(size=(categories, _LATENT))
        self.vectors = (centres[self.category] + rng.normal(size=(items, _LATENT))) / 2  # [N, d]
        self.titles, self.labels = _titles(rng, self.category)
        self.popular = _cumulative(self.popularity)  # [N + 1]
        # A power of popularity below one: rare items are met through what goes with them.
        each = np.repeat(self.category[:, None], _SUCCESSORS, axis=1)
        self.successors = self.draw(rng, each, _cumulative(self.popularity**_PULL))  # [N, S]

    def draw(
        self, rng: np.random.Generator, category: NDArray[np.int64], cdf: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        """An item of each given category, by cumulative weights [N + 1]."""
        low, high = cdf[self.bounds[category]], cdf[self.bounds[category + 1]]
        drawn = np.searchsorted(cdf, low + rng.random(category.shape) * (high - low), "right") - 1
        inside: NDArray[np.int64] = np.clip(
            drawn, self.bounds[category], self.bounds[category + 1] - 1
        )
        return inside

    def attributes(self) -> pl.DataFrame:
        return pl.DataFrame({"title": self.titles, "category": self.labels})


def _cumulative(weight: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(weight)])


def _walk(
    rng: np.random.Generator, world: _World, lengths: NDArray[np.int64], follow: float
) -> NDArray[np.int64]:
    """Items of a chunk of users, user by user, oldest first; one step of all users at a time."""
    users = len(lengths)
    longest_first = np.argsort(-lengths, kind="stable")
    lengths = lengths[longest_first]
    own = rng.dirichlet(np.full(world.categories, 0.4), users)  # [B, C]
    mass = np.add.reduceat(world.popularity, world.bounds[:-1])
    taste = np.cumsum(_TASTE * own + (1 - _TASTE) * mass / mass.sum(), axis=1)
    taste[:, -1] = 1.0
    latent = rng.normal(size=(users, _LATENT))  # [B, d]
    walks = np.zeros((users, lengths[0]), dtype=np.int32)  # [B, T]
    with np.errstate(divide="ignore"):
        strength = np.arange(_SUCCESSORS, 0, -1)
        edges = np.log(strength / strength.sum())  # [S]
        prior = np.r_[
            np.log(follow * _FOLLOW_LAST) + edges,
            np.log(follow * _FOLLOW_BEFORE) + edges,
            np.full(_DRAWS, np.log((1 - follow) / _DRAWS)),
        ]  # [K]
    for step in range(walks.shape[1]):
        active = int(np.searchsorted(-lengths, -step))  # users with lengths > step
        rows = np.arange(active)
        draws = rng.random((active, _DRAWS, 1)) > taste[:active, None, :]
        candidates = world.draw(rng, draws.sum(axis=2), world.popular)  # [b, R]
        score = np.broadcast_to(prior[-_DRAWS:], candidates.shape)
        if step:
            before = walks[:active, max(step - 2, 0)]
            followed = world.successors[walks[:active, step - 1]], world.successors[before]
            candidates = np.concatenate([*followed, candidates], axis=1)  # [b, K]
            score = np.broadcast_to(prior, candidates.shape)
        liking = np.einsum("bkd,bd->bk", world.vectors[candidates], latent[:active])
        # against the walks so far, not a mask over the items: memory does not depend on these
        taken = (walks[:active, :step, None] == candidates[:, None, :]).any(axis=1)  # [b, K]
        score = score + _LIKING * liking - 1e6 * taken
        score += rng.gumbel(size=score.shape)
        chosen = candidates[rows, np.argmax(score, axis=1)]
        walks[:active, step] = chosen
    back = np.argsort(longest_first)
    real = np.arange(walks.shape[1]) < lengths[:, None]
    return walks[back][real[back]]


def _titles(rng: np.random.Generator, category: NDArray[np.int64]) -> tuple[list[str], list[str]]:
    """An invented title and a category name for each item; titles are unique."""
    adjectives = _ADJECTIVES.split()
    genres = list(_NOUNS)
    nouns = [words.split() for words in _NOUNS.values()]
    per_genre = len(adjectives) * len(nouns[0])
    orders = [rng.permutation(per_genre).tolist() for _ in genres]
    used = [0] * len(genres)
    titles, labels = [], []
    for c in category.tolist():
        genre, series = c % len(genres), c // len(genres)
        part, index = divmod(used[genre], per_genre)
        used[genre] += 1
        adjective, noun = divmod(orders[genre][index], len(nouns[genre]))
        suffix = f" {part + 1}" if part else ""
        titles.append(f"The {adjectives[adjective]} {nouns[genre][noun]}{suffix}")
        labels.append(genres[genre] + (f" {series + 1}" if series else ""))
    return titles, labels
