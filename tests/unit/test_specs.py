"""Settings behind a path: how they are written, read, and refused."""

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerrec import loading
from steerrec.errors import ModelError
from steerrec.loading import load_recommender
from steerrec.specs import join_spec, read_settings, split_spec


def load(path, *, items=None, device="cpu", heads: int | None = None, norm=True):
    """An adapter's loader, as others write them."""
    return path, {"items": items, "device": device, "heads": heads, "norm": norm}


def typed(
    path: str,
    *,
    heads: int | None = None,
    first: bool | Literal["queries"] | None = None,
    scale: float = 1.0,
    act: str | None = None,
):
    return {"heads": heads, "first": first, "scale": scale, "act": act}


# --- written and taken apart --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "settings"),
    [
        ("model.pth", "model.pth", {}),
        ("run/model.pth,heads=2", "run/model.pth", {"heads": "2"}),
        ("a.pth,heads=2,first=true", "a.pth", {"heads": "2", "first": "true"}),
        ("SASRec.lr=0.1.head=1.pth,heads=2", "SASRec.lr=0.1.head=1.pth", {"heads": "2"}),
        ("g-step:9-t:0.75.pt,heads=1", "g-step:9-t:0.75.pt", {"heads": "1"}),
        ("a,b.pth", "a,b.pth", {}),
        ("a,b=c/model.pth,heads=2", "a,b=c/model.pth", {"heads": "2"}),
        ("a.pth,heads=", "a.pth", {"heads": ""}),
        ("a.pth,heads", "a.pth,heads", {}),
        ("", "", {}),
    ],
)
def test_settings_are_what_follows_commas_at_the_end(text, path, settings):
    assert split_spec(text) == (path, settings)


def test_what_is_on_disk_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,heads=2", "b,lr=1.pth"):
        (tmp_path / name).touch()
    assert split_spec("a,heads=2") == ("a,heads=2", {})
    assert split_spec("a,heads=2,heads=3") == ("a,heads=2", {"heads": "3"})
    assert split_spec("b,lr=1.pth,heads=4") == ("b,lr=1.pth", {"heads": "4"})


def test_a_setting_given_twice_is_refused():
    with pytest.raises(ModelError, match=r"a.pth,heads=1,heads=2 gives heads twice"):
        split_spec("a.pth,heads=1,heads=2")


@given(
    heads=st.none() | st.integers(-5, 10**9),
    first=st.none() | st.booleans() | st.just("queries"),
    act=st.none() | st.text("abc_.-:", min_size=1),
)
def test_what_was_joined_is_read_back(heads, first, act):
    settings = {"heads": heads, "first": first, "act": act}
    spec = join_spec("lib", "dir/x.lr=0.1.pth", **settings)
    adapter, _, rest = spec.partition(":")
    path, written = split_spec(rest)
    assert (adapter, path) == ("lib", "dir/x.lr=0.1.pth")
    assert typed(path, **read_settings("lib", typed, written)) == settings | {"scale": 1.0}


# --- as arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ({"first": "true"}, {"first": True}),
        ({"first": "false"}, {"first": False}),
        ({"first": "queries"}, {"first": "queries"}),
        ({"heads": "2"}, {"heads": 2}),
        ({"scale": "0.5"}, {"scale": 0.5}),
        ({"scale": "1e-5"}, {"scale": 1e-5}),
        ({"act": "true"}, {"act": "true"}),
    ],
)
def test_values_are_of_the_annotated_type(text, value):
    found = read_settings("lib", typed, text)
    assert found == value
    assert list(map(type, found.values())) == list(map(type, value.values()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"head": "2"}, "lib has no setting 'head'; expected heads, first, scale, act"),
        ({"heads": "two"}, "lib: heads is 'two'; expected a whole number"),
        ({"heads": "2.0"}, "lib: heads is '2.0'; expected a whole number"),
        ({"heads": "9" * 5000}, "lib: heads is '999"),
        ({"first": "True"}, "lib: first is 'True'; expected true or false or queries"),
        ({"scale": "nan"}, "lib: scale is 'nan'; expected a number"),
        ({"path": "x"}, "lib has no setting 'path'"),
    ],
)
def test_values_of_no_such_type_and_unknown_settings_are_refused(text, message):
    with pytest.raises(ModelError) as error:
        read_settings("lib", typed, text)
    assert str(error.value).startswith(message)


def test_items_and_device_are_no_settings_and_what_is_not_annotated_is_text():
    assert read_settings("lib", load, {"norm": "false"}) == {"norm": "false"}
    for name in ("items", "device"):
        with pytest.raises(ModelError, match=f"no setting '{name}'; expected heads, norm"):
            read_settings("lib", load, {name: "x"})


def test_annotations_that_only_a_type_checker_knows_do_not_matter():
    def unresolved(path, *, heads: "NotImported" = None): ...  # noqa: F821

    assert read_settings("lib", unresolved, {"heads": "2"}) == {"heads": "2"}


# --- through load_recommender -------------------------------------------------------------------


@pytest.fixture
def mylib(monkeypatch):
    """An installed package with an adapter of its own."""
    monkeypatch.setattr(loading, "_adapter_targets", lambda: {"mylib": f"{__name__}:load"})
    monkeypatch.setattr(loading, "_adapter", lambda name: load)


@pytest.mark.usefixtures("mylib")
def test_the_loader_gets_path_and_settings():
    path, given = load_recommender("mylib:a.pth,heads=2", device="cuda")
    assert (path, given["heads"], given["device"]) == ("a.pth", 2, "cuda")
    assert load_recommender("mylib:a.pth", heads=2)[1]["heads"] == 2


@pytest.mark.usefixtures("mylib")
@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("mylib:a.pth,head=2", {}, "mylib has no setting 'head'; expected heads, norm"),
        ("mylib:a.pth,heads=2", {"heads": 3}, "and the call both give heads; expected it once"),
        ("mylib:a.pth", {"revision": "v1"}, "has no revision 'v1'"),
    ],
)
def test_what_the_loader_does_not_take_is_told(spec, options, message):
    with pytest.raises(ModelError, match=message):
        load_recommender(spec, **options)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("recbole:a.pth,n_heads=2", "recbole has no setting 'n_heads'; expected heads, hidden_act"),
        ("pmixer:a.pth,norm_first=1", "norm_first is '1'; expected true or false or queries"),
        ("gsasrec:a.pt,norm_first=true", "gsasrec has no setting 'norm_first'; expected heads, hi"),
        ("sasrec:folder,heads=1", "sasrec has no setting 'heads'; expected none"),
    ],
)
def test_settings_of_the_own_adapters(spec, message):
    with pytest.raises(ModelError, match=message):
        load_recommender(spec)
