"""Column names: which column of a table is the user, the item, the time, the title."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from steerrec.errors import ColumnError

# Compared after `normalised`, first match wins.
USER_NAMES = (
    "userid", "user", "uid", "sessionid", "session", "customerid", "visitorid", "reviewerid",
)  # fmt: skip
ITEM_NAMES = (
    "itemid", "item", "iid", "movieid", "artistid", "productid", "trackid", "songid", "bookid",
    "newsid", "articleid", "businessid", "asin",
)  # fmt: skip
TIME_NAMES = ("timestamp", "time", "datetime", "date", "ts", "unixtime", "eventtime")
TITLE_NAMES = ("title", "name", "itemname", "itemtitle", "movietitle", "productname")
ATTRIBUTE_NAMES = ("genres", "genre", "categories", "category", "tags", "brand")


def normalised(name: str) -> str:
    """The name in lower case without `_`, `-` and spaces: userId and user_id are one."""
    return name.lower().replace("_", "").replace("-", "").replace(" ", "")


def find_column(columns: Sequence[str], usual: Sequence[str]) -> str | None:
    """The first column that has one of the usual names."""
    by_name = {normalised(c): c for c in reversed(columns)}
    return next((by_name[name] for name in usual if name in by_name), None)


def choose_column(
    columns: Sequence[str], override: str | None, usual: Sequence[str], role: str, source: str
) -> str | None:
    """The column the caller names, or the one with a usual name; None if there is no such one.

    Raises
    ------
    ColumnError
        If the caller names a column that is not there.
    """
    if override is None:
        return find_column(columns, usual)
    if override in columns:
        return override
    bare = override.split(":")[0]  # a RecBole header's `user_id:token`
    if bare in columns:
        return bare
    raise ColumnError(
        f"{source} has no {role} column {override!r}; its columns are {', '.join(columns)}"
    )


def looks_like_header(fields: Sequence[str], expected: Collection[str] = ()) -> bool:
    """Whether a first line names a user or an item column, or a column the caller expects."""
    found = [f.strip().strip('"') for f in fields]
    usual = find_column(found, (*USER_NAMES, *ITEM_NAMES)) is not None
    return usual or not set(found).isdisjoint(expected)


def is_title(name: str) -> bool:
    """Whether a column of this name holds titles: text, even where a format would split it."""
    return normalised(name) in TITLE_NAMES
