"""The card of an artifact: what it says, and that nothing of somebody else's gets into its way."""

import json
import math

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from steerrec.artifacts import Artifact, load_artifact, save_card, save_result, save_steering
from steerrec.attribution import score_neurons
from steerrec.autoencoder import SparseAutoencoder
from steerrec.card import budget_points, escaped, is_made, make_card
from steerrec.errors import ArtifactError
from steerrec.explaining import table_in_words
from steerrec.profiles import popularity_contrast
from steerrec.steering import Steering

from .tiny import random_histories, random_recommender

PNG = b"\x89PNG\r\n\x1a\nthe rest is not looked at"
PROTOCOL = {"split": "test", "mask_seen": False, "k": 10, "users": 1234, "items": 56}


def measured(ndcg, gini):
    names = ("ndcg", "hr", "ltc", "gini", "coverage", "ndcg_tail")
    metrics = {f"{name}@10": 0.5 for name in names} | {"ndcg@10": ndcg, "gini@10": gini}
    return {"protocol": PROTOCOL, "metrics": metrics}


SWEEP = {
    "steering": {"name": "popsteer"},
    "points": [
        {"alpha": 0.0, "test": measured(0.2, 0.8)},
        {"alpha": 0.5, "test": measured(0.195, 0.7)},
        {"alpha": 1.0, "test": measured(0.18, 0.6125)},
    ],
    "chosen_on_validation": {"1%": 0.0, "5%": 0.5, "10%": 1.0},
}
METHOD = {
    "name": "ipr",
    "control": False,
    "hypervolume": {"gini": 0.25, "ltc": 0.125},
    "rows": [
        {"budget": 0.05, "by": "ltc", "value": 9.0, "metrics": measured(0.1, 0.9)["metrics"]},
        {"budget": 0.05, "by": "gini", "value": 3.0, "metrics": measured(0.191, 0.71)["metrics"]},
        {"budget": 0.1, "by": "gini", "value": 7.0, "metrics": measured(0.1, 0.9)["metrics"]},
    ],
}
COMPARE = {
    "protocol": {"k": 10},
    "base": {"test": measured(0.2, 0.8)["metrics"]},
    "methods": [METHOD],
}


@pytest.fixture
def rec():
    return random_recommender(width=4)


@pytest.fixture
def artifact(rec):
    sae = SparseAutoencoder(4, 12, 3, generator=torch.Generator().manual_seed(0))
    training = {"rows": 200_000, "reconstruction": {"fvu": 0.0165, "l0": 2.5, "dead_share": 0.0117}}
    made = Artifact.create(rec, sae, training=training, data={"format": "movielens", "k_core": 5})
    table = score_neurons(rec, sae, popularity_contrast(rec.catalogue), random_histories(), users=9)
    made.at().tables[table.name] = table
    return made


@pytest.fixture
def saved(artifact, tmp_path):
    artifact.save(tmp_path / "artifact")
    return tmp_path / "artifact"


def rows(card):
    return [line for line in card.splitlines() if line.startswith("| ")]


def test_the_sae_and_the_model_are_described(artifact):
    card = make_card(artifact)
    for row in (
        "| latents | 12 |",
        "| FVU on held-out users | 0.0165 |",
        "| dead latents | 1.17% |",
        "| training rows | 200,000 |",
    ):
        assert row in rows(card)
    assert "users and items with 5 interactions or more" in card
    assert "measure it with `steerrec steer --sweep`" in card


def test_before_and_after_at_each_budget(artifact):
    artifact.at().results["sweep"] = SWEEP
    card = make_card(artifact)
    rest = "0.5000 | 0.5000 |"
    assert f"| unsteered | 0 | 0.2000 | 0.5000 | 0.5000 | 0.8000 | {rest}" in rows(card)
    assert f"| 5% budget | 0.5 | 0.1950 (-2.5%) | 0.5000 | 0.5000 | 0.7000 | {rest}" in rows(card)
    assert f"| 10% budget | 1 | 0.1800 (-10.0%) | 0.5000 | 0.5000 | 0.6125 | {rest}" in rows(card)
    assert "1,234 users, 56 items, full catalogue, seen items not masked" in card


def test_methods_are_compared_at_five_percent_by_gini(artifact):
    artifact.at().results["compare"] = COMPARE
    (row,) = [row for row in rows(make_card(artifact)) if row.startswith("| ipr")]
    assert row.startswith("| ipr | 3 | 0.1910 |")
    assert row.endswith("| 0.250 | 0.125 |")


def test_the_strongest_neurons_with_the_titles_of_their_items(artifact, rec):
    here = artifact.at()
    described = table_in_words(here.tables["popularity"], here.sae, rec, neurons=2, items=3)
    here.results["neurons-popularity"] = described
    first = described["neurons"][0]
    strongest = int(here.tables["popularity"].strongest(1))
    effect = here.sae.W_dec[strongest] @ rec.item_head.weight.T
    assert first["neuron"] == strongest
    assert first["raises"] == [rec.catalogue.titles[i] for i in effect.argsort()[-3:].flip(0)]
    assert first["lowers"] == [rec.catalogue.titles[i] for i in effect.argsort()[:3]]
    (row,) = [row for row in rows(make_card(artifact)) if row.startswith(f"| {strongest} |")]
    assert escaped(first["raises"][0]) in row


def test_the_front_matter_is_one_that_the_hub_takes(artifact):
    artifact.about = {"datasets": ["ml-1m"], "license": "mit"}
    artifact.base_model["repo_id"] = "acme/sasrec"
    artifact.at().results["sweep"] = SWEEP
    data = ModelCard(make_card(artifact)).data
    assert (data.library_name, data.base_model, data.datasets, data.license) == (
        *("steerrec", "acme/sasrec", ["ml-1m"], "mit"),
    )
    assert {"recommendation", "sparse-autoencoder", "steering"} <= set(data.tags)
    found = {result.metric_type: result for result in data.eval_results}
    assert found["gini@10"].metric_value == 0.7
    assert found["ndcg@10"].metric_value == 0.195
    assert found["ndcg@10"].dataset_name == "ml-1m"


def test_how_to_load_it_names_the_repository_and_the_site(artifact):
    assert 'load_artifact("acme/popsteer")' in make_card(artifact, repo_id="acme/popsteer")
    assert "load_base_model" not in make_card(artifact, repo_id="acme/popsteer")
    artifact.base_model["repo_id"] = "acme/sasrec"
    assert "artifact.load_base_model()" in make_card(artifact, repo_id="acme/popsteer")


HOSTILE = (
    "<script>alert(1)</script>",
    "a | b | c",
    "![x](http://evil.example/x.png)",
    "\n---\nlicense: stolen\n---\n",
    "`code` **bold** [link](x)",
    "\u202egnorw\u202c",
    "long " * 5000,
    "<!-- made by steerrec, sha256 " + "0" * 64 + " -->",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_title_means_nothing_to_markdown(artifact, text):
    neurons = [{"neuron": 1, "cohens_d": 2.0, "raises": [text], "lowers": [text]}]
    contrast = {"name": text, "group_a": {"label": text}, "group_b": {"label": text}}
    artifact.at().results["neurons-x"] = {"neurons": neurons, "contrast": contrast}
    artifact.base_model["source"] = artifact.base_model["adapter"] = text
    artifact.at().results["sweep"] = SWEEP | {"steering": {"name": text}}
    card = make_card(artifact)
    body = card.split("\n---\n", 1)[1]
    assert "<script" not in body.replace("`<script>alert(1)</script>`", "")
    assert "](http" not in body.replace("](https://arxiv.org", "").replace(
        "`![x](http://evil.example/x.png)`", ""
    )
    assert "\u202e" not in body
    assert "\nlicense: stolen" not in card
    (row,) = [row for row in rows(card) if row.startswith("| 1 |")]
    assert row.replace("\\|", "").count("|") == 7
    assert len(card) < 10_000
    assert is_made(card)


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"points": 3},
        {"points": [None, {"alpha": "x"}], "chosen_on_validation": []},
        {"points": [{"alpha": math.nan, "test": {}}], "chosen_on_validation": {"5%": 1}},
        SWEEP | {"points": SWEEP["points"][1:]},
    ],
)
def test_results_that_are_not_understood_are_left_out(artifact, found):
    assert budget_points(found) is None
    artifact.at().results |= {"sweep": found, "compare": found, "neurons-x": found}
    assert "Before and after" not in make_card(artifact)


def test_no_path_of_this_machine(artifact, tmp_path):
    artifact.base_model["source"] = f"recbole:{tmp_path}/{'deep/' * 30}model.pth"
    assert str(tmp_path) not in make_card(artifact)
    assert "`recbole:model.pth`" in make_card(artifact)


# --- edited by hand


def test_what_is_added_shows_on_the_card(saved, rec):
    save_result(saved, rec.site, "sweep", SWEEP, picture=PNG)
    save_steering(saved, rec.site, Steering(torch.ones(12), name="mine"))
    card = (saved / "README.md").read_text(encoding="utf-8")
    assert "5% budget" in card
    assert "| `mine` |" in card
    assert f"({rec.site.folder}/results/sweep.png)" in card
    assert (saved / rec.site.folder / "results" / "sweep.png").read_bytes() == PNG
    assert is_made(card)


def test_a_card_edited_by_hand_is_left_alone(saved, artifact, rec):
    file = saved / "README.md"
    edited = file.read_text(encoding="utf-8").replace("## Limits", "## Limits, in my words")
    assert not is_made(edited)
    file.write_text(edited, encoding="utf-8")
    save_result(saved, rec.site, "sweep", SWEEP)
    artifact.save(saved)
    assert not save_card(saved)
    assert file.read_text(encoding="utf-8") == edited
    assert save_card(saved, overwrite=True)
    assert is_made(file.read_text(encoding="utf-8"))


def test_line_ends_of_another_system_are_no_edit(artifact):
    assert is_made(make_card(artifact).replace("\n", "\r\n"))


def test_what_people_say_of_it_is_kept(saved):
    save_card(saved, datasets=["acme/visits"], license="mit")
    save_card(saved)
    front = yaml.safe_load((saved / "README.md").read_text().split("---")[1])
    assert (front["datasets"], front["license"]) == (["acme/visits"], "mit")
    assert load_artifact(saved).about == {"datasets": ["acme/visits"], "license": "mit"}


# --- results on disk


def test_results_and_pictures_come_back(saved, rec, tmp_path):
    save_result(saved, rec.site, "sweep", SWEEP, picture=PNG)
    save_result(saved, rec.site, "other", {"undefined": math.nan})
    loaded = load_artifact(saved)
    assert loaded.at().results == {"sweep": SWEEP, "other": {"undefined": None}}
    assert loaded.at().pictures == {"sweep": PNG}
    loaded.save(tmp_path / "again")
    for file in saved.rglob("*.*"):
        assert (tmp_path / "again" / file.relative_to(saved)).read_bytes() == file.read_bytes()


def test_an_older_picture_does_not_outlive_its_result(saved, rec):
    save_result(saved, rec.site, "sweep", SWEEP, picture=PNG)
    save_result(saved, rec.site, "sweep", SWEEP)
    assert load_artifact(saved).at().pictures == {}


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("sweep.png", b"GIF89a", "no PNG file"),
        ("sweep.png", PNG + bytes(3 << 20), "no PNG file of 2 MiB at most"),
        ("sweep.json", b"[" * 100_000, "too deeply nested|more than"),
        ("sweep.json", b"[]", "not a JSON object"),
        ("sweep.json", b'{"a": NaN}', "NaN"),
        ("a b.json", b"{}", "cannot be a file name"),
    ],
)
def test_hostile_results_are_refused(saved, rec, name, content, complaint):
    folder = saved / rec.site.folder / "results"
    folder.mkdir()
    (folder / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=complaint):
        load_artifact(saved)


def test_a_result_that_leads_out_of_the_folder_is_refused(saved, rec, tmp_path):
    (tmp_path / "secret.json").write_text(json.dumps({"a": 1}))
    folder = saved / rec.site.folder / "results"
    folder.mkdir()
    (folder / "sweep.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(ArtifactError, match="leads out of"):
        load_artifact(saved)
    for name in ("../up", "/abs", ".hidden"):
        with pytest.raises(ArtifactError, match="cannot be a file name"):
            save_result(saved, rec.site, name, {})


@pytest.mark.parametrize(
    ("trained", "shown"),
    [("batchtopk", "jumprelu, trained as batchtopk"), ("jumprelu", "jumprelu")],
)
def test_the_architecture_is_told(rec, trained, shown):
    made = Artifact.create(rec, SparseAutoencoder(4, 12, 3, architecture="jumprelu"))
    made.at().training["training"] = {"architecture": trained}
    card = rows(make_card(made))
    assert f"| architecture | {shown} |" in card
    assert "| active at once, on average | 3 |" in card


def test_an_sae_that_does_not_say_how_many_are_active(rec):
    weights = SparseAutoencoder(4, 12, 3, architecture="jumprelu").state_dict()
    made = Artifact.create(rec, SparseAutoencoder.from_weights(weights, None))
    assert "active at once" not in make_card(made)
