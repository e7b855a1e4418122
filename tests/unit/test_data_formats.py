"""Every file format, on files of a few lines: what is recognised, and what comes out."""

from pathlib import Path

import polars as pl
import pytest

from steerrec.data import Interactions, read_interactions
from steerrec.errors import DataError


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def rows(data: Interactions) -> list[tuple[object, object]]:
    """(user id, item id) of every row, in file order."""
    users, items = data.user_ids.to_list(), data.item_ids.to_list()
    return [(users[u], items[i]) for u, i in zip(data.user, data.item, strict=True)]


INTER = (
    "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "1\t9\t5\t30\n"
    "2\t7\t1\t20\n"
    "1\t7\t4\t10\n"
)
ITEM = (
    "item_id:token\tmovie_title:token_seq\tyear:float\tclass:token_seq\n"
    "7\tThe Red Door\t1999\tHorror Drama\n"
    "9\tBlue\t2001\tComedy\n"
)


def test_recbole_folder(tmp_path: Path) -> None:
    write(tmp_path / "toy" / "toy.inter", INTER)
    write(tmp_path / "toy" / "toy.item", ITEM)

    data = read_interactions(tmp_path / "toy")

    assert data.preparation.format == "recbole"
    assert rows(data) == [(1, 9), (2, 7), (1, 7)]
    assert data.time is not None
    assert data.time.tolist() == [30, 20, 10]
    # codes by first appearance: item 9, then 7; a title is not split, another token_seq is
    assert data.item_attributes.to_dict(as_series=False) == {
        "title": ["Blue", "The Red Door"],
        "year": [2001.0, 1999.0],
        "class": [["Comedy"], ["Horror", "Drama"]],
    }


def test_recbole_file_without_item_side(tmp_path: Path) -> None:
    data = read_interactions(write(tmp_path / "x.inter", INTER))

    assert rows(data) == [(1, 9), (2, 7), (1, 7)]
    assert data.item_attributes.to_dict(as_series=False) == {"title": [None, None]}


def test_recbole_float_times_have_the_ties_of_recbole_and_token_times_do_not(
    tmp_path: Path,
) -> None:
    # Scaled to 0..1, the last two times are 1 - 2**-26 and 1: one number in single precision.
    # RecBole scales what is left after filtering, so the lone row of user v has no say.
    body = f"v\tz\t{-(2**40)}\nu\ta\t0\nu\tb\t{2**26}\nu\tc\t{2**26 - 1}\nu\td\t2\nu\te\t1\n"
    header = "user_id:token\titem_id:token\ttimestamp"
    write(tmp_path / "a.inter", f"{header}:float\n{body}")
    write(tmp_path / "b.inter", f"{header}:token\n{body}")
    body = "".join(f"w\t{i}\t0\n" for i in "abcde")
    for name in ("a.inter", "b.inter"):
        with (tmp_path / name).open("a") as file:
            file.write(body)

    tied = read_interactions(tmp_path / "a.inter", k_core=2).time
    apart = read_interactions(tmp_path / "b.inter", k_core=2).time

    assert tied is not None
    assert apart is not None
    assert tied.tolist() == [0, 2**26 - 1, 2**26 - 1, 2, 1, 0, 0, 0, 0, 0]
    assert apart.tolist() == [0, 2**26, 2**26 - 1, 2, 1, 0, 0, 0, 0, 0]


def test_recbole_quotes_are_text(tmp_path: Path) -> None:
    write(tmp_path / "x.inter", "user_id:token\tartist_id:token\n1\t2\n1\t3\n")
    write(tmp_path / "x.item", 'item_id:token\tname:token\n2\t"Weird Al\n3\tSay "Hi"\n')

    data = read_interactions(tmp_path / "x.inter")

    assert data.preparation.item_col == "artist_id"
    assert data.item_attributes["title"].to_list() == ['"Weird Al', 'Say "Hi"']


def test_movielens_folder_in_latin1(tmp_path: Path) -> None:
    write(tmp_path / "ratings.dat", "1::20::5::100\n2::10::3::90\n1::10::4::80\n")
    write(
        tmp_path / "movies.dat", "10::Amélie (2001)::Comedy|Romance\n20::Heat::Crime\n", "latin-1"
    )
    write(tmp_path / "users.dat", "1::F::1::10::48067\n")

    for path in (tmp_path, tmp_path / "ratings.dat"):
        data = read_interactions(path)
        assert data.preparation.format == "movielens"
        assert rows(data) == [(1, 20), (2, 10), (1, 10)]
        assert data.item_attributes["title"].to_list() == ["Heat", "Amélie (2001)"]
        assert data.item_attributes["genres"].to_list() == [["Crime"], ["Comedy", "Romance"]]


@pytest.mark.parametrize(
    ("name", "separator"), [("x.csv", ","), ("x.tsv", "\t"), ("x.txt", "\t"), ("x.csv", ";")]
)
@pytest.mark.parametrize(
    "header", ["user item time", "userId movieId timestamp", "SessionId ItemId Time"]
)
def test_tables_with_usual_names(tmp_path: Path, name: str, separator: str, header: str) -> None:
    text = f"{header}\na x 3\n\nb y 2\na y 1\n\n".replace(" ", separator)

    data = read_interactions(write(tmp_path / name, text))

    assert data.preparation.format == "csv"
    assert rows(data) == [("a", "x"), ("b", "y"), ("a", "y")]
    assert data.time is not None
    assert data.time.tolist() == [3, 2, 1]


def test_table_with_named_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "log.txt", "who,what,user_id,when\na,x,0,2\nb,y,0,1\n")

    data = read_interactions(path, user_col="who", item_col="what", time_col="when")

    assert rows(data) == [("a", "x"), ("b", "y")]
    assert data.preparation.user_col == "who"
    assert data.preparation.time_col == "when"


def test_named_columns_make_a_first_line_a_header(tmp_path: Path) -> None:
    path = write(tmp_path / "log.txt", "who\twhat\na\tx\nb\ty\n")

    assert rows(read_interactions(path, user_col="who", item_col="what"))[0] == ("a", "x")


def test_table_with_windows_line_ends_mark_and_quotes(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", '\ufeffuser,item\r\n"a, b",x\r\nc,"y ""z"""\r\n')

    assert rows(read_interactions(path)) == [("a, b", "x"), ("c", 'y "z"')]


def test_table_with_item_columns_of_its_own(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.csv",
        "user_id,item_id,title,genres,rating\n1,5,,,3\n2,6,Six,Horror,4\n3,5,Five,Crime|Drama,5\n",
    )

    data = read_interactions(path)

    assert data.item_attributes.to_dict(as_series=False) == {
        "title": ["Five", "Six"],  # the first value that is one
        "genres": [["Crime", "Drama"], ["Horror"]],
    }


def test_table_with_item_file_beside(tmp_path: Path) -> None:
    write(tmp_path / "interactions.csv", "user_id,item_id\n1,5\n1,6\n1,007\n")
    write(
        tmp_path / "items.csv",
        "item_id,title,price,year,count\n6,1984,2.5,1949,x\n007,Bond,3,1953,y\n8,Unseen,1,1,z\n",
    )

    data = read_interactions(tmp_path)

    assert data.item_ids.to_list() == ["5", "6", "007"]
    assert data.item_attributes.to_dict(as_series=False) == {
        "title": [None, "1984", "Bond"],
        "price": [None, 2.5, 3.0],
        "year": [None, 1949, 1953],
        "attribute_count": [None, "x", "y"],  # `count` is the catalogue's own
    }


def test_item_file_wins_over_the_first_of_repeated_items(tmp_path: Path) -> None:
    write(tmp_path / "interactions.csv", "user_id,item_id\n1,5\n")
    write(tmp_path / "items.csv", "item_id,title\n5,First\n5,Second\n")

    assert read_interactions(tmp_path).item_attributes["title"].to_list() == ["First"]


def test_parquet_keeps_types_and_makes_text_of_others(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {"user": pl.Series([3, 3, 1], dtype=pl.UInt8), "item": ["1", "2", "1"], "ts": [2.5, 1.5, 0]}
    )
    frame.write_parquet(tmp_path / "a.parquet")
    frame.with_columns(pl.col("user").cast(pl.Float64)).write_parquet(tmp_path / "b.pq")

    kept = read_interactions(tmp_path / "a.parquet")
    cast = read_interactions(tmp_path / "b.pq")

    assert kept.preparation.format == "parquet"
    assert kept.user_ids.dtype == pl.Int64
    assert rows(kept) == [(3, "1"), (3, "2"), (1, "1")]
    assert kept.time is not None
    assert kept.time.tolist() == [2.5, 1.5, 0.0]
    assert cast.user_ids.to_list() == ["3.0", "1.0"]


def test_parquet_datetimes(tmp_path: Path) -> None:
    days = pl.Series(["2020-01-02", "2020-01-01"]).str.to_date()
    pl.DataFrame({"user": [1, 1], "item": [1, 2], "date": days}).write_parquet(
        tmp_path / "x.parquet"
    )

    time = read_interactions(tmp_path / "x.parquet").time

    assert time is not None
    assert time[0] - time[1] == 24 * 3600 * 1_000_000


def test_pairs_in_order(tmp_path: Path) -> None:
    data = read_interactions(write(tmp_path / "x.txt", "1 10\n1\t11\n\n2  10 \n"))

    assert data.preparation.format == "pairs"
    assert data.time is None
    assert rows(data) == [(1, 10), (1, 11), (2, 10)]


def test_sequences_have_the_line_number_as_user(tmp_path: Path) -> None:
    data = read_interactions(write(tmp_path / "x.txt", "5 6\n\n6 7 5\r\n8\n"))

    assert data.preparation.format == "sequences"
    assert rows(data) == [(1, 5), (1, 6), (3, 6), (3, 7), (3, 5), (4, 8)]


def test_format_overrides_what_two_fields_a_line_are_taken_for(tmp_path: Path) -> None:
    path = write(tmp_path / "x.txt", "5 6\n6 7\n")

    assert rows(read_interactions(path)) == [(5, 6), (6, 7)]
    assert rows(read_interactions(path, format="sequences")) == [(1, 5), (1, 6), (2, 6), (2, 7)]


def test_nearly_all_lines_with_two_fields_are_not_guessed(tmp_path: Path) -> None:
    path = write(tmp_path / "x.txt", "1 2\n" * 150 + "1 2 3\n" + "1 2\n" * 150)

    with pytest.raises(DataError, match=r"line 151 has 3 fields.*format='pairs'"):
        read_interactions(path)
    with pytest.raises(DataError, match=r"line 151 has 3 fields; expected `user item`"):
        read_interactions(path, format="pairs")
    assert len(read_interactions(path, format="sequences")) == 603


def test_damage_far_into_a_file_of_pairs_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "x.txt", "1 2\n" * 30_000 + "17\n")

    with pytest.raises(DataError, match="line 30001 has 1 fields"):
        read_interactions(path)


def test_long_sequences_are_not_cut_by_recognition(tmp_path: Path) -> None:
    line = " ".join(str(i) for i in range(30_000))  # longer than what is looked at

    data = read_interactions(write(tmp_path / "x.txt", f"{line}\n1 2\n"))

    assert len(data) == 30_002


def test_table_without_header_is_not_taken_for_sequences(tmp_path: Path) -> None:
    path = write(tmp_path / "u.data", "196\t242\t3\t881250949\n186\t302\t3\t891717742\n")

    with pytest.raises(DataError, match="4 fields on every line and no header"):
        read_interactions(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "", "x.csv is empty"),
        ("x.csv", "user,item\n", "holds no interactions"),
        ("x.txt", " \n\n", "is blank"),
        ("x.csv", "1,2\n3,4\n", "no user column.*its columns are 1, 2; expected a header"),
        ("x.csv", "user,thing\n1,2\n", "no item column.*user, thing.*item_col"),
        ("x.csv", "user,item\n1,2\n3,4,5\n", "line 3 has 3 fields; expected 2"),
        ("x.dat", "1::2::3::4::5\n", "line 1 has 5 fields; expected 4"),
        (
            "x.csv",
            "user,item\n1,2\n,4\n5,\n6,\n",
            "1 row has no value in the id column 'user'.*line 3",
        ),
        ("x.csv", 'user,item\n1,2\n\n3,\n4,""\n', "2 rows have no value.*'item'.*in line 4"),
        ("x.item", "item_id:token\n1\n", "item side only"),
        ("x.parquet", "PAR1 not really", "cannot be read as Parquet"),
        ("x.bin", "a\0b", "binary"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path / name, text)

    with pytest.raises(DataError, match=message) as caught:
        read_interactions(path)
    assert "\n" not in str(caught.value)


def test_missing_path_and_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.csv does not exist; expected"):
        read_interactions(tmp_path / "nowhere.csv")
    with pytest.raises(DataError, match=r"unknown format 'xml'; expected one of recbole,"):
        read_interactions(write(tmp_path / "x.csv", "user,item\n1,2\n"), format="xml")


def test_folders_that_do_not_say_which_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found nothing"):
        read_interactions(tmp_path)
    write(tmp_path / "a.inter", INTER)
    write(tmp_path / "b.inter", INTER)
    with pytest.raises(DataError, match=r"several .inter files \(a.inter, b.inter\)"):
        read_interactions(tmp_path)
    write(tmp_path / f"{tmp_path.name}.inter", INTER)
    assert len(read_interactions(tmp_path)) == 3


@pytest.mark.parametrize("column", ["user_col", "item_col", "time_col"])
def test_named_column_that_is_missing(tmp_path: Path, column: str) -> None:
    path = write(tmp_path / "x.csv", "user,item,time\n1,2,3\n")

    role = column.removesuffix("_col")
    with pytest.raises(
        DataError, match=f"no {role} column 'nope'; its columns are user, item, time"
    ):
        read_interactions(path, **{column: "nope"})  # type: ignore[arg-type]


def test_one_column_for_two_roles(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "user,item,time\n1,2,3\n")

    with pytest.raises(DataError, match="a column each"):
        read_interactions(path, user_col="item")
