"""Adapters that installed packages publish as entry points: real ones, in folders on the path."""

import sys
import warnings

import pytest
import torch
from safetensors.torch import save_file

from steerrec.conformance import check_conformance
from steerrec.data import Histories
from steerrec.errors import ModelError, ModelWarning
from steerrec.loading import holds_no_items, load_recommender

from .toy_models import tiny_catalogue

ADAPTER = '''
"""A GRU of a few lines, saved as safetensors."""
import torch
from safetensors.torch import load_file
from torch import nn

from steerrec import ItemHead, Site, TokenIds
from steerrec.wrapping import TokenScheme, WrappedRecommender, as_catalogue


class GRU(nn.Module):
    def __init__(self, items, width):
        super().__init__()
        self.embedding = nn.Embedding(items + 1, width, padding_idx=0)
        self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, ids):
        states, _ = self.gru(self.embedding(ids))
        last = (ids != 0).sum(dim=1) - 1
        return states[torch.arange(len(ids)), last] @ self.embedding.weight.T


def load(path, *, items=None, device="cpu"):
    weights = load_file(path)
    rows, width = weights["embedding.weight"].shape
    model = GRU(rows - 1, width)
    model.load_state_dict(weights)
    return WrappedRecommender(
        model.to(device),
        as_catalogue(range(1, rows) if items is None else items, of=model, found=rows - 1),
        Site("gru", select=(0,), positions_from=TokenIds("embedding")),
        TokenScheme(first_id=1, pad_id=0, padding="right", max_length=20),
        model,
        lambda: ItemHead(model.embedding.weight[1:]),
        columns=1,
        record={"adapter": "mylib", "source": f"mylib:{path}"},
    )


def text(path, **options):
    return "no recommender"


number = 7
'''


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Install a package with entry points; its modules are the given ones."""
    modules = set()

    def publish(package, points, **sources):
        folder = tmp_path / package
        info = folder / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[steerrec.adapters]", *lines, ""]))
        for module, source in sources.items():
            (folder / f"{module}.py").write_text(source)
            modules.add(module)
        monkeypatch.syspath_prepend(folder)

    yield publish
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def mylib(publish):
    publish("mylib-steerrec", {"mylib": "mylib_adapter:load"}, mylib_adapter=ADAPTER)


@pytest.fixture
def checkpoint(mylib, tmp_path):
    from mylib_adapter import GRU

    torch.manual_seed(0)
    save_file(GRU(12, 8).state_dict(), tmp_path / "gru.safetensors")
    return tmp_path / "gru.safetensors"


def refusal(spec):
    with pytest.raises(ModelError) as error:
        load_recommender(spec)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_published_adapter_opens_its_checkpoints(checkpoint):
    rec = load_recommender(f"mylib:{checkpoint}")
    check_conformance(rec)
    assert rec.catalogue.item_ids.to_list() == list(range(1, 13))
    assert rec.describe()["source"] == f"mylib:{checkpoint}"
    batch = rec.make_batch(Histories.from_lists([[0, 11], [3]]))
    assert batch.tolist() == [[1, 12], [4, 0]]
    named = load_recommender(f"mylib:{checkpoint}", items=tiny_catalogue(12), device="meta")
    assert named.catalogue.item_ids.to_list()[0] == "i0"
    assert named.model.embedding.weight.device.type == "meta"


@pytest.mark.usefixtures("mylib")
def test_it_is_a_checkpoint_without_ids_and_is_listed():
    assert holds_no_items("mylib:x.safetensors")
    assert "pkg.module:function, or gsasrec:PATH, mylib:PATH" in refusal("nothing")


@pytest.mark.usefixtures("mylib")
def test_without_a_path_it_is_no_model():
    assert "'mylib:' is not a model" in refusal("mylib:")


def test_it_goes_before_a_module_of_its_name(publish, checkpoint):
    publish("other", {}, mylib="def load(): raise AssertionError")
    with pytest.raises(OSError, match="No such file"):
        load_recommender("mylib:load")


FAILS = """
def fails(path, *, items=None, device="cpu"):
    raise TypeError("its own")
"""


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("nowhere:load", "cannot be imported from 'nowhere:load': No module named 'nowhere'"),
        ("mylib_adapter:lod", "cannot be imported from 'mylib_adapter:lod': .* attribute 'lod'"),
        ("mylib_adapter:number", r"is a int; expected a function load\(path, \*, items, device\)"),
        ("mylib_adapter", r"is a module; expected a function load\("),
        ("mylib_adapter:text", "returned a str; expected a steerrec.Recommender"),
        ("mylib_adapter:fails", None),
    ],
)
def test_a_broken_one_is_one_line_that_names_the_package(publish, value, complaint):
    publish("broken-lib", {"mylib": value}, mylib_adapter=ADAPTER + FAILS)
    if complaint is None:  # an error in its own code stays what it is, with a note
        with pytest.raises(TypeError) as raised:
            load_recommender("mylib:x")
        assert raised.value.__notes__ == ["raised by the adapter 'mylib' of broken-lib"]
    else:
        with pytest.raises(ModelError, match=f"^the adapter 'mylib' of broken-lib {complaint}"):
            load_recommender("mylib:x")


def test_a_broken_one_is_in_nobodys_way(publish, checkpoint):
    publish("broken-lib", {"broken": "nowhere:load"})
    check_conformance(load_recommender(f"mylib:{checkpoint}"))


def test_nothing_of_a_package_runs_before_it_is_asked_for(publish, checkpoint):
    publish("loud", {"loud": "loud:load"}, loud="raise RuntimeError('imported')")
    load_recommender(f"mylib:{checkpoint}")
    refusal("nothing")
    with pytest.raises(RuntimeError, match="imported"):
        load_recommender("loud:x")


def test_two_packages_with_one_name_are_refused(publish, checkpoint):
    publish("rival", {"mylib": "rival:load"}, rival="load = 1")
    found = refusal(f"mylib:{checkpoint}")
    assert found == ("mylib-steerrec and rival publish an adapter 'mylib'; uninstall one of them")


def test_one_package_found_twice_is_one(publish, checkpoint):
    publish("mylib-again", {"mylib": "mylib_adapter:load"})
    check_conformance(load_recommender(f"mylib:{checkpoint}"))


def test_the_names_of_steerrecs_own_adapters_are_not_for_others(publish, tmp_path):
    from steerrec.adapters.sasrec import save

    from .toy_models import tiny_sasrec

    publish("greedy", {"sasrec": "greedy:load"}, greedy="raise RuntimeError('imported')")
    save(tiny_sasrec(), tmp_path / "model")
    with pytest.warns(ModelWarning, match="'sasrec' of greedy is left out: steerrec has one"):
        rec = load_recommender(f"sasrec:{tmp_path / 'model'}")
    assert rec.describe()["adapter"] == "sasrec"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_recommender(tmp_path / "model")
