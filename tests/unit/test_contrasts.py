"""Contrasts in words, by hand; their names are names of files; what does not exist is said."""

import numpy as np
import polars as pl
import pytest
import torch

from steerrec.contrasts import contrast_name, item_contrast, with_attributes
from steerrec.data import Catalogue, DataWarning, read_interactions
from steerrec.errors import DataError
from steerrec.shares import slot_shares
from steerrec.untrusted import plain_name


@pytest.fixture
def catalogue():
    return Catalogue(
        pl.DataFrame(
            {
                "row": range(6),
                "item_id": [10, 20, 30, 40, 50, 60],
                "title": ["a", "b", "c", "d", "e", None],
                "count": [9, 8, 7, 2, 1, 0],
                "genres": [["Horror"], ["Horror", "Comedy"], ["Comedy"], None, ["Sci-Fi"], []],
                "tags": ["x|y", "y", None, "x", "", "Z z"],
                "price": [1.0, 2.0, 3.0, 4.0, 5.0, None],
                "year": [1990, 1991, 1992, 1993, None, 1995],
            },
            schema_overrides={"row": pl.Int64, "item_id": pl.Int64, "count": pl.Int64},
        )
    )


@pytest.mark.parametrize(
    ("text", "a", "b"),
    [
        ("genres=Horror", [0, 1], [2, 3, 4, 5]),
        ("genres=horror", [0, 1], [2, 3, 4, 5]),
        ("genres = Horror", [0, 1], [2, 3, 4, 5]),
        ("genres=Horror|Sci-Fi", [0, 1, 4], [2, 3, 5]),
        ("genres=Horror vs Comedy", None, None),
        ("genres=Horror vs genres=Comedy", [0], [2]),  # an item of both is in neither
        ("genres=Horror vs =Comedy", [0], [2]),
        ("tags=x", [0, 3], [1, 2, 4, 5]),
        ("tags=Z z", [5], [0, 1, 2, 3, 4]),
        ("price<3", [0, 1], [2, 3, 4]),  # the item without a price is in neither
        ("price<=3", [0, 1, 2], [3, 4]),
        ("price>=4.0", [3, 4], [0, 1, 2]),
        ("price>q50", [3, 4], [0, 1, 2]),
        ("price<q25 vs >q75", [0], [4]),
        ("year<q20 vs year>q80", [0], [5]),
        ("year=1991", [1], [0, 2, 3, 4, 5]),
        ("count>q80 vs genres=Comedy", [0], [1, 2]),
    ],
)
def test_groups_by_hand(catalogue, text, a, b):
    if a is None:
        with pytest.raises(DataError, match=r"'Comedy' in contrast .* is no group of items"):
            item_contrast(catalogue, text)
        return
    found = item_contrast(catalogue, text)
    assert found.group_a.tolist() == a
    assert found.group_b.tolist() == b
    assert found.name == contrast_name(text)
    assert found.label_b == "others" or " vs " in text
    assert found.definition["text"] == text


def test_popularity_is_the_usual_one(catalogue):
    found = item_contrast(catalogue, "popularity")
    assert (found.name, found.definition["kind"]) == ("popularity", "popularity")


def test_a_list_of_items(catalogue, tmp_path):
    (tmp_path / "mine.txt").write_text("20\n\n 60 \n777\n")
    (tmp_path / "yours.txt").write_text("10\n20\n")
    with pytest.warns(DataWarning, match="1 of 3 item ids are unknown"):
        found = item_contrast(catalogue, f"items:{tmp_path}/mine.txt")
    assert found.group_a.tolist() == [1, 5]
    assert found.group_b.tolist() == [0, 2, 3, 4]
    assert found.definition["a"] == {"file": "mine.txt", "items": 2}  # no path of this machine
    assert found.name.startswith("items-mine")
    both = f"items:{tmp_path}/yours.txt vs genres=Comedy"
    found = item_contrast(catalogue, both)
    assert (found.group_a.tolist(), found.group_b.tolist()) == ([0], [2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("genre=Horror", "no column 'genre'; there are genres"),
        ("genres=Horor", "no item has genres 'Horor'; nearest: Horror"),
        ("genres", "is no group of items; expected popularity, COLUMN=VALUE"),
        ("=Horror", "is no group of items"),
        ("genres=", "is no group of items"),
        ("", "is no group of items"),
        ("row=1", "no column 'row'"),
        ("genres>q50", "genres holds no numbers"),
        ("price>qx", "expected a number, or a quantile such as q80"),
        ("price>q101", "expected a number, or a quantile"),
        ("price>nan", "expected a number, or a quantile"),
        ("price>100", "no items are price>100"),
        ("price<100", "no items are others"),
        ("a=1 vs b=2 vs c=3", "more than two groups"),
        ("items:nowhere.txt", "nowhere.txt cannot be read as a list of item ids"),
    ],
)
def test_what_does_not_exist_is_said(catalogue, text, message):
    with pytest.raises(DataError, match=message):
        item_contrast(catalogue, text)


def test_a_list_of_nothing_known(catalogue, tmp_path):
    (tmp_path / "ids").write_text("x1\nx2\n")
    with pytest.raises(DataError, match="2 item ids, such as 'x1', none of which the model knows"):
        item_contrast(catalogue, f"items:{tmp_path}/ids")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("popularity", "popularity"),
        ("genres=Horror", "genres-Horror"),
        ("genres=Sci-Fi", "genres-Sci-Fi"),
        ("price>=4.0", "price-from-4.0"),
        ("year<q20 vs >q80", "year-below-q20-vs-above-q80"),
        ("year<q20 vs year>q80", "year-below-q20-vs-year-above-q80"),
        ("genres-Horror", "genres-Horror"),
    ],
)
def test_names(text, name):
    assert contrast_name(text) == name
    assert contrast_name(name) == name


def test_names_are_names_of_files_and_differ():
    texts = ["genres=Children's", "genres=Childrens", "genres=Children s", "tags=../../x", "é=ü"]
    texts += ["a=" + "x" * 300, "a=" + "x" * 301, "items:/tmp/a b.txt", "a=b|c", "a=b c", "..", "="]
    names = [contrast_name(text) for text in texts]
    assert len(set(names)) == len(texts)
    for name in names:
        assert plain_name(name, "contrast") == name


def test_attributes_that_only_the_data_has(tmp_path):
    (tmp_path / "x.csv").write_text("user,item,genres\n1,30,A|B\n1,20,\n1,40,B\n2,30,\n")
    data = read_interactions(tmp_path / "x.csv")
    model = Catalogue(
        pl.DataFrame(
            {"row": [0, 1, 2], "item_id": [20, 30, 99], "title": [None, "t", None]}
        ).with_columns(pl.col("title").cast(pl.String), count=pl.lit(1, dtype=pl.Int64))
    )
    found = with_attributes(model, data)
    assert found.frame["genres"].to_list() == [None, ["A", "B"], None]
    assert np.array_equal(found.counts, model.counts)
    assert item_contrast(found, "genres=A").group_a.tolist() == [1]
    assert with_attributes(found, data) is found


def test_shares_of_list_slots_by_hand(catalogue):
    ids = torch.tensor([[0, 1], [1, 4], [2, -1]])  # five slots
    found = slot_shares(ids, catalogue, "genres")
    assert found == {"Comedy": 3 / 5, "Horror": 3 / 5, "Sci-Fi": 1 / 5}
    assert slot_shares(ids, catalogue, "tags")["y"] == 3 / 5
    with pytest.raises(DataError, match="no column 'genre'; there are genres"):
        slot_shares(ids, catalogue, "genre")
