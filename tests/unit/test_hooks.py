"""Sites and hooks: what they read, what they replace, and that they leave nothing else behind."""

import copy
import io
import json
import threading
from collections import namedtuple
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.utils import ModelOutput

from steerrec.capturing import capture
from steerrec.errors import SiteError
from steerrec.hooks import SiteHook, edit
from steerrec.sites import Site, TokenIds, get_module

from .toy_models import hooked, tiny_sasrec

Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Output(ModelOutput):
    skipped: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class Emit(nn.Module):
    """Returns what `make` makes of its input; keeps the very object, and what was in it."""

    def __init__(self, make=lambda x: x):
        super().__init__()
        self.make = make
        self.calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        self.given = (args, kwargs)
        self.emitted = self.make(*args, **kwargs)
        self.before = [leaf.detach().clone() for leaf in leaves((self.given, self.emitted))]
        return self.emitted

    def is_untouched(self):
        return same((self.given, self.emitted), self.before)


class Reader(nn.Module):
    """A model: item embedding, then a body that emits anything, then a head."""

    def __init__(self, make=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(6, 3)
        self.body = Emit(make)
        self.head = Emit()

    def forward(self, ids):
        return self.head(self.body(self.embedding(ids)))


IDS = torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0], [5, 1, 2, 3]])
EVERYWHERE = Site("body", positions="all")
USER = Site("body", positions_from=TokenIds("embedding"))
TOKENS = TokenIds("embedding")


def leaves(value):
    """All tensors inside nested containers."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [leaf for child in value for leaf in leaves(child)]
    return []


def same(a, b):
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def chosen(ids, positions, pad=0):
    """(user, position) of a site's rows, by looking at one id after the other."""
    cells = []
    for user, row in enumerate(ids.tolist()):
        real = [step for step, token in enumerate(row) if token != pad]
        steps = {"user": (real or [0])[-1:], "real": real, "all": range(len(row))}[positions]
        cells += [(user, step) for step in steps]
    return cells


# --- containers ---------------------------------------------------------------------------------

CONTAINERS = {
    "tensor": (lambda x: x, ()),
    "list": (lambda x: [x + 1, x], (1,)),
    "tuple": (lambda x: (x, x + 1), (0,)),
    "tuple, from its end": (lambda x: (x + 1, x), (-1,)),
    "tuple with things that are no tensors": (lambda x: (None, x, "text"), (1,)),
    "namedtuple": (lambda x: Pair(x + 1, x), (1,)),
    "dict": (lambda x: {"other": x + 1, "hidden": x}, ("hidden",)),
    "ModelOutput by name": (
        lambda x: Output(last_hidden_state=x, hidden_states=(x + 1, x + 2)),
        ("last_hidden_state",),
    ),
    "ModelOutput by position": (
        lambda x: Output(last_hidden_state=x, hidden_states=(x + 1, x + 2)),
        (0,),
    ),
    "tuple in a ModelOutput": (
        lambda x: Output(last_hidden_state=x + 1, hidden_states=(x + 2, x)),
        ("hidden_states", -1),
    ),
    "namedtuple in a list in a dict in a tuple": (
        lambda x: (x + 1, {"a": [x + 2, Pair(x, x + 3)]}),
        (1, "a", 1, 0),
    ),
}
containers = pytest.mark.parametrize(("make", "select"), CONTAINERS.values(), ids=CONTAINERS.keys())


@containers
def test_capture_reads_the_tensor_and_leaves_the_output_the_same_object(make, select):
    model = Reader(make)
    with capture(model, replace(EVERYWHERE, select=select)) as captured:
        output = model(IDS)
    assert output is model.body.emitted
    assert model.body.is_untouched()
    expected = model.embedding(IDS).reshape(-1, 3)
    assert torch.equal(captured[replace(EVERYWHERE, select=select)], expected)


@containers
def test_edit_replaces_one_tensor_in_new_containers_of_the_same_types(make, select):
    model = Reader(make)
    with edit(model, replace(EVERYWHERE, select=select), lambda rows: rows * -2):
        output = model(IDS)
    assert model.body.is_untouched()
    assert type(output) is type(model.body.emitted)
    old, new = model.body.emitted, output
    for key in select:
        old, new = old[key], new[key]
        assert type(new) is type(old)
    assert torch.equal(new, old * -2)
    others = [id(leaf) for leaf in leaves(model.body.emitted) if leaf is not old]
    assert [id(leaf) for leaf in leaves(output) if leaf is not new] == others


def test_an_edited_model_output_agrees_with_itself_by_name_key_and_position():
    model = Reader(lambda x: Output(last_hidden_state=x))
    with edit(model, replace(EVERYWHERE, select=(0,)), lambda rows: rows + 1):
        output = model(IDS)
    expected = model.embedding(IDS) + 1
    for tensor in (output.last_hidden_state, output["last_hidden_state"], output[0]):
        assert torch.equal(tensor, expected)


BUILD = {
    list: list,
    tuple: tuple,
    Pair: lambda children: Pair(children[0], children[1:]),
    dict: lambda children: {f"key {i}": child for i, child in enumerate(children)},
}


@st.composite
def nestings(draw):
    """A function that buries its argument among other tensors, and the way to it."""
    layers, select = [], []
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(list(BUILD)))
        size = draw(st.integers(1, 3))
        place = 0 if kind is Pair else draw(st.integers(0, size - 1))
        layers.append((kind, size, place))
        select.insert(0, f"key {place}" if kind is dict else place)

    def make(x):
        for kind, size, place in layers:
            children = [torch.full((2, 1, 1), float(i)) for i in range(size)]
            children[place] = x
            x = BUILD[kind](children)
        return x

    return make, tuple(select)


@given(nestings())
def test_any_nesting(nesting):
    make, select = nesting
    model = Reader(make).requires_grad_(False)
    with edit(model, replace(EVERYWHERE, select=select), lambda rows: rows + 100):
        output = model(IDS)
    assert model.body.is_untouched()
    expected = make(model.embedding(IDS) + 100)
    assert same(output, expected)
    assert str(output) == str(expected)  # the same containers, nested alike


# --- positions and layouts ----------------------------------------------------------------------

LAYOUTS = {
    "BLH": lambda x: x,
    "LBH": lambda x: x.transpose(0, 1),
    "BHL": lambda x: x.transpose(1, 2),
}


@st.composite
def batches(draw):
    users, length = draw(st.integers(0, 4)), draw(st.integers(1, 5))
    row = st.lists(st.integers(0, 5), min_size=length, max_size=length)
    rows = draw(st.lists(row, min_size=users, max_size=users))
    return torch.tensor(rows, dtype=torch.long).reshape(users, length)


@given(
    ids=batches(),
    layout=st.sampled_from(list(LAYOUTS)),
    positions=st.sampled_from(["user", "real", "all"]),
    pad=st.sampled_from([0, 5]),
    at=st.sampled_from(["output", "input"]),
)
def test_rows_are_the_right_positions_in_any_layout_with_any_padding(
    ids, layout, positions, pad, at
):
    model = Reader()
    model.embedding.register_forward_hook(lambda _, __, output: LAYOUTS[layout](output))
    site = Site("body", at, (), layout, positions, TokenIds("embedding", pad_id=pad))
    x = nn.functional.embedding(ids, model.embedding.weight)  # [B, L, H]
    cells = chosen(ids, positions, pad)
    with capture(model, site) as captured:
        model(ids)
    assert captured[site].tolist() == [x[cell].tolist() for cell in cells]
    expected = x.clone()
    for cell in cells:
        if positions != "user" or ids[cell] != pad:  # a history without items has no user
            expected[cell] = x[cell] * 3 - 1
    with edit(model, site, lambda rows: rows * 3 - 1):
        output = model(ids)
    assert torch.equal(output, LAYOUTS[layout](expected))
    assert model.body.is_untouched()


@pytest.mark.parametrize(
    ("ids", "last"),
    [
        ([[1, 2, 0, 0], [3, 0, 0, 0]], [1, 0]),
        ([[0, 0, 1, 2], [0, 0, 0, 3]], [3, 3]),
        ([[1, 0, 2, 0], [0, 1, 0, 3]], [2, 3]),
        ([[0, 0, 0, 0], [1, 2, 3, 4]], [None, 3]),
    ],
    ids=["right-padded", "left-padded", "padding inside", "nothing but padding"],
)
def test_the_user_position_is_the_last_real_one_and_nothing_else_changes(ids, last):
    model, ids = Reader(), torch.tensor(ids)
    with edit(model, USER, lambda rows: rows + 1):
        output = model(ids)
    plain = model(ids)
    changed = (output != plain).any(dim=-1)
    expected = [[user, step] for user, step in enumerate(last) if step is not None]
    assert changed.nonzero().tolist() == expected
    assert torch.equal(output[~changed], plain[~changed])


def test_real_positions_leave_the_padding_untouched():
    model = Reader()
    with edit(model, replace(USER, positions="real"), torch.zeros_like):
        output = model(IDS)
    assert torch.equal(output[IDS == 0], model(IDS)[IDS == 0])
    assert not output[IDS != 0].any()


def test_positions_from_last_needs_no_token_ids():
    model = Reader()
    site = Site("body", positions_from="last")
    with capture(model, site) as captured:
        output = model(IDS)
        assert hooked(model) == ["", "body"]
    assert torch.equal(captured[site], output[:, -1])


def test_layout_bh_has_one_row_a_user():
    model = Reader(lambda x: x.sum(dim=1))
    site = Site("body", layout="BH")
    with capture(model, site) as captured, edit(model, site, lambda rows: rows * 2):
        output = model(IDS)
    assert torch.equal(captured[site], model.body.emitted)
    assert torch.equal(output, model.body.emitted * 2)
    assert model.body.is_untouched()


def test_token_ids_given_as_a_keyword():
    class Keywords(Reader):
        def forward(self, ids):
            return self.body(self.embedding(input=ids))

    model = Keywords()
    with capture(model, USER) as captured:
        output = model(IDS)
    assert torch.equal(captured[USER], output[torch.arange(3), torch.tensor([2, 0, 3])])


def test_an_expanded_tensor_is_edited_row_by_row():
    model = Reader(lambda x: x[:1].expand(3, -1, -1))
    with edit(model, USER, lambda rows: rows + torch.tensor([[1.0], [2.0], [3.0]])):
        output = model(IDS)
    change = (output - model.body.emitted)[..., 0]
    assert change.nonzero().tolist() == [[0, 2], [1, 0], [2, 3]]
    assert model.body.is_untouched()


# --- inputs -------------------------------------------------------------------------------------


class Caller(nn.Module):
    """Calls its body in a way of its own."""

    def __init__(self, call, make):
        super().__init__()
        self.call = call
        self.body = Emit(make)

    def forward(self, x):
        return self.call(self.body, x)


X = torch.arange(24.0).reshape(2, 4, 3)
INPUTS = {
    "first argument": (lambda body, x: body(x, 7), lambda x, n: (x, n), ()),
    "second argument": (lambda body, x: body(7, x), lambda n, x: (x, n), (1,)),
    "keyword by name": (lambda body, x: body(7, h=x), lambda n, h: (h, n), ("h",)),
    "only a keyword": (lambda body, x: body(h=x), lambda h: (h, 7), ()),
    "only keywords, by name": (lambda body, x: body(n=7, h=x), lambda h, n: (h, n), ("h",)),
    "inside an argument": (
        lambda body, x: body({"h": [x]}, n=7),
        lambda d, n: (d["h"][0], n),
        (0, "h", 0),
    ),
}


@pytest.mark.parametrize(("call", "make", "select"), INPUTS.values(), ids=INPUTS.keys())
def test_inputs(call, make, select):
    model = Caller(call, make)
    site = Site("body", at="input", select=select, positions="all")
    x = X.clone()
    with capture(model, site) as captured:
        hidden, number = model(x)
    assert hidden is x
    assert number == 7
    assert torch.equal(captured[site], X.reshape(-1, 3))
    with edit(model, site, lambda rows: -rows):
        hidden, number = model(x)
    assert torch.equal(hidden, -X)
    assert number == 7
    assert torch.equal(x, X)


def test_an_input_edit_changes_what_the_module_computes():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with edit(model, Site("1", at="input", layout="BH"), lambda rows: rows * 2):
        output = model(X[0])
    assert torch.equal(output, model[1](model[0](X[0]) * 2))


# --- observing and editing ----------------------------------------------------------------------


def test_observing_sasrec_leaves_its_scores_bit_for_bit():
    rec = tiny_sasrec()
    ids = torch.tensor([[3, 4, 5], [6, 0, 0]])
    plain = rec.model.score(ids)
    with capture(rec.model, rec.site, Site("layers.0.attention", positions="all")):
        assert torch.equal(rec.model.score(ids), plain)
    assert hooked(rec.model) == []


@pytest.mark.parametrize("layout", ["BLH", "BH"])
def test_what_was_captured_stays_when_the_model_writes_to_its_tensors_later(layout):
    model = Reader((lambda x: x) if layout == "BLH" else (lambda x: x.sum(dim=1)))
    site = replace(USER, layout=layout)
    with capture(model, site) as captured:
        output = model(IDS)
    assert not captured[site].requires_grad
    output.data.zero_()
    assert captured[site].all()


def test_returning_none_leaves_the_very_same_object():
    model = Reader()
    with edit(model, USER, lambda rows: None) as hook:
        output = model(IDS)
    assert output is model.body.emitted
    assert hook.firings == 1


def test_several_firings_are_captured_one_after_the_other():
    class Twice(Reader):
        def forward(self, ids):
            return self.body(self.body(self.embedding(ids)) * 10)

    model, site = Twice(), replace(USER, call="all")
    with capture(model, site) as captured:
        model(IDS)
    user = model.embedding(IDS)[torch.arange(3), torch.tensor([2, 0, 3])]
    assert torch.equal(captured[site], torch.cat([user, user * 10]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", ["BLH", "BH"])
def test_dtypes_are_kept(dtype, layout):
    model = Reader((lambda x: x) if layout == "BLH" else (lambda x: x.sum(dim=1))).to(dtype)
    site = replace(USER, layout=layout)
    with edit(model, site, lambda rows: rows * 2), capture(model, site) as captured:
        output = model(IDS)
    assert output.dtype == captured[site].dtype == dtype
    rows = model.body.emitted
    if layout == "BLH":
        rows = rows[torch.arange(3), torch.tensor([2, 0, 3])]
    assert torch.equal(captured[site], rows * 2)


def test_gradients_pass_through_an_edit():
    model = Reader()
    factor = torch.tensor(3.0, requires_grad=True)
    with edit(model, USER, lambda rows: rows * factor):
        model(torch.tensor([[1, 2]])).sum().backward()
    weight = model.embedding.weight
    assert weight.grad[[1, 2]].tolist() == [[1.0] * 3, [3.0] * 3]
    assert torch.isclose(factor.grad, weight[2].sum())


def test_edits_in_inference_mode():
    model = Reader()
    with torch.inference_mode(), edit(model, USER, torch.zeros_like):
        output = model(IDS)
    assert not output[2, 3].any()
    assert output[2, :3].all()


def test_two_edits_apply_in_the_order_they_were_made():
    model = Reader()
    plain = model(IDS)
    with edit(model, EVERYWHERE, lambda rows: rows + 1):
        with edit(model, EVERYWHERE, lambda rows: rows * 2):
            assert torch.equal(model(IDS), (plain + 1) * 2)
        assert torch.equal(model(IDS), plain + 1)
    first = edit(model, EVERYWHERE, lambda rows: rows * 2)
    with edit(model, EVERYWHERE, lambda rows: rows + 1):
        assert torch.equal(model(IDS), plain * 2 + 1)
        first.remove()
        assert torch.equal(model(IDS), plain + 1)
    assert hooked(model) == []


def test_token_ids_of_one_thread_are_not_seen_by_another():
    """All threads embed before any of them reaches the site."""
    batches = [torch.tensor([[1] * real + [0] * (4 - real)]) for real in (1, 2, 3, 4)]
    barrier = threading.Barrier(len(batches), timeout=20)

    class Waiting(Reader):
        def forward(self, ids):
            x = self.embedding(ids)
            barrier.wait()
            return self.body(x)

    model = Waiting()
    model.body = nn.Identity()
    found = {}

    def run(ids):
        changed = model(ids) != model.embedding.weight[ids]
        found[int((ids != 0).sum())] = changed.any(dim=-1).nonzero().tolist()

    with edit(model, USER, lambda rows: rows + 1):
        threads = [threading.Thread(target=run, args=(ids,)) for ids in batches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {real: [[0, real - 1]] for real in (1, 2, 3, 4)}


# --- stopping -----------------------------------------------------------------------------------


def test_stop_ends_the_forward_pass_and_the_block_once_the_site_has_fired():
    model = Reader()
    reached = []
    with capture(model, USER, stop=True) as captured:
        model(IDS)
        reached.append("the end of the block")
    assert captured[USER].shape == (3, 3)
    assert model.body.calls == 1
    assert model.head.calls == 0
    assert not reached
    assert hooked(model) == []


def test_stop_waits_for_every_site():
    model = Reader()
    first, second = Site("embedding", positions="all"), Site("head", at="input", positions="all")
    with capture(model, second, first, stop=True) as captured:
        model(IDS)
    assert model.body.calls == 1
    assert model.head.calls == 0
    assert torch.equal(captured[first], captured[second])


def test_stop_is_not_swallowed_by_code_that_catches_exceptions():
    class Careless(Reader):
        def forward(self, ids):
            try:
                return super().forward(ids)
            except Exception:
                return self.head(None)

    model = Careless()
    with capture(model, USER, stop=True):
        model(IDS)
    assert model.head.calls == 0


def test_an_inner_block_leaves_the_outer_blocks_stop_alone():
    model = Reader()
    head = Site("head", positions="all")
    with capture(model, USER, stop=True) as outer, capture(model, head, stop=True):
        model(IDS)
    assert outer[USER].shape == (3, 3)
    assert hooked(model) == []


# --- every exit ---------------------------------------------------------------------------------


def test_no_hooks_are_left_after_the_block():
    model = Reader()
    with capture(model, USER), edit(model, USER, lambda rows: rows):
        assert hooked(model) == ["", "embedding", "body"]
        model(IDS)
    assert hooked(model) == []


def test_no_hooks_are_left_after_an_exception_in_the_block():
    model = Reader()
    with pytest.raises(KeyboardInterrupt), capture(model, USER), edit(model, USER, lambda r: r):
        raise KeyboardInterrupt
    assert hooked(model) == []


def test_no_hooks_are_left_after_an_exception_in_the_forward_pass():
    def fail(x):
        raise ValueError("in the model")

    model = Reader(fail)
    with pytest.raises(ValueError, match="in the model"), capture(model, USER):
        model(IDS)
    assert hooked(model) == []


def test_no_hooks_are_left_after_an_exception_in_the_function():
    model = Reader()

    def fail(rows):
        raise ValueError("in the function")

    with pytest.raises(ValueError, match="in the function"), edit(model, USER, fail):
        model(IDS)
    assert hooked(model) == []


@pytest.mark.parametrize(
    "bad",
    [
        Site("nowhere", positions="all"),
        Site("body", positions_from=TokenIds("nowhere")),
        Site("nowhere", positions_from=TOKENS),
    ],
    ids=["no such module", "no such module to see token ids at", "token ids but no module"],
)
def test_no_hooks_are_left_by_a_constructor_that_fails(bad):
    model = Reader()
    with pytest.raises(SiteError), capture(model, USER, bad):
        pass
    with pytest.raises(SiteError):
        edit(model, bad, lambda rows: rows)
    assert hooked(model) == []


def test_no_hooks_are_left_when_registering_the_second_is_interrupted(monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    model = Reader()
    monkeypatch.setattr(model.body, "register_forward_hook", interrupt)
    with pytest.raises(KeyboardInterrupt):
        edit(model, USER, lambda rows: rows)
    assert hooked(model) == []


def test_remove_can_be_called_twice():
    model = Reader()
    hook = edit(model, USER, lambda rows: rows + 1)
    hook.remove()
    hook.remove()
    assert hooked(model) == []
    assert model(IDS) is model.body.emitted


def test_hooks_of_others_stay():
    model = Reader()
    model.body.register_forward_hook(lambda *_: None)
    with capture(model, USER):
        model(IDS)
    assert hooked(model) == ["body"]


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_a_copy_of_a_hooked_model_leaves_the_hook_behind(copied):
    model = nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 3))
    site = Site("1", positions_from=TokenIds("0"))
    plain, state = model(IDS), list(model.state_dict())
    with edit(model, site, torch.zeros_like) as hook:
        if copied == "deepcopy":
            twin = copy.deepcopy(model)
        else:
            torch.save(model, file := io.BytesIO())
            twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        assert torch.equal(twin(IDS), plain)
        assert hook.firings == 0
        assert not torch.equal(model(IDS), plain)
        assert list(model.state_dict()) == state


# --- errors -------------------------------------------------------------------------------------


def test_a_site_that_never_fires_is_an_error():
    model = Reader()
    model.unused = nn.Linear(3, 3)
    with (
        pytest.raises(SiteError, match="'unused' never fired"),
        capture(model, USER, Site("unused", positions="all")),
    ):
        model(IDS)
    assert hooked(model) == []


def test_a_missing_layer_names_the_nearest_ones():
    model = tiny_sasrec().model
    with pytest.raises(SiteError, match=r"no module 'layers.1.atention' in SASRecModel") as error:
        get_module(model, "layers.1.atention")
    assert "layers.1.attention" in str(error.value)
    assert "\n" not in str(error.value)


def test_negative_indices_count_from_the_end():
    model = tiny_sasrec().model
    assert get_module(model, "layers.-1") is model.layers[1]
    assert get_module(model, "layers.-2.feed_forward.-1") is model.layers[0].feed_forward[2]
    assert get_module(model, "") is model
    for path in ("layers.-3", "layers.2", "layers.0.-1", "layers.", "-1"):
        with pytest.raises(SiteError, match="no module"):
            get_module(model, path)


@pytest.mark.parametrize(
    ("make", "site", "message"),
    [
        (lambda x: (x, x), EVERYWHERE, "emits a tuple of 2.*`select`"),
        (lambda x: {"h": x}, replace(EVERYWHERE, select=("x",)), "emits a dict with keys h"),
        (
            lambda x: (x,),
            replace(EVERYWHERE, select=(3,)),
            r"nothing at select=\(3,\) in a tuple",
        ),
        (lambda x: (x,), replace(EVERYWHERE, select=("x",)), "emits a tuple of 1"),
        (lambda x: None, EVERYWHERE, "emits a NoneType"),
        (lambda x: x[0], EVERYWHERE, r"emits shape \(4, 3\); expected .* 3 axes .* BLH"),
        (
            lambda x: x,
            Site("body", layout="BH"),
            r"emits shape \(3, 4, 3\); expected .* 2 axes .* BH",
        ),
        (lambda x: x[:, 1:], USER, r"positions \(3, 3\), but the token ids .*\(3, 4\)"),
        (
            lambda x: torch.nested.as_nested_tensor([x[0], x[1]], layout=torch.jagged),
            EVERYWHERE,
            "NestedTensor",
        ),
    ],
)
def test_what_cannot_be_a_site_is_told(make, site, message):
    model = Reader(make)
    with pytest.raises(SiteError, match=message), capture(model, site):
        model(IDS)
    assert hooked(model) == []


def test_select_does_not_reach_inside_a_tensor():
    model = Reader()
    with (
        pytest.raises(SiteError, match="goes on inside a tensor"),
        edit(model, Site("body", layout="BH", select=(0,)), torch.zeros_like),
    ):
        model(IDS)
    assert model.body.is_untouched()


def test_a_site_before_its_token_ids_is_told():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    site = Site("0", positions_from=TokenIds("1"))
    with pytest.raises(SiteError, match="fired before module '1'"), capture(model, site):
        model(X)


@pytest.mark.parametrize("layout", ["BLH", "BH"])
@pytest.mark.parametrize(
    "function",
    [lambda rows: rows[:1], lambda rows: rows[:, :2], lambda rows: rows[0], lambda r: r.double()],
    ids=["fewer rows", "narrower", "one vector", "another dtype"],
)
def test_a_replacement_has_to_have_the_shape_and_dtype_of_the_rows(layout, function):
    model = Reader((lambda x: x) if layout == "BLH" else (lambda x: x.sum(dim=1)))
    with (
        pytest.raises(SiteError, match="expected the same"),
        edit(model, replace(USER, layout=layout), function),
    ):
        model(IDS)


# --- sites as values ----------------------------------------------------------------------------

paths = st.from_regex(r"[a-z_]{1,8}(\.-?[a-z0-9_]{1,4}){0,3}", fullmatch=True)
token_ids = st.builds(TokenIds, path=paths, pad_id=st.integers(-1, 10**6))
keys = st.integers(-5, 5) | st.text(max_size=4)
sites = st.builds(
    Site,
    path=paths,
    at=st.sampled_from(["output", "input"]),
    select=st.lists(keys, max_size=3).map(tuple),
    layout=st.sampled_from(["BLH", "LBH", "BHL", "BH"]),
    positions=st.sampled_from(["user", "real", "all"]),
    positions_from=token_ids,
) | st.builds(Site, path=paths, positions_from=st.just("last"))


@given(sites)
def test_a_site_survives_json(site):
    assert Site.from_dict(json.loads(json.dumps(site.to_dict()))) == site


@given(sites, sites)
def test_sites_that_differ_have_folders_that_differ(one, other):
    assert (one.folder == other.folder) == (one == other)
    assert one.folder.replace("-", "").isalnum()


def test_a_folders_name_never_changes():
    """It is on disk in artifacts: another name would orphan them."""
    site = Site("layers.1.ffn_norm", "input", (0, "h"), "LBH", "real", TokenIds("items", 3))
    assert site.folder == "layers-1-ffn-norm-80d1308d"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"at": "outside"}, "at is one of output, input"),
        ({"layout": "HBL"}, "layout is one of BLH, LBH, BHL, BH"),
        ({"positions": "first"}, "positions is one of user, real, all"),
        ({"positions": "user"}, "cannot know them: set positions_from"),
        ({"positions": "real"}, "cannot know them: set positions_from"),
        ({"positions": "real", "positions_from": "last"}, "finds only the user position"),
        ({"colour": "red"}, "not a site"),
        ({"positions_from": {"pad": 0}}, "not a site"),
    ],
)
def test_a_site_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(SiteError, match=message):
        Site.from_dict({"path": "body", **values})


def test_sites_that_need_no_positions_do_not_ask_for_them():
    assert Site("body", layout="BH").positions_from is None
    assert Site("body", positions="all").positions_from is None


def test_a_hook_is_its_own_context_manager():
    model = Reader()
    with SiteHook(model, USER, lambda rows: None) as hook:
        model(IDS)
        model(IDS)
    assert hook.firings == 2
    assert hooked(model) == []
