"""Contrasts, recipes in words, gates, budgets and learned steering on the command line."""

import shutil

import pytest

import steerrec


@pytest.fixture(scope="module")
def artifact(cli, world, tmp_path_factory):
    """The world's artifact with a table of each category."""
    folder = shutil.copytree(world.artifact, tmp_path_factory.mktemp("recipes") / "artifact")
    asked = ("--contrast", f"category={category(world)}", "--contrast", "count>q80 vs <q20")
    score = ("score", folder, "--model", world.model, "--data", world.data, "--users", "256")
    found = cli(*score, *asked, "--columns", "none", "--json").json
    names = [table["contrast"]["name"] for table in found["tables"]]
    assert names == [f"category-{category(world)}", "count-above-q80-vs-below-q20"]
    return folder


def category(world):
    rec = steerrec.load_recommender(world.model)
    return rec.catalogue.frame["category"].drop_nulls()[0]


@pytest.fixture
def steer(cli, world, artifact):
    def run(*options):
        given = ("steer", artifact, "--model", world.model, "--data", world.data)
        return cli(*given, *options, "--json")

    return run


def test_score_has_a_table_of_each_contrast(world, artifact):
    here = steerrec.load_artifact(artifact).at()
    assert len(here.tables) == 3
    table = here.table(f"category-{category(world)}")
    assert table.contrast["definition"]["a"]["column"] == "category"


def test_a_contrast_that_does_not_exist_is_said_before_anything_is_scored(cli, world, artifact):
    score = ("score", artifact, "--model", world.model, "--data", world.data)
    found = cli(*score, "--contrast", "popularity", "--contrast", "categry=x")
    assert found.code == 1
    assert "no column 'categry'; there are category" in found.err


def test_steer_knows_a_contrast_by_its_words(steer, world):
    by_words = steer("--contrast", f"category={category(world)}", "--alpha", "2").json
    assert by_words == steer("--contrast", f"category-{category(world)}", "--alpha", "2").json
    assert by_words["steered"] != steer("--alpha", "2").json["steered"]


def test_the_rule_is_less_and_a_recipe_is_more_of_group_a(steer):
    less = steer("--alpha", "1.5").json
    assert steer("--recipe", "popularity*-1.5").json["steered"] == less["steered"]
    assert steer("--recipe", "-popularity", "--alpha", "-1.5").json["steered"] == less["steered"]


def test_recipes_are_added_saved_and_named_again(steer, world, artifact):
    words = f"popularity*-0.8 + category={category(world)}*0.3"
    first = steer("--recipe", words, "--save", "both").json
    assert steer("--recipe", "both").json == first
    gated = steer("--recipe", "both", "--gate", "neuron:3", "--save", "some").json
    assert gated["steered"] != first["steered"]
    assert steer("--recipe", "some").json == gated
    double = steer("--recipe", "both*2 - some*0.5").json
    assert double["steered"] != first["steered"]
    here = steerrec.load_artifact(artifact).at()
    assert here.recipe("some").operation == "gated"
    nothing = steer("--recipe", "both - both").json
    assert nothing["steered"]["metrics"] == pytest.approx(nothing["unsteered"]["metrics"])


def test_a_recipe_of_any_kind_is_compared_and_served(cli, world, steer, artifact, tmp_path):
    steer("--recipe", "popularity*-0.5", "--gate", "taste:0.5", "--save", "tasteful")
    given = ("compare", artifact, "--model", world.model, "--data", world.data)
    options = ("--methods", "popsteer,tasteful", "--bootstrap", "5", "--json")
    found = cli(*given, "-o", tmp_path / "compared", *options).json
    assert [method["name"] for method in found["methods"]] == ["popsteer", "tasteful"]
    rec = steerrec.load_recommender(world.model)
    opened = steerrec.load_artifact(artifact, rec=rec)
    data = steerrec.read_interactions(world.data, user_col="who", item_col="what", time_col="when")
    histories = steerrec.build_histories(data, rec.catalogue).select(range(5))
    vectors = steerrec.user_vectors(rec, histories)
    assert opened.transform("tasteful")(vectors).shape == vectors.shape


def test_a_strength_is_found_for_a_budget(steer, artifact):
    found = steer(
        "--objective", "gini", "--budget", "0.2", "--split", "valid", "--save", "at20"
    ).json
    before, after = (found[key]["metrics"] for key in ("unsteered", "steered"))
    assert after["ndcg@10"] >= 0.8 * before["ndcg@10"]
    assert after["ndcg_tail@10"] >= before["ndcg_tail@10"]
    assert after["gini@10"] <= before["gini@10"]
    chosen = found["chosen_on_validation"]
    assert chosen["alpha"] == found["alpha"]
    recipe = steerrec.load_artifact(artifact).at().recipe("at20")
    assert (recipe.provenance["objective"], recipe.provenance["budget"]) == ("gini", 0.2)


def test_steering_is_learned_saved_and_explained(cli, world, steer, artifact):
    options = ("--learn", "--objective", "gini", "--budget", "0.2", "--neurons", "8")
    found = steer(*options, "--split", "valid").json
    before, after = (found[key]["metrics"] for key in ("unsteered", "steered"))
    assert after["ndcg@10"] >= 0.8 * before["ndcg@10"]
    assert 0 <= len(found["neurons"]) <= 8
    assert f"by {len(found['neurons'])} neurons alone" in found
    assert found["learned"]["objective"] == "gini"
    recipe = steerrec.load_artifact(artifact).at().recipe("learned-gini")
    assert recipe.provenance["objective"] == "gini"
    assert steer("--recipe", "learned-gini", "--split", "valid").json["steered"] == found["steered"]
    shown = cli("steer", artifact, "--model", world.model, "--data", world.data, *options)
    assert shown.code == 0
    assert "what the steering does, by neuron" in shown.out


def test_steering_is_learned_for_the_users_who_are_served(cli, world, steer, artifact, tmp_path):
    options = ("--learn", "--learn-on", "served", "--objective", "gini", "--budget", "0.2")
    found = steer(*options, "--split", "valid").json
    before, after = (found[key]["metrics"] for key in ("unsteered", "steered"))
    assert after["ndcg@10"] >= 0.8 * before["ndcg@10"]  # the very users that it was chosen on
    assert after["gini@10"] < before["gini@10"]
    assert found["learned"]["learned_on"] == "served"
    assert found["learned"]["valid"]["gini"] == pytest.approx(after["gini@10"])
    assert 0 < len(found["neurons"]) <= 20
    recipe = steerrec.load_artifact(artifact).at().recipe("learned-served-gini")
    assert recipe.provenance["users"] == found["unsteered"]["protocol"]["users"]
    again = steer("--recipe", "learned-served-gini", "--split", "valid").json
    assert again["steered"] == found["steered"]

    lists = tmp_path / "lists.csv"  # whole histories, as in production
    command = ("steer", artifact, "--model", world.model, "--data", world.data, *options)
    shown = cli(*command, "-o", lists)
    assert shown.code == 0, shown.err
    assert "what the steering does, by neuron" in shown.out
    assert lists.exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--recipe", "popularty"), 1, "nearest: popularity"),
        (("--recipe", "popularity*"), 1, "is not understood"),
        (("--gate", "moon:1"), 2, "--gate is 'moon:1'; expected neuron:NUMBER"),
        (("--gate", "neuron:64"), 1, "reads neuron 64; the SAE has 64"),
        (("--budget", "0.1"), 2, "go with --objective"),
        (("--learn",), 2, "go with --objective"),
        (("--objective", "gini", "--learn-on", "served"), 2, "goes with --learn"),
        (("--objective", "gini", "--alpha", "1"), 2, "finds the strength"),
        (("--objective", "gini", "--budget", "1"), 1, "expected a share of nDCG"),
        (("--objective", "fame"), 1, "no objective 'fame'"),
        (("--objective", "gini", "--learn", "--recipe", "popularity"), 2, "makes its own recipe"),
        (("--contrast", "category=nothing"), 1, "no attribution table for contrast"),
    ],
)
def test_what_makes_no_sense_is_said(steer, options, code, message):
    found = steer(*options)
    assert found.code == code
    assert message in " ".join(found.err.replace("│", " ").split())
