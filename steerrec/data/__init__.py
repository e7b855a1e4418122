"""Data: read interactions, build histories, split them, describe the catalogue, simulate."""

from steerrec.data.building import build_histories
from steerrec.data.catalogue import Catalogue
from steerrec.data.histories import DataWarning, Histories
from steerrec.data.interactions import (
    TIME,
    Interactions,
    Preparation,
    read_interactions,
    write_csv,
    write_parquet,
)
from steerrec.data.popularity import HEAD, MID, TAIL, PopularityGroups, popularity_groups
from steerrec.data.simulate import simulate
from steerrec.data.split import Split, leave_one_out

__all__ = [
    "HEAD",
    "MID",
    "TAIL",
    "TIME",
    "Catalogue",
    "DataWarning",
    "Histories",
    "Interactions",
    "PopularityGroups",
    "Preparation",
    "Split",
    "build_histories",
    "leave_one_out",
    "popularity_groups",
    "read_interactions",
    "simulate",
    "write_csv",
    "write_parquet",
]
