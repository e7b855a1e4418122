"""From what a user types to a recommender: folders, adapters, functions, Hub ids, and nonsense."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from steerrec import loaders
from steerrec.adapters.sasrec import SASRecRecommender, save
from steerrec.data import Histories
from steerrec.errors import HubError, ModelError
from steerrec.loading import load_recommender, model_record

from .toy_models import tiny_sasrec

HISTORIES = Histories.from_lists([[0, 1, 2], [3]])


@pytest.fixture
def rec():
    return tiny_sasrec()


@pytest.fixture
def folder(rec, tmp_path):
    save(rec, tmp_path / "model")
    return tmp_path / "model"


def same_scores(one, other):
    one, other = (rec.score(rec.make_batch(HISTORIES)) for rec in (one, other))
    return torch.equal(one, other)


def refusal(spec, **options):
    """The one line in which a spec is refused."""
    with pytest.raises((ModelError, HubError)) as error:
        load_recommender(spec, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_as_path_or_text_or_with_its_adapter(rec, folder):
    for spec in (folder, str(folder), f"sasrec:{folder}"):
        assert same_scores(load_recommender(spec), rec)


def test_device(folder):
    assert load_recommender(folder).model.device.type == "cpu"
    assert load_recommender(folder, device="meta").model.device.type == "meta"


# --- the Hub, from its cache --------------------------------------------------------------------


@pytest.fixture
def cached(folder, tmp_path):
    """What is on disk once `acme/sasrec` has been downloaded, its branch main and its tag v1."""
    cache = tmp_path / "cache"
    for ref, commit, seed in (("main", "a" * 40, 0), ("v1", "b" * 40, 1)):
        repository = cache / "models--acme--sasrec"
        save(tiny_sasrec(seed=seed), repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    return {"cache_dir": cache, "local_files_only": True}


def test_a_hub_id(cached):
    assert same_scores(load_recommender("acme/sasrec", **cached), tiny_sasrec(seed=0))


@pytest.mark.parametrize("spec", ["acme/sasrec", "sasrec:acme/sasrec"])
def test_a_revision_of_a_hub_id(cached, spec):
    loaded = load_recommender(spec, revision="v1", **cached)
    assert same_scores(loaded, tiny_sasrec(seed=1))


@pytest.mark.parametrize("spec", ["acme/other", "sasrec:acme/other"])
def test_what_is_not_on_the_hub(cached, spec):
    message = refusal(spec, **cached)
    assert "acme/other is no folder here, and cannot be had from the Hub" in message
    assert "is not in the cache, or not all of it, and the network is off" in message


def test_a_folder_that_is_not_there():
    assert "/no/such/folder has no items.parquet" in refusal("sasrec:/no/such/folder")


def test_a_revision_of_a_folder(folder):
    assert "is a folder here: it has no revision 'v1'" in refusal(folder, revision="v1")
    message = refusal(f"sasrec:{folder}", revision="v1")
    assert "is not the id of a repository on the Hub: it has no revision 'v1'" in message


def test_a_folder_goes_before_a_hub_id_of_the_same_name(rec, folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    assert same_scores(load_recommender(f"{folder.parent.name}/model"), rec)


def test_a_file_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model.pth").touch()
    assert "is not a model" in refusal("models/model.pth")


def test_a_model_that_holds_its_own_settings_takes_no_others(folder, cached):
    assert "holds its own settings; expected no heads" in refusal(folder, heads=2)
    assert "cannot be had with 'heads'" in refusal("acme/sasrec", heads=2, **cached)


# --- a function of the user's -------------------------------------------------------------------


@pytest.fixture
def module(folder, tmp_path, monkeypatch):
    """A module of the user's, of this test alone, on the path."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").touch()
    (tmp_path / "shop" / "models.py").write_text(
        f"""
from steerrec.adapters.sasrec import load

def sasrec():
    return load({str(folder)!r})

def number():
    return 7

def model():
    return sasrec().model

class Half:
    model = catalogue = site = None

def half():
    return Half()

class Whole(Half):
    max_length, item_head = 5, None
    make_batch = score = lambda self, given: given

    def describe(self):
        return {{"folder": __import__("pathlib").Path("here")}}

def whole():
    return Whole()

setting = "text"
"""
    )
    (tmp_path / "shop" / "broken.py").write_text("import a_module_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    yield "shop.models"
    for name in ("shop", "shop.models", "shop.broken"):
        sys.modules.pop(name, None)


def test_a_function(rec, module):
    assert same_scores(load_recommender(f"{module}:sasrec"), rec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "shop.models:number",
            "shop.models:number returned a int; expected a steerrec.Recommender",
        ),
        ("shop.models:model", "a bare torch module; .* which steerrec.wrap makes of it"),
        (
            "shop.models:half",
            "a Half, which has no max_length, item_head, make_batch, score, describe; expected",
        ),
        ("shop.models:Whole", r"describe\(\) of the Whole .* PosixPath is not JSON"),
        ("shop.models:setting", "is a str; expected a function"),
        ("shop.models:missing", "shop.models:missing cannot be imported.*no attribute 'missing'"),
        ("shop.nowhere:sasrec", "cannot be imported: No module named 'shop.nowhere'$"),
        ("shop.broken:sasrec", "cannot be imported: No module named 'a_module_that_is_not_there'$"),
        ("shup.models:sasrec", "No module named 'shup'; it has to be installed, or in a folder on"),
    ],
)
@pytest.mark.usefixtures("module")
def test_a_function_that_does_not_do(spec, message):
    with pytest.raises(ModelError, match=message):
        load_recommender(spec)


@pytest.mark.parametrize("safe_path", [False, True])
def test_a_function_in_the_working_directory_unless_python_is_to_leave_that_out(
    rec, module, tmp_path, monkeypatch, safe_path
):
    monkeypatch.chdir(tmp_path)
    elsewhere = [entry for entry in sys.path if entry not in ("", str(tmp_path))]
    monkeypatch.setattr(sys, "path", elsewhere)
    flags = SimpleNamespace(safe_path=safe_path)
    monkeypatch.setattr(loaders, "sys", SimpleNamespace(flags=flags, path=elsewhere))
    if safe_path:
        assert "cannot be imported" in refusal(f"{module}:sasrec")
    else:
        assert same_scores(load_recommender(f"{module}:sasrec"), rec)
        assert sys.path[-1] == str(tmp_path)  # last: it hides no other module


@pytest.mark.parametrize("options", [{"device": "meta"}, {"revision": "v1"}])
def test_a_function_chooses_device_and_revision_by_itself(module, options):
    assert "is a function: it chooses" in refusal(f"{module}:sasrec", **options)


def test_an_error_inside_the_users_function_is_theirs(module, monkeypatch):
    def fail():
        raise ZeroDivisionError("mine")

    monkeypatch.setattr(f"{module}.sasrec", fail)
    with pytest.raises(ZeroDivisionError, match="mine") as raised:
        load_recommender(f"{module}:sasrec")
    assert raised.value.__notes__ == [f"raised by {module}:sasrec"]


@pytest.mark.parametrize("spec", ["shop/models.py:sasrec", "./shop/models.py:sasrec"])
def test_a_file_is_not_a_module(module, tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    assert "names a file; expected a module as Python imports it" in refusal(spec)


# --- nonsense -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", ["nothing", "/no/such/folder", "a/b/c", "model.pth", "x y", "org/", "pkg:", ":f", "1:f"]
)
def test_a_spec_of_no_kind_is_told_all_kinds(spec):
    message = refusal(spec)
    for kind in (repr(spec), "steerrec train", "Hub id", "pkg.module:function", "sasrec:PATH"):
        assert kind in message


@pytest.mark.parametrize("config", [None, "not json", "[]", "{}", '"steerrec_sasrec"'])
def test_a_folder_that_is_no_saved_model(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert f"{tmp_path} is not a saved model" in refusal(tmp_path)


def test_a_folder_of_another_kind_of_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "holds a 'bert' model; steerrec can open steerrec_sasrec" in refusal(tmp_path)


# --- the record of a folder ---------------------------------------------------------------------


def test_the_record_is_what_the_folder_holds(folder):
    assert model_record(folder) == {}
    assert model_record("acme/sasrec") == {}
    (folder / "steerrec.json").write_text(json.dumps({"data": {"k_core": 5}}))
    assert model_record(folder) == {"data": {"k_core": 5}}


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_a_damaged_record_is_an_error(folder, text):
    (folder / "steerrec.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"steerrec\.json"):
        model_record(folder)


def test_what_is_loaded_is_frozen_and_in_eval_mode(folder):
    rec = load_recommender(folder)
    assert isinstance(rec, SASRecRecommender)
    assert not rec.model.training
    assert not any(p.requires_grad for p in rec.model.parameters())


def test_a_loaded_folder_can_move(rec, folder, tmp_path):
    shutil.move(folder, tmp_path / "elsewhere")
    assert same_scores(load_recommender(tmp_path / "elsewhere"), rec)


@pytest.mark.parametrize("name", ["recbole:" + "a" * 300, "a" * 300, "x\0y", "recbole:x\0y"])
def test_names_that_no_file_can_have(name):
    with pytest.raises(ModelError):
        load_recommender(name)
