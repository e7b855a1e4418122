"""Sites as values, and the paths by which they find their modules."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, reject
from hypothesis import strategies as st
from torch import nn

from steerrec.capturing import capture
from steerrec.errors import SiteError
from steerrec.hooks import edit
from steerrec.sites import Lengths, RealMask, Site, TokenIds, expand, get_module

# --- as JSON ------------------------------------------------------------------------------------

names = st.from_regex(r"[a-z_]{1,6}", fullmatch=True)
paths = st.just("") | st.from_regex(r"[a-z_*]{1,6}(\.(-?[0-9]|[a-z?_]{1,4})){0,3}", fullmatch=True)
selects = st.lists(st.integers(-9, 9) | st.text(max_size=4), max_size=3).map(tuple)
methods = st.none() | names
sources = st.one_of(
    st.none(),
    st.just("last"),
    st.builds(TokenIds, paths, st.integers(-1, 10**6), selects),
    st.builds(Lengths, paths, selects, st.booleans(), methods),
    st.builds(RealMask, paths, selects, st.booleans(), methods),
)


@st.composite
def sites(draw):
    try:
        return Site(
            path=draw(paths),
            at=draw(st.sampled_from(["output", "input"])),
            select=draw(selects),
            layout=draw(st.sampled_from(["BLH", "LBH", "BHL", "BH", "jagged"])),
            positions=draw(st.sampled_from(["user", "real", "all"])),
            positions_from=draw(sources),
            call=draw(st.sampled_from(["only", "first", "last", "all"]) | st.integers(0, 10**6)),
            method=draw(methods),
        )
    except SiteError:  # these positions cannot be known from that source
        reject()


@given(sites())
def test_any_site_is_equal_to_itself_after_json(site):
    values = site.to_dict()
    again = Site.from_dict(json.loads(json.dumps(values)))
    assert again == site
    assert hash(again) == hash(site)
    assert Site.from_dict(values) == site
    assert again.to_dict() == values
    assert again.folder == site.folder


@given(sites(), sites())
def test_every_site_has_a_folder_of_its_own(one, other):
    assert (one.folder == other.folder) == (one == other)


EVERY_KIND = [
    Site("layers.1", positions_from=TokenIds("items", pad_id=-1)),
    Site("layers.1", positions_from=TokenIds("", select=("batch", "ids"))),
    Site("layers.1", positions_from="last"),
    Site("layers.*.norm", positions="all"),
    Site("layers.-1", "input", ("hidden", -1), "LBH", "real", TokenIds("items")),
    Site("encoder", positions="real", positions_from=Lengths("", ("lengths",))),
    Site("encoder", layout="jagged", positions_from=Lengths("pack", (0, "n"), True, "unpack")),
    Site("encoder", positions="real", positions_from=RealMask("", (1,), padding=True)),
    Site("encoder", positions_from=RealMask("encoder", ("mask", 0), method="forward")),
    Site("", layout="BH", method="score_items", at="input", select=("users",)),
    Site("gru", positions_from="last", call=3, select=(0,)),
    *(Site("gru", layout="BHL", positions="all", call=call) for call in ("first", "last", "all")),
]


@pytest.mark.parametrize("site", EVERY_KIND, ids=lambda site: f"{site.path}-{site.layout}")
def test_every_kind_of_site_survives_json(site):
    again = Site.from_dict(json.loads(json.dumps(site.to_dict())))
    assert again == site
    assert type(again.positions_from) is type(site.positions_from)
    assert type(again.select) is tuple


OLD = {
    "path": "final_norm",
    "at": "output",
    "select": [],
    "layout": "BLH",
    "positions": "user",
    "positions_from": {"path": "item_embedding", "pad_id": 0},
}


def test_what_an_earlier_version_wrote_still_loads():
    site = Site.from_dict(OLD)
    assert site == Site("final_norm", positions_from=TokenIds("item_embedding"))
    assert (site.call, site.method) == ("only", None)
    assert Site.from_dict({"path": "mean", "layout": "BH"}) == Site("mean", layout="BH")


def test_a_site_without_call_and_method_is_written_as_before():
    assert Site.from_dict(OLD).to_dict() == OLD
    for site in EVERY_KIND:
        written = site.to_dict()
        assert list(OLD) == list(written)[: len(OLD)]
        assert ("call" in written) == (site.call != "only")
        assert ("method" in written) == (site.method is not None)


@pytest.mark.parametrize(
    ("site", "folder"),
    [
        (Site("final_norm", positions_from=TokenIds("item_embedding")), "final-norm-20a87cf9"),
        (Site("mean", layout="BH"), "mean-a6f23d75"),
        (Site("layers.-1.ff", select=(0,), positions="all"), "layers-1-ff-0ae9338e"),
        (Site("encoder.norm", positions_from="last"), "encoder-norm-bfb67c1b"),
        (Site("h", "input", ("hidden", -1), "BHL", "real", TokenIds("emb", -1)), "h-be170388"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_folders_have_the_names_that_version_0_1_gave_them(site, folder):
    assert site.folder == folder
    digest = hashlib.sha256(json.dumps(site.to_dict(), sort_keys=True).encode()).hexdigest()
    assert folder.endswith(digest[:8])


def test_what_is_not_as_by_default_changes_the_folder():
    site = Site("mean", positions_from=TokenIds("items"))
    others = [
        site,
        replace(site, call="first"),
        replace(site, call=0),
        replace(site, method="f"),
        replace(site, positions_from=TokenIds("items", select=(1,))),
    ]
    assert len({other.folder for other in others}) == 5


# --- what makes no sense ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"at": "side"}, "at is one of output, input; got 'side'"),
        ({"layout": "HBL"}, "layout is one of BLH, LBH, BHL, BH, jagged; got 'HBL'"),
        ({"positions": "last"}, "positions is one of user, real, all; got 'last'"),
        ({"call": "third"}, "call is one of only, first, last, all, a number from 0; got 'third'"),
        ({"call": -1}, "a number from 0; got -1"),
        ({"call": 1.0}, "a number from 0; got 1.0"),
        ({"call": True}, "a number from 0; got True"),
        ({"call": None}, "a number from 0; got None"),
        ({"method": "score items"}, "method is the name of one; got 'score items'"),
        ({"method": "encoder.forward"}, "method is the name of one"),
        ({"method": ""}, "method is the name of one"),
        ({"positions": "user"}, "works on user positions but cannot know them"),
        ({"positions": "real"}, "works on real positions but cannot know them"),
        ({"positions": "real", "positions_from": "last"}, "finds only the user position"),
        ({"layout": "jagged", "positions_from": "last"}, "a jagged layout has no last position"),
        ({"positions_from": {"kind": "Guess", "path": "x"}}, "positions_from is a 'Guess'"),
        ({"positions_from": {"kind": "Guess"}}, "one of TokenIds, Lengths, RealMask"),
        ({"positions_from": {"kind": "Lengths"}}, "not a site: .*'path'"),
        ({"positions_from": {"kind": "RealMask", "path": "x"}}, "not a site: .*'select'"),
        ({"positions_from": {"path": "x", "padding": 0}}, "not a site: .*'padding'"),
        ({"positions": "all", "colour": "red"}, "not a site: .*'colour'"),
        ({"positions": "all", "select": None}, "not a site"),
        ({"positions_from": "first"}, "positions_from is .*; got 'first'"),
        ({"positions": "all", "method": 3}, "method is the name of one; got 3"),
    ],
    ids=str,
)
def test_a_site_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(SiteError, match=message) as error:
        Site.from_dict({"path": "body", **values})
    assert "\n" not in str(error.value)


def test_a_site_needs_a_path():
    with pytest.raises(SiteError, match=r"not a site: .*'path'"):
        Site.from_dict({"layout": "BH"})


@pytest.mark.parametrize("layout", ["BLH", "LBH", "BHL", "BH", "jagged"])
def test_sites_that_need_no_source_do_not_ask_for_one(layout):
    assert Site("body", layout=layout, positions="all").positions_from is None
    if layout in ("BH", "jagged"):  # jagged: torch's own carries its offsets
        assert Site("body", layout=layout).positions_from is None


def test_a_select_given_as_a_list():
    site = Site("0", layout="BH", select=[])
    with capture(model := nn.Sequential(nn.Linear(2, 2)), site) as captured:
        model(torch.ones(1, 2))
    assert captured[site].shape == (1, 2)


def test_messages_call_a_site_by_its_path_and_method():
    assert Site("layers.1", layout="BH").name == "'layers.1'"
    assert Site("head", layout="BH", method="score").name == "'head.score()'"
    assert Site("", layout="BH", method="score").name == "'score()'"


# --- paths --------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(2)
        self.ff = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))

    def forward(self, x):
        return self.ff(self.norm(x))


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block(), Block()])
        self.heads = nn.ModuleDict({"norm1": nn.Linear(2, 2), "norm*": nn.Linear(2, 2)})
        self.last = nn.Linear(2, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def found(model, path):
    return [site.path for site in expand(model, Site(path, layout="BH"))]


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("layers.1.norm", ["layers.1.norm"]),
        ("layers.*.norm", ["layers.0.norm", "layers.1.norm", "layers.2.norm"]),
        ("layers.[02].norm", ["layers.0.norm", "layers.2.norm"]),
        ("layers.[!0].norm", ["layers.1.norm", "layers.2.norm"]),
        ("layers.?", ["layers.0", "layers.1", "layers.2"]),
        ("layers.1.*", ["layers.1.norm", "layers.1.ff"] + [f"layers.1.ff.{i}" for i in range(3)]),
        ("*.ff.2", ["layers.0.ff.2", "layers.1.ff.2", "layers.2.ff.2"]),
        ("heads.norm?", ["heads.norm1", "heads.norm*"]),
        ("layers.-1.*", ["layers.2.norm", "layers.2.ff"] + [f"layers.2.ff.{i}" for i in range(3)]),
        ("layers.-3.ff.-1*", []),
        ("layers.-3.f?", ["layers.0.ff"]),
        ("layers.-1.ff.-1", ["layers.-1.ff.-1"]),
    ],
)
def test_a_pattern_stands_for_the_modules_whose_names_it_matches(pattern, paths):
    model = Tower()
    if paths:
        assert found(model, pattern) == paths
        return
    with pytest.raises(SiteError, match="no module"):
        found(model, pattern)


def test_a_module_of_that_very_name_comes_before_any_matching():
    model = Tower()
    assert found(model, "heads.norm*") == ["heads.norm*"]
    with edit(model, Site("heads.norm*", layout="BH"), lambda rows: rows + 1):
        assert model.heads["norm*"]._forward_hooks
        assert not model.heads["norm1"]._forward_hooks


def test_a_pattern_keeps_all_else_of_its_site():
    pattern = Site("layers.*.ff", "input", (0,), positions_from="last", call="first")
    assert expand(Tower(), pattern) == [replace(pattern, path=f"layers.{i}.ff") for i in range(3)]


@pytest.mark.parametrize("path", ["layers.*.attention", "layers.-9.*", "[a-c]", "layers.*.ff.-1"])
def test_a_pattern_without_a_match_is_an_error(path):
    with pytest.raises(SiteError, match=r"no module .* in Tower; nearest: ") as error:
        found(Tower(), path)
    assert repr(path) in str(error.value)


def test_a_pattern_that_counts_from_the_end_of_no_list_is_an_error():
    with pytest.raises(SiteError, match=r"no module 'layers.0.norm.-1"):
        found(Tower(), "layers.0.norm.-1.*")


def test_capture_reads_every_match_and_a_hook_wants_one():
    model, pattern, x = Tower(), Site("layers.*.norm", layout="BH"), torch.randn(4, 2)
    with capture(model, pattern) as captured:
        model(x)
    assert [site.path for site in captured] == [f"layers.{i}.norm" for i in range(3)]
    assert torch.equal(captured[captured.sites[0]], model.layers[0].norm(x))
    with pytest.raises(SiteError, match=r"captured layers.0.norm, layers.1.norm, layers.2.norm"):
        _ = captured[pattern]
    with pytest.raises(SiteError, match=r"matches 3 modules, such as layers.0.norm"):
        edit(model, pattern, torch.zeros_like)
    one = Site("*.1.norm", layout="BH")
    with capture(model, one) as captured, edit(model, one, lambda rows: None) as hook:
        model(x)
    assert hook.site.path == "layers.1.norm"
    assert torch.equal(captured[one], captured[hook.site])


def test_negative_indices():
    model = Tower()
    assert get_module(model, "layers.-1") is model.layers[2]
    assert get_module(model, "layers.-3.ff.-2") is model.layers[0].ff[1]
    for path in ("layers.-4", "layers.0.ff.-4", "layers.1.norm.-1", "heads.-1", "-1"):
        with pytest.raises(SiteError, match="no module"):
            get_module(model, path)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("layer.0.norm", "layers.0.norm"),
        ("layers.1.nrom", "layers.1.norm"),
        ("layers.7", "layers.0"),
        ("heads.norm2", "heads.norm1"),
        ("zzz", "layers"),
        ("layers.0.norm.weight", "layers.0.norm"),
    ],
)
def test_an_unknown_path_lists_the_nearest_names(wrong, near):
    with pytest.raises(SiteError, match=r"^no module '.*' in Tower; nearest: ") as error:
        get_module(Tower(), wrong)
    listed = str(error.value).partition("nearest: ")[2].split(", ")
    assert near in listed
    assert len(listed) <= 5


def test_a_model_without_parts_has_no_nearest_names():
    with pytest.raises(SiteError, match="no module 'norm' in Linear, which has no submodules"):
        get_module(nn.Linear(2, 2), "norm")


# --- wrapped models -----------------------------------------------------------------------------


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(params=["DataParallel", "DistributedDataParallel", "torch.compile", "both"])
def wrap(request):
    """A wrapper and the prefix that it gives to names."""
    if request.param == "DataParallel":
        return nn.DataParallel, "module."
    if request.param == "DistributedDataParallel":
        request.getfixturevalue("process_group")
        return nn.parallel.DistributedDataParallel, "module."
    if request.param == "torch.compile":
        return lambda model: torch.compile(model, backend="eager"), "_orig_mod."
    return lambda m: nn.DataParallel(torch.compile(m, backend="eager")), "module._orig_mod."


@pytest.mark.parametrize("path", ["layers.1.norm", "layers.-1.ff.0", "last", "heads.norm*"])
def test_a_wrappers_prefix_may_be_given_or_not(wrap, path):
    wrapper, prefix = wrap
    model = Tower()
    wrapped, module = wrapper(model), get_module(model, path)
    assert get_module(wrapped, path) is module
    assert get_module(wrapped, "") is model
    assert get_module(wrapped, prefix + path) is module
    assert get_module(model, prefix + path) is module  # noted on a wrapped one


def test_a_part_that_is_named_like_a_prefix_is_found(wrap):
    wrapper, _ = wrap
    model = nn.Sequential()
    model.module = nn.Linear(2, 2)
    model.module._orig_mod_ = nn.Linear(2, 2)
    assert get_module(model, "module") is model.module
    assert get_module(wrapper(model), "module._orig_mod_") is model.module._orig_mod_


def test_patterns_match_on_wrapped_models(wrap):
    wrapper, _ = wrap
    assert found(wrapper(Tower()), "layers.*.norm") == [f"layers.{i}.norm" for i in range(3)]


def test_patterns_with_a_prefix_match_on_wrapped_models(wrap):
    wrapper, prefix = wrap
    model = wrapper(Tower())
    modules = [get_module(model, path) for path in found(model, f"{prefix}layers.*.norm")]
    assert modules == [get_module(model, f"layers.{i}.norm") for i in range(3)]


def test_an_unknown_path_of_a_wrapped_model_is_told_in_the_models_own_names(wrap):
    wrapper, _ = wrap
    with pytest.raises(SiteError, match=r"in Tower; nearest: .*layers.1.norm"):
        get_module(wrapper(Tower()), "layers.1.norn")


def test_a_wrapped_part_is_looked_through():
    model = Tower()
    norm = model.layers[1].norm
    model.layers[1] = nn.DataParallel(model.layers[1])
    assert get_module(model, "layers.1.norm") is norm
    with edit(model, Site("layers.1.norm", layout="BH"), torch.zeros_like):
        assert norm._forward_hooks


@pytest.mark.parametrize("path", ["layers.1.module.norm", "layers.[1].*norm"])
def test_a_wrapped_part_is_found_by_the_name_that_named_modules_gives_it(path):
    model = Tower()
    norm = model.layers[1].norm
    model.layers[1] = nn.DataParallel(model.layers[1])
    assert [get_module(model, site) for site in found(model, path)] == [norm]


@pytest.mark.parametrize("kind", [nn.DataParallel, nn.parallel.DistributedDataParallel])
def test_hooks_work_on_a_model_in_a_wrapper(kind, process_group):
    model, site, x = Tower(), Site("layers.1.norm", layout="BH"), torch.randn(3, 2)
    with capture(model, site) as captured, edit(model, site, torch.zeros_like):
        edited = model(x)
    wrapped = kind(model)
    for path in (site.path, f"module.{site.path}"):
        there = replace(site, path=path)
        with capture(wrapped, there) as again, edit(wrapped, there, torch.zeros_like):
            assert torch.equal(wrapped(x), edited)
        assert torch.equal(again[there], captured[site])
        assert not model.layers[1].norm._forward_hooks
