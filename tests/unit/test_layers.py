"""Layer reports: what fires, what it emits, what can hold an SAE, and which layer should."""

from collections import namedtuple
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from transformers.utils import ModelOutput

from steerrec.capturing import capture
from steerrec.data import Histories
from steerrec.errors import SiteError
from steerrec.handles import FastPathOff
from steerrec.hooks import edit
from steerrec.layers import layer_report, site_at, site_report
from steerrec.recommender import ItemHead
from steerrec.sites import Site, TokenIds

from .small_models import WIDTH
from .tiny import catalogue, random_recommender
from .toy_models import hooked, tiny_sasrec

IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 0, 0, 0], [8, 0, 0, 0, 0]])  # B 3, L 5, H 8
TOKENS = TokenIds("embedding")


class Make(nn.Module):
    """Emits what `make` makes of its input."""

    def __init__(self, make=lambda x: x):
        super().__init__()
        self.make = make

    def forward(self, *args):
        return self.make(*args)


class Host(nn.Module):
    """An embedding, then any parts one after the other."""

    def __init__(self, **parts):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embedding = nn.Embedding(12, WIDTH, padding_idx=0)
        for name, part in parts.items():
            setattr(self, name, part)
        self.order = list(parts)
        self.eval().requires_grad_(False)

    def forward(self, ids):
        x = self.embedding(ids)
        for name in self.order:
            x = getattr(self, name)(x)
        return x


def reports(model, run=None):
    found = layer_report(model, run or (lambda: model(IDS)))
    assert hooked(model) == []
    return {layer.path: layer for layer in found}


def report_of(make, *, run=None):
    """Report of a module that emits what `make` makes of [3, 5, 8], and a host to run it in."""
    host = Host(body=Make(make))
    host.order = []
    host.forward = lambda ids: host.body(host.embedding(ids))
    return reports(host, run and (lambda: run(host)))["body"]


# --- firings ------------------------------------------------------------------------------------


def test_every_module_is_reported_with_its_class_and_firings():
    block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
    host = Host(block=block, unused=nn.Linear(2, 2), norm=nn.LayerNorm(WIDTH))
    host.order = ["block", "norm", "block", "block"]
    found = reports(host)
    assert list(found) == ["embedding", "block", "block.0", "block.1", "unused", "norm"]
    kinds = [layer.kind for layer in found.values()]
    assert kinds == ["Embedding", "Sequential", "Linear", "ReLU", "Linear", "LayerNorm"]
    assert [layer.firings for layer in found.values()] == [1, 3, 3, 3, 0, 1]
    assert [layer.usable for layer in found.values()] == [True, True, True, True, False, True]
    assert found["norm"].reason == ""
    assert "fires 3 times: set call" in found["block"].reason


def test_a_vector_layer_is_described():
    norm = reports(Host(norm=nn.LayerNorm(WIDTH)))["norm"]
    assert norm.output == "a tensor (3, 5, 8)"
    assert (norm.select, norm.shape, norm.dtype, norm.layout) == ((), (3, 5, 8), "float32", "BLH")
    assert (norm.finite, norm.mutated, norm.fast_path_off) == (True, False, False)
    assert (norm.usable, norm.reason, norm.score_error) == (True, "", None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_is_reported(dtype):
    host = Host(norm=nn.LayerNorm(WIDTH)).to(dtype)
    assert reports(host)["norm"].dtype == str(dtype).removeprefix("torch.")


def test_several_runs_count_together():
    host = Host(norm=nn.LayerNorm(WIDTH))
    found = reports(host, lambda: [host(IDS) for _ in range(4)])
    assert found["norm"].firings == 4


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_the_run_leaves_nothing_behind(error):
    host = Host(norm=nn.LayerNorm(WIDTH))

    def run():
        host(IDS)
        raise error

    with pytest.raises(error):
        layer_report(host, run)
    assert hooked(host) == []


# --- layouts and containers ---------------------------------------------------------------------

Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Output(ModelOutput):
    ids: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None


@dataclass
class Plain:
    count: int
    hidden: torch.Tensor


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (lambda x: x, "BLH"),
        (lambda x: x.transpose(0, 1), "LBH"),
        (lambda x: x.transpose(1, 2), "BHL"),
        (lambda x: x.mean(dim=1), "BH"),
        (lambda x: x[IDS != 0], None),
        (lambda x: x.mean(dim=(1, 2)), None),
        (lambda x: x[:, :2], None),
        (lambda x: x.permute(2, 0, 1), None),
        (lambda x: x[None], None),
    ],
)
def test_layouts_are_told_by_their_shapes(make, layout):
    found = report_of(make)
    assert found.layout == layout
    assert found.usable == (layout is not None)
    if layout is None:
        assert found.reason == "not one vector for each item or history, by its shape"
    else:
        assert found.shape == tuple(make(torch.zeros(3, 5, WIDTH)).shape)


def test_without_token_ids_only_vectors_have_a_layout():
    model = nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (2, 2)))
    found = reports(model, lambda: model(torch.ones(3, 2)))
    assert (found["0"].layout, found["1"].layout) == ("BH", None)


@pytest.mark.parametrize(
    ("make", "output", "select"),
    [
        (lambda x: (x, None), "a tuple of 2", (0,)),
        (lambda x: (IDS, [None, x]), "a tuple of 2", (1, 1)),
        (lambda x: [x, x + 1], "a list of 2", (0,)),
        (lambda x: {"mask": IDS != 0, "h": x}, "a dict with keys mask, h", ("h",)),
        (lambda x: Pair(IDS, x), "a Pair of 2", (1,)),
        (
            lambda x: Output(ids=IDS, last_hidden_state=x),
            "a Output with keys ids, last_hidden_state",
            ("last_hidden_state",),
        ),
        (lambda x: Plain(3, x), "a Plain", ("hidden",)),
    ],
)
def test_the_first_tensor_of_numbers_in_a_container_is_selected(make, output, select):
    found = report_of(make)
    assert (found.output, found.select) == (output, select)
    assert (found.shape, found.layout, found.usable) == ((3, 5, 8), "BLH", True)
    host = Host(body=Make(make))
    site = Site("body", select=select, layout=found.layout, positions="all")
    with capture(host, site) as captured, edit(host, site, torch.clone):
        host(IDS)
    assert torch.equal(captured[site], host.embedding(IDS).reshape(-1, WIDTH))


@pytest.mark.parametrize(
    "make",
    [lambda x: None, lambda x: "text", lambda x: IDS, lambda x: (IDS != 0, {}), lambda x: []],
)
def test_what_emits_no_vectors_is_told(make):
    found = report_of(make)
    assert found.firings == 1
    assert (found.usable, found.shape, found.layout) == (False, None, None)
    assert found.reason == "emits no tensor of floating-point numbers"


# --- what to know of a layer --------------------------------------------------------------------


class Overwriting(nn.Module):
    """Writes into what its inner layer emitted."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.other = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = self.inner(x)
        y += 1
        return self.other(y)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_what_the_model_writes_to_afterwards_is_told(mode):
    host = Host(body=Overwriting())

    def run():
        with mode():
            host(IDS)

    found = reports(host, run)
    assert [path for path, layer in found.items() if layer.mutated] == ["body.inner"]
    assert found["body.inner"].usable
    assert found["body.inner"].reason == "the model writes into its output afterwards"


def test_an_activation_in_place_is_told_at_the_layer_before_it():
    found = reports(Host(layer=nn.Linear(WIDTH, WIDTH), relu=nn.ReLU(inplace=True)))
    assert [path for path, layer in found.items() if layer.mutated] == ["layer"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_told(value):
    found = report_of(lambda x: x.index_fill(1, torch.tensor([4]), value))
    assert (found.finite, found.usable) == (False, False)
    assert found.reason == "emits values that are not finite"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_of_the_fast_path_is_told():
    found = report_of(lambda x: torch.nested.as_nested_tensor(list(x)))
    assert (found.usable, found.shape) == (False, None)
    assert found.output == "a NestedTensor"
    assert found.reason == "emits a NestedTensor; pass mha_fast_path=False"


def test_a_jagged_nested_tensor_is_usable():
    found = report_of(lambda x: torch.nested.as_nested_tensor(list(x), layout=torch.jagged))
    assert (found.layout, found.usable, found.reason) == ("jagged", True, "")


def test_notes_are_told_together():
    host = Host(body=Overwriting())
    host.order = ["body", "body"]
    reason = reports(host)["body.inner"].reason
    assert reason == "fires 2 times: set call; the model writes into its output afterwards"


def test_torchs_encoder_is_reported_with_its_fast_path_off():
    class Encoder(Host):
        def forward(self, ids):
            return self.norm(self.encoder(self.embedding(ids), src_key_padding_mask=ids == 0))

    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
    model = Encoder(encoder=nn.TransformerEncoder(layer, 2), norm=nn.LayerNorm(WIDTH))
    count, found = FastPathOff._count, torch.backends.mha.get_fastpath_enabled()
    try:
        layers = reports(model)
        assert (FastPathOff._count, torch.backends.mha.get_fastpath_enabled()) == (0, True)
    finally:
        FastPathOff._count = count
        torch.backends.mha.set_fastpath_enabled(found)
    inside = [layers[f"encoder.layers.{i}"] for i in range(2)]
    assert all(layer.usable and layer.fast_path_off and layer.layout == "BLH" for layer in inside)
    assert "torch's MHA fast path is off while attached" in inside[0].reason
    assert not layers["norm"].fast_path_off
    assert not layers["encoder"].fast_path_off


# --- what never fires ---------------------------------------------------------------------------


class Silent(Host):
    """Every way not to fire."""

    def __init__(self):
        super().__init__(
            attention=nn.MultiheadAttention(WIDTH, 2, batch_first=True),
            direct=nn.Linear(WIDTH, WIDTH),
            weights=nn.Linear(WIDTH, WIDTH),
            unused=nn.Linear(WIDTH, WIDTH),
            layers=nn.ModuleList([nn.Linear(WIDTH, WIDTH)]),
            heads=nn.ModuleDict({"one": nn.Linear(WIDTH, WIDTH)}),
        )

    def forward(self, ids):
        x = self.embedding(ids)
        x = self.attention(x, x, x)[0]
        x = self.direct.forward(x) @ self.weights.weight
        return self.heads["one"](self.layers[0](x))


def test_why_a_layer_does_not_fire_is_told():
    found = reports(Silent())
    silent = {path: layer.reason for path, layer in found.items() if not layer.firings}
    assert list(silent) == ["attention.out_proj", "direct", "weights", "unused", "layers", "heads"]
    assert "attach to 'attention' with select=(0,)" in silent["attention.out_proj"]
    assert "its forward is called directly (which method='forward' sees)" in silent["direct"]
    assert "only its weights are used" in silent["weights"]
    assert "it is no part of scoring" in silent["unused"]
    assert silent["layers"].startswith("a ModuleList is a container that is never called")
    assert silent["heads"].startswith("a ModuleDict is a container that is never called")
    for path in silent:
        assert not found[path].usable
        assert (found[path].output, found[path].shape) == ("–", None)


@pytest.mark.parametrize("path", ["attention.out_proj", "direct", "weights", "unused", "layers"])
def test_capture_gives_the_reason_of_the_report(path):
    model = Silent()
    reason = reports(model)[path].reason
    with pytest.raises(SiteError) as error, capture(model, Site(path, layout="BH")):
        model(IDS)
    assert str(error.value) == f"site {path!r} never fired while Silent scored: {reason}"


def test_the_cure_for_out_proj_works():
    model = Silent()
    site = Site("attention", select=(0,), positions_from=TOKENS)
    with capture(model, site) as captured:
        model(IDS)
    assert captured[site].shape == (3, WIDTH)
    assert reports(model)["attention"].select == (0,)


# --- a recommender's sites ----------------------------------------------------------------------


class Deep(nn.Module):
    """Two layers, a user vector picked by the root, and scores by an item matrix."""

    def __init__(self, items=11):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embedding = nn.Embedding(items + 1, WIDTH, padding_idx=0)
            self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
            self.norm = nn.LayerNorm(WIDTH)
            self.wide = nn.Linear(WIDTH, 2 * WIDTH)
            self.unused = nn.Linear(WIDTH, WIDTH)
        self.eval().requires_grad_(False)

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        x = self.norm(x)
        self.wide(x)
        return x


class DeepRecommender:
    """`Deep`; an adapter may name any site and any head."""

    def __init__(self, site="norm", *, head=lambda head: head, after=lambda users: users):
        self.model = Deep()
        self.catalogue = catalogue([1] * 11)
        self.max_length = 6
        self.site = Site(site, positions_from=TOKENS) if isinstance(site, str) else site
        self.item_head = head(ItemHead(self.model.embedding.weight[1:]))
        self.after = after
        self.batches = []

    def make_batch(self, histories):
        longest = int(histories.lengths.max(initial=1))
        return {"ids": torch.from_numpy(histories.padded(longest, -1) + 1)}

    def score(self, batch):
        self.batches.append(batch)
        ids = batch["ids"]
        last = ids.ne(0).sum(dim=1) - 1
        users = self.after(self.model(ids)[torch.arange(len(ids)), last])
        return ItemHead(self.model.embedding.weight[1:]).scores(users)

    def describe(self):
        return {}


def errors(report):
    return {layer.path: layer.score_error for layer in report.layers}


def test_the_adapters_site_is_recommended_where_it_gives_the_scores():
    rec = DeepRecommender("norm")
    report = site_report(rec)
    assert report.recommended is rec.site
    assert report.reason.startswith("its vector times the item matrix gives the model's own scores")
    found = errors(report)
    assert found["norm"] < 1e-5
    assert all(found[path] > 0.1 for path in ("embedding", "layers.0", "layers.1"))
    assert found["wide"] is found["unused"] is found["layers"] is None
    assert hooked(rec.model) == []


@pytest.mark.parametrize("wrong", ["embedding", "layers.0", "unused", "wide"])
def test_the_layer_that_gives_the_scores_is_recommended_where_the_adapter_is_wrong(wrong):
    rec = DeepRecommender(wrong)
    report = site_report(rec)
    assert report.recommended == Site("norm", positions_from=TOKENS)
    assert report.reason.startswith(f"norm, not the adapter's {wrong!r}, gives the model's own")
    batch = rec.make_batch(Histories.from_lists([[1, 2, 3], [4], [5, 6]]))
    with capture(rec.model, report.recommended) as captured:
        scores = rec.score(batch)
    vectors = captured[report.recommended]
    torch.testing.assert_close(rec.item_head.scores(vectors), scores, atol=1e-5, rtol=1e-5)


def test_of_several_layers_that_give_the_scores_the_last_is_recommended():
    class Repeating(Deep):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5).eval()

        def forward(self, ids):
            return self.dropout(super().forward(ids))

    rec = DeepRecommender("embedding")
    rec.model = Repeating()
    assert site_report(rec).recommended.path == "dropout"


def test_a_layer_whose_last_firing_gives_the_scores_is_recommended_as_it_can_be_used():
    class Repeating(Deep):
        def forward(self, ids):
            return self.norm(torch.tanh(self.layers[0](self.norm(self.embedding(ids)))))

    rec = DeepRecommender("embedding")
    rec.model = Repeating()
    report = site_report(rec)
    assert report.recommended.path == "norm"
    assert errors(report)["norm"] < 1e-5
    batch = rec.make_batch(Histories.from_lists([[1, 2, 3], [4], [5, 6]]))
    with capture(rec.model, report.recommended) as captured:
        scores = rec.score(batch)
    vectors = captured[report.recommended]
    torch.testing.assert_close(rec.item_head.scores(vectors), scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("rec", "said"),
    [
        (DeepRecommender(after=torch.tanh), "the largest difference is"),
        (DeepRecommender(head=lambda head: replace(head, bias=torch.ones(11))), "difference is 1"),
        (DeepRecommender("unused", after=torch.tanh), "it cannot be read"),
    ],
)
def test_where_no_layer_gives_the_scores_the_adapters_site_stays_with_a_reason(rec, said):
    report = site_report(rec)
    assert report.recommended is rec.site
    assert "no layer's vector times the item matrix gives the model's scores" in report.reason
    assert said in report.reason


def test_heads_with_scale_bias_and_cosine_are_the_adapters():
    weights = torch.linspace(-1, 1, 11)

    class Biased(DeepRecommender):
        def score(self, batch):
            ids = batch["ids"]
            users = self.model(ids)[torch.arange(len(ids)), ids.ne(0).sum(dim=1) - 1]
            return self.item_head.scores(users)

    rec = Biased(head=lambda head: replace(head, bias=weights, scale=3.0, normalize=True))
    report = site_report(rec)
    assert report.recommended is rec.site
    assert errors(report)["norm"] < 1e-5


def test_a_site_bh_gives_the_scores_too():
    rec = random_recommender()
    report = site_report(rec)
    assert report.recommended is rec.site
    assert errors(report)["mean"] < 1e-5
    assert errors(report)["item_embedding"] is None  # nothing says where its users are


def test_sasrec_is_reported():
    rec = tiny_sasrec()
    report = site_report(rec)
    assert report.recommended is rec.site
    assert {layer.path for layer in report.layers} == {
        name for name, _ in rec.model.named_modules() if name
    }
    assert errors(report)[rec.site.path] < 1e-5


def test_own_histories_may_be_scored():
    rec = DeepRecommender()
    report = site_report(rec, histories=Histories.from_lists([[1, 2, 3, 4]]))
    assert [layer.shape for layer in report.layers if layer.path == "norm"] == [(1, 4, WIDTH)]
    assert all(batch["ids"].tolist() == [[2, 3, 4, 5]] for batch in rec.batches)


# --- sites by name ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["layers.0", "layers.-2", "embedding"])
def test_a_site_by_its_path_is_as_its_layer_shows(path):
    rec = DeepRecommender()
    plain = "layers.0" if path == "layers.-2" else path
    assert site_at(rec, path) == Site(plain, positions_from=TOKENS)


def test_the_recommended_site_by_its_path_is_that_site():
    rec = DeepRecommender(Site("norm", positions="real", positions_from=TOKENS))
    assert site_at(rec, "norm") is rec.site
    assert site_at(rec, "norm", call=0) == replace(rec.site, call=0)


@pytest.mark.parametrize(
    ("make", "select", "layout"),
    [
        (lambda x: (x.transpose(0, 1), None), (0,), "LBH"),
        (lambda x: {"h": x.transpose(1, 2)}, ("h",), "BHL"),
        (lambda x: x.mean(dim=1), (), "BH"),
    ],
)
def test_layout_and_select_of_a_site_are_found(make, select, layout):
    class Told(Deep):
        def __init__(self):
            super().__init__()
            self.body = Make(make)

        def forward(self, ids):
            self.body(self.embedding(ids))
            return super().forward(ids)

    rec = DeepRecommender()
    rec.model = Told().eval()
    site = site_at(rec, "body", call="first")
    assert site == Site("body", "output", select, layout, "user", TOKENS, "first")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("unused", "'unused' never fired while Deep scored: it is no part of scoring"),
        ("layers", "'layers' never fired while Deep scored: a ModuleList is a container"),
        ("layer.0", r"no module 'layer.0' in Deep; nearest: .*layers.0"),
    ],
)
def test_a_path_that_is_no_site_is_told(path, message):
    with pytest.raises(SiteError, match=message):
        site_at(DeepRecommender(), path)


def test_a_layer_whose_output_cannot_be_read_is_told():
    rec = DeepRecommender()
    rec.model.layers[0] = Make(lambda x: x / 0)
    rec.model.norm = Make(torch.nan_to_num)
    with pytest.raises(SiteError, match=r"site 'layers.0' emits values that are not finite"):
        site_at(rec, "layers.0")
