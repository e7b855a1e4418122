"""The card of an artifact: README.md, for a person who considers using it.

It is made from what the artifact holds and nothing else, so that pushing needs no model. A card
that was edited by hand is told from a made one by a digest in its last line.
"""

from __future__ import annotations

import hashlib
import html
import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from steerrec.choosing import BUDGETS
from steerrec.published import without_path

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from steerrec.artifact_site import SiteArtifact
    from steerrec.artifacts import Artifact

TAGS = ("recommendation", "sequential-recommendation", "sparse-autoencoder", "steering")
METRICS = ("ndcg", "hr", "ltc", "gini", "coverage", "ndcg_tail")
TITLES = {
    "ndcg": "nDCG@{k}",
    "hr": "HR@{k}",
    "ltc": "LTC@{k}",
    "gini": "Gini@{k}",
    "coverage": "coverage@{k}",
    "ndcg_tail": "nDCG@{k}, tail targets",
}
NEURONS = "neurons-"
"""How the results are called in which the strongest neurons of a contrast are described."""

_MEANING = (
    "LTC: share of the long tail that is recommended to anybody; Gini: inequality of exposure, 0 "
    "if all items are recommended equally often; coverage: share of the catalogue recommended."
)
_MARK = re.compile(r"\n<!-- made by steerrec, sha256 ([0-9a-f]{64}) -->\n?\Z")
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#|~$!])")
_LONGEST = 80  # characters of a title


def make_card(artifact: Artifact, *, repo_id: str | None = None) -> str:
    """The text of README.md, front matter first.

    Parameters
    ----------
    artifact
        What it is about. Numbers come from the training summaries and the results of its sites.
    repo_id
        Where on the Hub it is, for the lines that load it.
    """
    sections = [_head(artifact), *_base(artifact)]
    for folder, here in artifact.sites.items():
        sections += [f"## {_code(here.site.path)}", *_site(folder, here)]
    sections += [*_loading(artifact, repo_id), *_limits(artifact)]
    text = f"---\n{_front_matter(artifact)}\n---\n\n" + "\n\n".join(sections) + "\n"
    return f"{text}\n<!-- made by steerrec, sha256 {_digest(text)} -->\n"


def is_made(text: str) -> bool:
    """Whether a card is as `make_card` wrote it, and nobody has edited it since."""
    text = text.replace("\r\n", "\n")
    found = _MARK.search(text)
    return found is not None and _digest(text[: found.start()]) == found[1]


def escaped(text: str) -> str:
    """A text of somebody else, such as a title, that means nothing to Markdown; one short line."""
    return _SPECIAL.sub(r"\\\1", html.escape(_line(text), quote=False))


# --- parts


def _head(artifact: Artifact) -> str:
    contrasts = sorted({name for here in artifact.sites.values() for name in here.tables})
    what = " and ".join(escaped(name) for name in contrasts) or "a sequential recommender"
    return (
        f"# Steering {what} with a sparse autoencoder\n\n"
        "A sparse autoencoder (SAE) on a layer of a frozen sequential recommender, and what it "
        "takes to steer that recommender by it at inference: no retraining, no change to the "
        "model's code. Made with steerrec; the method is PopSteer "
        "([arXiv 2508.17297](https://arxiv.org/abs/2508.17297)) unless a recipe below says "
        "otherwise."
    )


def _base(artifact: Artifact) -> Iterator[str]:
    base = artifact.base_model
    mark = next(iter(base["fingerprint"].values()))
    lines = [f"adapter {_code(base.get('adapter'))}, {_code(mark.get('class'))}"]
    if base.get("repo_id"):
        at = f" at commit {_code(base.get('revision'))}" if base.get("revision") else ""
        lines.append(f"{_code(base['repo_id'])} on the Hub{at}")
    elif base.get("source") is not None:
        source = without_path(str(base["source"]))  # who works where is nobody's business
        lines.append(f"opened from {_code(source)}, which is not on the Hub")
    lines.append(
        f"{_count(mark.get('items'))} items, user vectors of width {_count(mark.get('width'))}, "
        f"weights {_code(str(mark.get('model_sha256'))[:12])}"
    )
    yield "## Base model\n\n" + "\n".join(f"- {line}" for line in lines)
    data, names = artifact.data, _texts(artifact.about.get("datasets"))
    if data or names:
        k_core, dedup = data.get("k_core"), data.get("dedup")
        kept = f"users and items with {k_core} interactions or more" if k_core else "all rows"
        lines = [f"data: {', '.join(map(escaped, names))}"] if names else []
        if data:
            lines.append(
                f"read as {_code(data.get('format'))}; {kept}; repeated (user, item) rows "
                f"{'dropped' if dedup else 'kept'}"
            )
        lines.append("leave one out: the last item of each user is test, the one before validation")
        yield "## Data\n\n" + "\n".join(f"- {line}" for line in lines)


def _site(folder: str, here: SiteArtifact) -> Iterator[str]:
    found = _dig(here.training, "reconstruction")
    rows = [
        ("architecture", _architecture(here)),
        ("latents", _count(here.sae.d_sae)),
        ("active at once" + ", on average" * (here.sae.threshold is not None), _count(here.sae.k)),
        ("FVU on held-out users", _number(_dig(found, "fvu"))),
        ("L0", _number(_dig(found, "l0"), ".1f")),
        ("dead latents", _number(_dig(found, "dead_share"), ".2%")),
        ("training rows", _count(_dig(here.training, "rows"))),
        *(
            (f"nDCG@10 kept by the reconstruction, {which}", _number(kept, ".2%"))
            for which in ("valid", "test")
            if (kept := _dig(here.training, "downstream", which, "ndcg_kept")) is not None
        ),
    ]
    yield _table(["the SAE", ""], [row for row in rows if row[1] != "–"])
    yield from _swept(folder, here)
    yield from _compared(folder, here)
    for name, described in here.results.items():
        if name.startswith(NEURONS):
            yield from _neurons(described)
    recipes = [
        [_code(name), _code(s.provenance.get("rule")), _number(s.alpha, "g")]
        for name, s in here.steerings.items()
    ]
    if recipes:
        yield "Recipes saved with it:\n\n" + _table(["recipe", "rule", "strength"], recipes)


def _architecture(here: SiteArtifact) -> str:
    trained = _dig(here.training, "training", "architecture")
    own = here.sae.architecture
    return f"{own}, trained as batchtopk" if trained == "batchtopk" else own


def _swept(folder: str, here: SiteArtifact) -> Iterator[str]:
    points = budget_points(here.results.get("sweep", {}))
    if not points:
        return
    base, chosen = points
    k = _dig(base, "protocol", "k")
    rows = [["unsteered", "0", *_metrics(base, k)]]
    for budget, alpha, point in chosen:
        found = [f"{budget:.0%} budget", _number(alpha, "g"), *_metrics(point, k)]
        found[2] += _change(*(_dig(each, "metrics", f"ndcg@{k}") for each in (base, point)))
        rows.append(found)
    rule = _dig(here.results["sweep"], "steering", "name")
    columns = ["", "strength", *(TITLES[m].format(k=k) for m in METRICS)]
    yield (
        f"### Before and after\n\nSteered by {_code(rule)}; for each budget of nDCG the strength "
        "with the lowest Gini that keeps it on validation, and nDCG on tail targets too, measured "
        f"on test ({_protocol(base)}). {_MEANING}\n\n" + _table(columns, rows)
    )
    if "sweep" in here.pictures:
        yield f"![nDCG against Gini and long-tail coverage]({folder}/results/sweep.png)"


def _compared(folder: str, here: SiteArtifact) -> Iterator[str]:
    found = here.results.get("compare", {})
    k, base = _dig(found, "protocol", "k"), _dig(found, "base", "test")
    methods = _list(_dig(found, "methods"))
    if not methods or not isinstance(base, Mapping):
        return
    rows = [["unsteered", "", *_metrics({"metrics": base}, k), "", ""]]
    for method in methods:
        chosen = [
            row
            for row in _list(_dig(method, "rows"))
            if _dig(row, "budget") == 0.05 and _dig(row, "by") == "gini"
        ]
        if not chosen:
            continue
        control = " (control)" if _dig(method, "control") else ""
        volumes = [_number(_dig(method, "hypervolume", by), ".3f") for by in ("gini", "ltc")]
        value = _dig(chosen[0], "value")
        name = escaped(str(_dig(method, "name"))) + control
        rows.append([name, _number(value, "g"), *_metrics(chosen[0], k), *volumes])
    columns = ["method", "strength", *(TITLES[m].format(k=k) for m in METRICS), "HV Gini", "HV LTC"]
    yield (
        "### Compared with re-ranking\n\nEach method at the setting with the lowest Gini that "
        "keeps 95 % of nDCG, and nDCG on tail targets, on validation; measured on test. HV: "
        "hypervolume up to 10 %. Strength 0 is the unchanged list, where no other setting will do."
        "\n\n" + _table(columns, rows)
    )
    if "compare" in here.pictures:
        yield f"![Frontiers of all methods]({folder}/results/compare.png)"


def _neurons(described: Mapping[str, Any]) -> Iterator[str]:
    neurons = _list(described.get("neurons"))
    if not neurons:
        return
    rows = [
        [
            _number(_dig(each, "neuron"), "d") if type(_dig(each, "neuron")) is int else "–",
            _number(_dig(each, "cohens_d"), "+.2f"),
            *(_number(_dig(each, f"firing_rate_{group}"), ".1%") for group in "ab"),
            "; ".join(map(escaped, _texts(_dig(each, "raises"))[:5])) or "–",
            "; ".join(map(escaped, _texts(_dig(each, "lowers"))[:5])) or "–",
        ]
        for each in neurons
    ]
    labels = [escaped(str(_dig(described, "contrast", group, "label"))) for group in _GROUPS]
    columns = ["neuron", "Cohen's d", *(f"fires, {label}" for label in labels), "raises", "lowers"]
    yield (
        f"### Strongest neurons: {escaped(str(_dig(described, 'contrast', 'name')))}\n\n"
        f"Cohen's d between synthetic users of {labels[0]} (+) and {labels[1]} (−) items; the "
        "items whose scores a neuron raises and lowers most while it is active. d compares "
        "pre-activations: a neuron may differ between the groups and yet fire in neither.\n\n"
        + _table(columns, rows, numbers=4)
    )


_GROUPS = ("group_a", "group_b")


def _loading(artifact: Artifact, repo_id: str | None) -> Iterator[str]:
    where = repo_id or "path/to/this/folder"
    several = len(artifact.sites) > 1
    at = f', site="{next(iter(artifact.sites))}"' if several else ""
    lines = ["import steerrec", "", f'artifact = steerrec.load_artifact("{where}")']
    if artifact.base_model.get("repo_id") and repo_id:
        lines.append("rec = artifact.load_base_model()  # at the commit above, and checked")
    call = f"artifact.transform({at.lstrip(', ')})"
    lines.append(f"transform = {call}  # transform(user_vectors, alpha) -> [B, H]")
    yield "## Use\n\n```python\n" + "\n".join(lines) + "\n```"
    model = "" if artifact.base_model.get("repo_id") else " --model MODEL"
    yield f"```bash\nsteerrec steer {where}{model} --data DATA -o recs.parquet\n```"
    yield (
        "A site's folder is a folder of SAELens too: `sae_lens.SAE.load_from_disk(...)` opens it."
    )


def _limits(artifact: Artifact) -> Iterator[str]:
    measured = any(here.results for here in artifact.sites.values())
    yield "## Limits\n\n" + "\n".join(
        [
            "- It fits this base model and no other: the weights are compared when it is loaded. "
            "After retraining, `steerrec attach --warm-start` goes on from it.",
            "- Strengths do not carry over to other SAEs; choose them on your own validation data.",
            "- Neurons are told apart by synthetic users and by their effect on scores. That a "
            "label fits is no proof of what a neuron is for.",
            "- The numbers above are of one split of one data set; they are no promise for yours."
            if measured
            else "- What steering gains and costs has not been recorded here; measure it with "
            "`steerrec steer --sweep`.",
        ]
    )


# --- front matter


def _front_matter(artifact: Artifact) -> str:
    from huggingface_hub import ModelCardData  # of no use to those who only load a folder

    about = artifact.about
    fields: dict[str, Any] = {
        "library_name": "steerrec",
        "tags": [*TAGS],
        "license": about.get("license"),
        "base_model": artifact.base_model.get("repo_id"),
        "datasets": _texts(about.get("datasets")) or None,
        "metrics": ["ndcg", "gini"],
    }
    found = list(_evaluations(artifact))
    if found:
        fields |= {"model_name": "steerrec", "eval_results": found}
    return ModelCardData(**fields).to_yaml().strip()


def _evaluations(artifact: Artifact) -> Iterator[EvalResult]:
    """Test metrics at a budget of 5 %, for the model index."""
    from huggingface_hub import EvalResult

    names = _texts(artifact.about.get("datasets"))
    for here in artifact.sites.values():
        points = budget_points(here.results.get("sweep", {}))
        for budget, alpha, point in points[1] if points else ():
            if budget != 0.05:
                continue
            for name, value in point["metrics"].items():
                if name.partition("@")[0] in METRICS and _finite(value):
                    yield EvalResult(
                        task_type="recommendation",
                        dataset_type=names[0] if names else "interactions",
                        dataset_name=names[0] if names else "interactions",
                        dataset_split="test",
                        metric_type=name,
                        metric_value=round(value, 6),
                        metric_name=f"{name}, steered at {alpha:g}",
                    )


# --- what results say


def budget_points(
    sweep: Mapping[str, Any],
) -> tuple[dict[str, Any], list[tuple[float, float, dict[str, Any]]]] | None:
    """Of a sweep as an artifact holds it: unsteered on test, and (budget, strength, test).

    None where it is no sweep that is understood.
    """
    by_alpha: dict[float, dict[str, Any]] = {}
    for point in _list(sweep.get("points")):
        alpha, test = _dig(point, "alpha"), _dig(point, "test")
        if _finite(alpha) and isinstance(_dig(test, "metrics"), Mapping):
            by_alpha[alpha] = test
    chosen = []
    for budget in BUDGETS:
        alpha = _dig(sweep, "chosen_on_validation", f"{budget:.0%}")
        if _finite(alpha) and alpha in by_alpha:
            chosen.append((budget, alpha, by_alpha[alpha]))
    return (by_alpha[0], chosen) if 0 in by_alpha and chosen else None


def _metrics(found: Mapping[str, Any], k: object) -> list[str]:
    return [_number(_dig(found, "metrics", f"{m}@{k}"), ".4f") for m in METRICS]


def _change(before: object, after: object) -> str:
    """By how much a metric changed, in brackets; nothing where that is not known."""
    if not (_finite(before) and _finite(after)) or not before:
        return ""
    return f" ({_number(after / before - 1, '+.1%')})"  # type: ignore[operator]


def _protocol(found: Mapping[str, Any]) -> str:
    protocol = found.get("protocol")
    seen = "masked" if _dig(protocol, "mask_seen") else "not masked"
    users, items = (_count(_dig(protocol, key)) for key in ("users", "items"))
    return f"{users} users, {items} items, full catalogue, seen items {seen}"


def _dig(value: Any, *keys: str) -> Any:
    """What lies under these keys, one in the other; None where there is no such thing."""
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _texts(value: object) -> list[str]:
    return [each for each in _list(value) if isinstance(each, str)]


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def _number(value: Any, form: str = ".4g") -> str:
    return format(value, form) if _finite(value) else "–"


def _count(value: Any) -> str:
    return f"{value:,}" if type(value) is int else "–"


def _code(value: object) -> str:
    """A value of somebody else as code, in which nothing can end the code."""
    return f"`{_line(str(value)).replace('`', chr(39)).replace('|', '¦')}`"


def _line(text: str) -> str:
    """One short line, without what is not seen or turns the direction of writing."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"


def _table(columns: list[str], rows: list[Any], numbers: int | None = None) -> str:
    """A Markdown table, whose columns from the second on, or the first so many, are numbers."""
    names = range(1) if numbers is None else range(numbers, len(columns))
    lines = [columns, ["---" if i in names else "---:" for i in range(len(columns))], *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def _digest(text: str) -> str:
    return hashlib.sha256(text.rstrip("\n").encode()).hexdigest()
