"""Re-ranking baselines: one a file, all called alike.

`gather_candidates` looks at the scores once; each method makes lists [U, k] of what it gathered,
at any strength. `METHODS` names them.
"""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from steerrec.errors import MethodError
from steerrec.rerank.base import Need, Reranker
from steerrec.rerank.calibrated import Calibrated
from steerrec.rerank.candidates import Candidates, gather_candidates
from steerrec.rerank.fair import FairTopK, m_table
from steerrec.rerank.ipr import IPR
from steerrec.rerank.logit_adjustment import LogitAdjustment
from steerrec.rerank.pct import PCT, PCTAvgEqual, personal_targets
from steerrec.rerank.pmmf import PMMF, PMMFItems
from steerrec.rerank.random_top import RandomTop
from steerrec.rerank.slot_filling import SlotFilling
from steerrec.rerank.vectors import MeanDifference, PopSteer, RawPopSteer, score_dimensions
from steerrec.rerank.xquad import BinaryXQuAD, XQuAD

__all__ = [
    "IPR",
    "METHODS",
    "PCT",
    "PMMF",
    "BinaryXQuAD",
    "Calibrated",
    "Candidates",
    "FairTopK",
    "LogitAdjustment",
    "MeanDifference",
    "Need",
    "PCTAvgEqual",
    "PMMFItems",
    "PopSteer",
    "RandomTop",
    "RawPopSteer",
    "Reranker",
    "SlotFilling",
    "XQuAD",
    "gather_candidates",
    "m_table",
    "personal_targets",
    "reranker",
    "score_dimensions",
]

METHODS: dict[str, type[Reranker]] = {
    method.name: method
    for method in (
        PopSteer,
        RawPopSteer,
        MeanDifference,
        LogitAdjustment,
        IPR,
        FairTopK,
        PCT,
        PCTAvgEqual,
        PMMF,
        PMMFItems,
        Calibrated,
        XQuAD,
        BinaryXQuAD,
        RandomTop,
        SlotFilling,
    )
}
"""The methods by name, controls last."""


def reranker(name: str, **parameters: Any) -> Reranker:
    """A method by its name.

    Parameters
    ----------
    name
        One of `METHODS`.
    parameters
        Its parameters; those that are not given have their defaults.

    Raises
    ------
    MethodError
        If there is no such method, or it has no such parameter or value.

    Examples
    --------
    >>> reranker("ipr", alpha=2.0)
    IPR(alpha=2.0, transform='softmax')
    """
    method = METHODS.get(name)
    if method is None:
        near = get_close_matches(name.lower(), METHODS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise MethodError(f"no re-ranking method {name!r}; {hint}there are {', '.join(METHODS)}")
    known = {field.name: field for field in fields(method)}
    for given in parameters:
        if given not in known:
            raise MethodError(f"{name} has no parameter {given!r}; it has {', '.join(known)}")
    missing = [need for need in method.needs if need in known and need not in parameters]
    if missing:
        raise MethodError(f"{name} needs {missing[0]}=...; see {method.__name__}")
    return method(**parameters)
