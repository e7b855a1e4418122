"""Attributes in words, and which of them are more frequent than chance: scipy is the oracle."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from steerrec.data import Catalogue
from steerrec.enrichment import (
    GROUP_WORDS,
    adjusted,
    enriched,
    hypergeometric_tail,
    item_attributes,
)


@given(st.data())
def test_the_tail_is_that_of_the_hypergeometric_distribution(data):
    total = data.draw(st.integers(1, 300))
    drawn = data.draw(st.integers(0, total))
    marked = data.draw(st.integers(0, total))
    hits = data.draw(st.integers(0, min(drawn, marked)))
    found = hypergeometric_tail(*(np.array([x]) for x in (hits, drawn, marked)), total)
    assert found[0] == pytest.approx(stats.hypergeom.sf(hits - 1, total, marked, drawn), abs=1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 20))
def test_corrected_p_values_are_those_of_benjamini_and_hochberg(p, others):
    whole = np.array([*p, *([1.0] * others)])
    expected = stats.false_discovery_control(whole)[: len(p)]
    np.testing.assert_allclose(adjusted(np.array(p), len(whole)), expected, atol=1e-12)


def test_an_owner_of_eight_in_ten_of_what_a_tenth_has_is_enriched_in_it():
    # 100 things: 10 are red, 50 blue. Owner 0 has drawn 10, of which 8 red; owner 1 as by chance.
    counts = np.array([[8, 5], [1, 5]])
    found = enriched(counts, np.array([10, 10]), np.array([10, 50]), 100)
    assert found.attributes.tolist() == [[0, -1, -1, -1], [-1] * 4]
    assert found.ratios[0, 0] == pytest.approx(8.0)
    assert (found.hits[0, 0], found.drawn[0]) == (8, 10)
    # four tests, of which this has the smallest p
    assert found.q[0, 0] == pytest.approx(4 * stats.hypergeom.sf(7, 100, 10, 10), rel=1e-4)


def test_owners_of_nothing_cost_the_others_no_tests():
    counts, population = np.array([[8, 5], [0, 0]]), np.array([10, 50])
    alone = enriched(counts[:1], np.array([10]), population, 100)
    with_idle = enriched(counts, np.array([10, 0]), population, 100)
    assert with_idle.q[0, 0] == alone.q[0, 0]
    assert (with_idle.attributes[1] == -1).all()


def catalogue(titles: list[str], **columns: object) -> Catalogue:
    n = len(titles)
    base = {"row": range(n), "item_id": range(n), "title": titles, "count": range(n, 0, -1)}
    return Catalogue(pl.DataFrame({**base, **columns}))


def test_attributes_are_what_items_share():
    n = 60
    found = item_attributes(
        catalogue(
            [f"item {i}" for i in range(n)],
            genres=[["Horror", "War"] if i < 10 else ["Drama"] for i in range(n)],
            brand=["Acme" if i % 2 else None for i in range(n)],
            new=[i < 20 for i in range(n)],
            price=[float(i) for i in range(n)],
            url=[f"https://example.org/{i}" for i in range(n)],
            same=["x"] * n,
        )
    )
    names = found.names[: found.described]
    fifths = ("lowest", "second", "middle", "fourth", "highest")
    expected = {"Horror", "War", "Drama", "new", *(f"price: {fifth} fifth" for fifth in fifths)}
    assert set(names) == expected
    assert found.names[found.described :] == GROUP_WORDS

    def of(row: int) -> set[str]:
        return {found.names[i] for i in found.of_items[row] if i >= 0}

    assert of(0) == {"Horror", "War", "new", "price: lowest fifth", "popular"}
    assert of(n - 1) == {"Drama", "price: highest fifth", "rare"}


def test_titles_that_end_in_a_year_give_decades_and_others_do_not():
    years = [f"Film, The ({1985 + i % 20})" for i in range(40)]
    names = item_attributes(catalogue(years)).names
    assert set(names) == {"1980s", "1990s", "2000s", *GROUP_WORDS}
    assert item_attributes(catalogue(["Blade (2049)", *"abcdefghij"])).names == GROUP_WORDS


def test_attributes_are_counted_by_owner():
    found = item_attributes(
        catalogue([f"i{i}" for i in range(12)], kind=["a" if i < 6 else "b" for i in range(12)])
    )
    counts = found.count(np.array([0, 1, 7, 11]), np.array([0, 0, 1, 0]), 3)
    a, b = (found.names.index(name) for name in "ab")
    assert counts[:, [a, b]].tolist() == [[2, 1], [0, 1], [0, 0]]
