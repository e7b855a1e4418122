"""Steered models that are compiled, exported, traced, copied or pickled."""

import copy
import io
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from steerrec.attachment import attach
from steerrec.capturing import capture
from steerrec.errors import SiteError
from steerrec.hooks import edit
from steerrec.sites import Lengths, Site, TokenIds

from .small_models import (
    ALL,
    IDS,
    REAL,
    USER,
    WIDTH,
    Sequence,
    random_sae,
    random_steering,
    some_ids,
)
from .toy_models import hooked

SAE = random_sae()
STEERING = random_steering()
OTHER = replace(random_steering(seed=1), alpha=0.5, name="other")
PLAIN = Sequence()(IDS)
BY_METHOD = Site("", positions="all", method="encode")
INPUT = Site("norm", "input", positions_from=TokenIds("embedding"))

needs_a_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ["g++", "c++", "clang++"])), reason="needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


def compiled(model, **settings):
    return torch.compile(model, **{"backend": "eager"} | settings)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


# --- one life of an attachment ------------------------------------------------------------------


def live(attachment):
    """What can be done to an attachment after compilation, one change after the other."""
    yield "observing"
    attachment.steering = STEERING
    yield "steering"
    attachment.alpha = 0.3
    yield "weaker"
    attachment.alpha = -2
    yield "the other way"
    attachment.enabled = False
    yield "off"
    attachment.enabled = True
    yield "on"
    attachment.steering = OTHER
    yield "another recipe"
    attachment.steering = None
    yield "no recipe"
    attachment.steering = STEERING
    yield "a recipe again"
    for alpha in ([0.0, 1.0, 2.0], [3.0, -1.0, 0.5]):
        attachment.alpha = torch.tensor(alpha)
        yield f"per user {alpha}"
    attachment.alpha = 1.5
    yield "one for all"


def check_life(site, backend):
    """Compiled and eager agree in every state; how many graphs there were in each."""
    model = Sequence()
    plain = model(IDS)
    attachment = attach(model, SAE, site=site)
    model(IDS)
    fast, counted = compiled(model, backend=backend), []
    for state in live(attachment):
        found = fast(IDS)
        counted.append(graphs())
        close(found, model(IDS))
        steers = state not in ("observing", "off", "no recipe")
        assert torch.allclose(found, plain, atol=1e-3) != steers, state
    assert attachment.report().compiled
    attachment.remove()
    close(fast(IDS), plain)
    return counted


SITES = {"user": USER, "real": REAL, "all": ALL, "input": INPUT, "method": BY_METHOD}
each_site = pytest.mark.parametrize("site", SITES.values(), ids=SITES.keys())


def mostly_slow(*values):
    """Compiling takes its time: all but the first are left to the slow tests."""
    return [values[0], *(pytest.param(value, marks=pytest.mark.slow) for value in values[1:])]


@pytest.mark.parametrize("site", mostly_slow(*SITES.values()), ids=SITES.keys())
def test_a_compiled_model_follows_its_attachment_without_compiling_again(site):
    counted = check_life(site, "eager")
    assert counted[:9] == [counted[0]] * 9
    assert counted[9] == counted[10]  # compiled once more for strengths per user
    assert counted[11] == counted[10]


@pytest.mark.slow
@needs_a_compiler
@each_site
def test_inductor_agrees_with_eager(site):
    counted = check_life(site, "inductor")
    assert counted[:9] == [counted[0]] * 9


def test_steering_that_is_there_before_compilation():
    model = Sequence()
    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        fast, expected = compiled(model), model(IDS)
        close(fast(IDS), expected)
        attachment.alpha = 0.0
        close(fast(IDS), PLAIN)
        attachment.alpha = 1.0
        close(fast(IDS), expected)


def test_a_recipe_that_reconstructs():
    model, steering = Sequence(), random_steering(splice="reconstruct")
    with attach(model, SAE, site=USER, steering=steering) as attachment:
        fast = compiled(model)
        close(fast(IDS), model(IDS))
        attachment.steering = random_steering(splice="reconstruct", seed=1, alpha=2.0)
        close(fast(IDS), model(IDS))
        attachment.enabled = False
        assert torch.equal(fast(IDS), PLAIN)


@pytest.mark.parametrize(("first", "then"), [("delta", "reconstruct"), ("reconstruct", "delta")])
def test_another_splice_after_compilation_is_refused(first, then):
    model, steering = Sequence(), random_steering(splice=first)
    with attach(model, SAE, site=USER, steering=steering) as attachment:
        fast = compiled(model)
        expected = fast(IDS)
        refusal = f"spliced by '{first}'; .* spliced by '{then}': attach it"
        with pytest.raises(SiteError, match=refusal):
            attachment.steering = random_steering(splice=then, seed=1)
        assert attachment.steering is steering
        close(fast(IDS), expected)
        close(model(IDS), expected)
        attachment.remove()


def test_an_observing_attachment_is_compiled_for_delta():
    model = Sequence()
    with attach(model, SAE, site=USER) as attachment:
        compiled(model)(IDS)
        with pytest.raises(SiteError, match="a shift, spliced by 'delta'"):
            attachment.steering = random_steering(splice="reconstruct")
        assert attachment.steering is None


@pytest.mark.parametrize("site", [USER, ALL, INPUT, BY_METHOD], ids=["user", "all", "input", "f"])
def test_the_hooks_are_one_graph_with_the_model(site):
    model = Sequence()
    with attach(model, SAE, site=site, steering=STEERING):
        close(compiled(model, fullgraph=True)(IDS), model(IDS))
    assert graphs() == 1


def test_module_compile_is_the_same():
    model = Sequence()
    attachment = attach(model, SAE, site=USER, steering=STEERING)
    steered = model(IDS)
    model.compile(backend="eager")
    close(model(IDS), steered)
    assert graphs() == 1
    attachment.alpha = 0.0
    close(model(IDS), PLAIN)
    assert graphs() == 1
    attachment.remove()
    assert torch.equal(model(IDS), PLAIN)


@pytest.mark.slow
def test_batches_of_other_sizes():
    def count(model):
        torch.compiler.reset()
        counters.clear()
        fast = compiled(model)
        for batch in (2, 3, 5, 9, 16, 17, 30, 1):
            ids = some_ids(batch)
            close(fast(ids), model(ids))
        return graphs()

    plain, steered = count(Sequence()), Sequence()
    with attach(steered, SAE, site=USER, steering=STEERING) as attachment:
        steered(IDS)
        assert count(steered) <= plain + 2  # few rows are decoded in another way than many
        attachment.alpha = torch.linspace(-1, 1, 6)
        fast, ids = compiled(steered), some_ids(6)
        close(fast(ids), steered(ids))
        with pytest.raises(SiteError, match="6 values for a batch of 3"):
            fast(IDS)


def test_running_the_plain_model_in_between_compiles_nothing_again():
    model = Sequence()
    with attach(model, SAE, site=USER, steering=STEERING):
        fast = compiled(model)
        fast(IDS)
        before = graphs()
        model(IDS)
        fast(IDS)
        assert graphs() == before


def test_two_attachments_are_compiled_together():
    model = Sequence()
    with (
        attach(model, SAE, site=USER, steering=STEERING) as first,
        attach(model, random_sae(seed=1), site=USER, steering=OTHER) as second,
    ):
        fast = compiled(model)
        model(IDS)
        close(fast(IDS), model(IDS))
        before = graphs()
        first.alpha, second.enabled = -1.0, False
        close(fast(IDS), model(IDS))
        first.enabled, second.enabled = False, True
        close(fast(IDS), model(IDS))
        assert graphs() == before


@pytest.mark.slow
def test_gru_and_lengths():
    class GRU(Sequence):
        def __init__(self):
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True).requires_grad_(False)

        def forward(self, ids, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(
                self.embedding(ids), lengths, batch_first=True, enforce_sorted=False
            )
            out = nn.utils.rnn.pad_packed_sequence(
                self.gru(packed)[0], batch_first=True, total_length=ids.shape[1]
            )[0]
            return self.norm(out)

    model, lengths = GRU(), torch.tensor([3, 1, 4])
    site = Site("norm", positions_from=Lengths("", (1,)))
    with attach(model, SAE, site=site, steering=STEERING) as attachment:
        fast = compiled(model)
        for alpha in (1.0, -0.5, torch.tensor([0.0, 1.0, 2.0])):
            attachment.alpha = alpha
            close(fast(IDS, lengths), model(IDS, lengths))


# --- models that cannot be compiled whole -------------------------------------------------------


class Breaks(Sequence):
    def forward(self, ids):
        x = self.embedding(ids)
        torch._dynamo.graph_break()
        return self.norm(torch.relu(self.layer(x)))


class BreaksInATry(Sequence):
    def forward(self, ids):
        try:
            x = self.embedding(ids)
            torch._dynamo.graph_break()
            return self.norm(torch.relu(self.layer(x)))
        finally:
            pass


class LooksAtValues(Sequence):
    def forward(self, ids):
        x = self.embedding(ids)
        for _ in range(2):
            if x.sum().item() > -1e9:
                x = torch.relu(self.layer(x))
        return self.norm(x)


class LeavesAMethodOut(Sequence):
    def forward(self, ids):
        return self.finish(self.embedding(ids))

    @torch.compiler.disable
    def finish(self, x):
        return self.norm(torch.relu(self.layer(x)))


class LeavesTheEmbeddingOut(Sequence):
    def forward(self, ids):
        return self.norm(torch.relu(self.layer(self.embed(ids))))

    @torch.compiler.disable
    def embed(self, ids):
        return self.embedding(ids)


two_sides = pytest.mark.xfail(
    raises=SiteError, reason="ids that are seen in a graph are not known outside of it, or reverse"
)
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "site"),
    [
        (Breaks, USER),
        *(pytest.param(Breaks, site, marks=slow) for site in (REAL, ALL)),
        *(pytest.param(BreaksInATry, site, marks=slow) for site in (USER, REAL, ALL)),
        *(pytest.param(LooksAtValues, site, marks=slow) for site in (USER, REAL, ALL)),
        pytest.param(LeavesTheEmbeddingOut, USER, marks=two_sides),
        pytest.param(LeavesTheEmbeddingOut, ALL, marks=slow),
        pytest.param(LeavesAMethodOut, USER, marks=two_sides),
        pytest.param(LeavesAMethodOut, ALL, marks=slow),
    ],
    ids=lambda value: getattr(value, "positions", None) or value.__name__,
)
def test_models_that_are_compiled_in_parts(kind, site):
    model = kind()
    plain = model(IDS)
    attachment = attach(model, SAE, site=site, steering=STEERING)
    fast = compiled(model)
    for alpha in (1.0, 0.3, 0.0):
        attachment.alpha = alpha
        close(fast(IDS), model(IDS))
        close(fast(IDS[:2]), model(IDS[:2]))
    attachment.enabled = False
    close(fast(IDS), plain)
    attachment.remove()
    close(fast(IDS), plain)


@pytest.mark.parametrize("site", mostly_slow(USER, REAL, ALL), ids=["user", "real", "all"])
def test_a_compiled_method_that_bypasses_the_root(site):
    model = Sequence()
    with attach(model, SAE, site=site, steering=STEERING) as attachment:
        steered, encode = model(IDS), compiled(model.encode)
        close(encode(IDS), steered)
        close(encode(IDS), steered)
        close(encode(IDS[:2]), steered[:2])
        attachment.alpha = 0.0
        close(encode(IDS), PLAIN)


# --- what a compiled model does not see ---------------------------------------------------------


def test_a_compiled_model_neither_counts_nor_keeps():
    model = Sequence()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(model, SAE, site=USER, steering=STEERING) as attachment:
            compiled(model)(IDS)
            report = attachment.report()
            assert (report.compiled, report.firings, report.used) == (True, 0, 0)
            with pytest.raises(SiteError, match="a compiled model keeps none: run the plain"):
                _ = attachment.latents
            attachment.require_fired()
            model(IDS)
            assert attachment.latents.values.shape == (3, SAE.k)
            assert attachment.report().firings == 1


def test_a_compiled_model_does_not_see_scopes():
    model = Sequence()
    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        fast = compiled(model)
        steered = fast(IDS)
        for wish in ({"alpha": 5.0}, {"users": torch.tensor([True, False, False])}):
            with pytest.raises(SiteError, match="a compiled model does not see scopes"):
                attachment.scope(**wish).__enter__()
        close(steered, model(IDS))


def test_a_strength_that_is_a_function_is_compiled_with_the_model():
    model = Sequence()
    attachment = attach(model, SAE, site=USER, steering=STEERING)
    attachment.alpha = lambda firing: (firing.tokens != 0).sum(dim=1) / 4
    close(compiled(model)(IDS), model(IDS))
    assert not torch.equal(model(IDS), PLAIN)
    with pytest.raises(SiteError, match="no function can become its alpha"):
        attachment.alpha = lambda firing: 0.25


# --- too late -----------------------------------------------------------------------------------


def compile_child(model):
    model.norm = compiled(model.norm)
    return model


def compile_in_place(model):
    model.compile(backend="eager")
    return model


def compile_child_in_place(model):
    model.norm.compile(backend="eager")
    return model


def compile_source_in_place(model):
    model.embedding.compile(backend="eager")
    return model


TOO_LATE = {
    "torch.compile": compiled,
    "module.compile": compile_in_place,
    "child.compile": compile_child_in_place,
    "source.compile": compile_source_in_place,
    "torch.compile of a child": compile_child,
    "in DataParallel": lambda model: nn.DataParallel(compiled(model)),
}


@pytest.mark.parametrize("prepare", TOO_LATE.values(), ids=TOO_LATE.keys())
@pytest.mark.parametrize("ran", [False, True], ids=["not run yet", "run before"])
def test_hooks_on_what_is_compiled_already_are_refused(prepare, ran):
    model = prepare(Sequence())
    if ran:
        model(IDS)
    for tool in (
        lambda: attach(model, SAE, site=USER, steering=STEERING),
        lambda: edit(model, USER, torch.zeros_like),
        lambda: capture(model, USER).__enter__(),
    ):
        with pytest.raises(SiteError, match=r"Sequence is already compiled, .* then call torch"):
            tool()
    assert hooked(model) == []


def test_a_part_that_is_compiled_elsewhere_is_no_hindrance():
    model = Sequence()
    model.layer.compile(backend="eager")
    with attach(model, SAE, site=USER, steering=STEERING):
        assert not torch.allclose(model(IDS), PLAIN, atol=1e-3)


def test_a_compiled_model_of_which_nobody_knows_is_worth_a_warning():
    model = Sequence()
    fast = compiled(lambda ids: model(ids))
    fast(IDS)
    with (
        pytest.warns(UserWarning, match="'norm' saw nothing: .* or it was compiled before"),
        attach(model, SAE, site=USER, steering=STEERING),
    ):
        assert torch.equal(fast(IDS), PLAIN)


def test_a_compiled_forward_is_found_out_at_the_end():
    model = Sequence()
    model.forward = compiled(model.forward)
    model(IDS)
    with (
        pytest.raises(SiteError, match=r"'norm' never fired .* or the model was compiled before"),
        attach(model, SAE, site=USER, steering=STEERING),
    ):
        assert torch.equal(model(IDS), PLAIN)


def test_what_is_attached_after_the_first_compiled_call_is_not_seen():
    model = Sequence()
    first = attach(model, SAE, site=USER, steering=STEERING)
    fast = compiled(model)
    close(fast(IDS), model(IDS))
    first.remove()
    assert torch.equal(fast(IDS), PLAIN)
    with (
        pytest.raises(SiteError, match=r"never fired .* or the model was compiled before"),
        attach(model, SAE, site=USER, steering=STEERING),
    ):
        assert torch.equal(fast(IDS), PLAIN)


# --- torch.export -------------------------------------------------------------------------------


def exported(model, *, ids=IDS, **settings):
    return torch.export.export(model, (ids,), **settings)


def saved(program):
    torch.export.save(program, file := io.BytesIO())
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize("site", [USER, ALL, INPUT, BY_METHOD], ids=["user", "all", "input", "f"])
def test_an_exported_model_steers_as_the_eager_one_did(site):
    model = Sequence()
    attachment = attach(model, SAE, site=site, steering=STEERING)
    steered = model(IDS)
    program = exported(model)
    close(program.module()(IDS), steered)
    kept = saved(program)
    attachment.alpha, attachment.enabled = 0.3, False
    attachment.remove()
    close(kept(IDS), steered)
    assert torch.equal(model(IDS), PLAIN)


def test_an_exported_model_that_is_not_saved_yet_shares_the_strength():
    model = Sequence()
    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        program = exported(model).module()
        attachment.alpha = 0.3
        close(program(IDS), model(IDS))
        attachment.enabled = False
        close(program(IDS), PLAIN)


def test_an_exported_model_of_strengths_per_user():
    model = Sequence()
    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        attachment.alpha = torch.tensor([0.0, 1.0, 2.0])
        close(saved(exported(model))(IDS), model(IDS))


def test_an_observing_attachment_exports_the_plain_model():
    model = Sequence()
    with attach(model, SAE, site=USER):
        close(exported(model).module()(IDS), PLAIN)


def test_a_model_goes_on_after_it_was_exported():
    model = Sequence()
    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        steered = model(IDS)
        exported(model)
        assert torch.equal(model(IDS), steered)
        assert attachment.report().firings == 2
        close(compiled(model)(IDS), steered)


def test_exporting_a_model_changes_nothing_for_the_eager_one():
    model = Sequence()
    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        exported(model)
        with attachment.scope(enabled=False):
            assert torch.equal(model(IDS), PLAIN)
        attachment.steering = random_steering(splice="reconstruct")
        attachment.alpha = lambda firing: 0.0
        model(IDS)


def test_real_positions_are_exported():
    model = Sequence()
    with attach(model, SAE, site=REAL, steering=STEERING):
        close(exported(model).module()(IDS), model(IDS))


# --- torch.jit.trace ----------------------------------------------------------------------------


def tracing(test):
    """Tracing is deprecated, and warns where Python looks at values."""
    for ignored in ("DeprecationWarning", "torch.jit.TracerWarning"):
        test = pytest.mark.filterwarnings(f"ignore::{ignored}")(test)
    return test


@tracing
@each_site
def test_a_traced_model_steers_as_the_eager_one_did(site):
    model, other = Sequence(), some_ids(3, seed=8)
    attachment = attach(model, SAE, site=site, steering=STEERING)
    steered, elsewhere = model(IDS), model(other)
    traced = torch.jit.trace(model, (IDS,))
    torch.jit.save(traced, file := io.BytesIO())
    file.seek(0)
    attachment.alpha, attachment.steering = 0.3, OTHER
    attachment.remove()
    for again in (traced, torch.jit.load(file)):
        close(again(IDS), steered)
        close(again(other), elsewhere)
    assert torch.equal(model(IDS), PLAIN)


@tracing
@pytest.mark.parametrize(("batch", "then"), [(3, 5), (1, 2), (3, 40), (40, 3)])
def test_a_traced_model_takes_batches_of_other_sizes(batch, then):
    model = Sequence()
    with attach(model, SAE, site=USER, steering=STEERING):
        traced = torch.jit.trace(model, (some_ids(batch),))
        close(traced(some_ids(then)), model(some_ids(then)))


@tracing
def test_an_observing_attachment_traces_the_plain_model():
    model = Sequence()
    with attach(model, SAE, site=USER):
        model(IDS)
        traced = torch.jit.trace(model, (IDS,))
    assert torch.equal(traced(IDS), PLAIN)


# --- copies -------------------------------------------------------------------------------------


def copied(model, how):
    if how == "deepcopy":
        return copy.deepcopy(model)
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


each_copy = pytest.mark.parametrize("how", ["deepcopy", "pickle"])


@each_copy
@each_site
def test_a_copy_of_a_steered_model_is_not_steered(how, site):
    model = Sequence()
    with attach(model, SAE, site=site, steering=STEERING) as attachment:
        steered = model(IDS)
        twin = copied(model, how)
        assert torch.equal(twin(IDS), PLAIN)
        assert torch.equal(twin.encode(IDS), PLAIN)
        assert attachment.firings == 1
        attachment.alpha = 3.0
        assert torch.equal(twin(IDS), PLAIN)
        attachment.alpha = 1.0
        assert torch.equal(model(IDS), steered)
    assert torch.equal(twin(IDS), PLAIN)


@each_copy
def test_a_copy_of_a_steered_model_can_be_steered_copied_and_compiled(how):
    model = Sequence()
    with attach(model, SAE, site=USER, steering=STEERING):
        steered = model(IDS)
        twin = copied(model, how)
    with attach(twin, SAE, site=USER, steering=STEERING) as attachment:
        assert torch.equal(twin(IDS), steered)
        assert torch.equal(copied(twin, how)(IDS), PLAIN)
        assert torch.equal(model(IDS), PLAIN)
        fast = compiled(twin)
        close(fast(IDS), steered)
        attachment.enabled = False
        close(fast(IDS), PLAIN)
    with capture(twin, USER) as captured:
        twin(IDS)
    assert torch.equal(captured[USER], PLAIN[torch.arange(3), torch.tensor([2, 0, 3])])


def test_the_state_of_a_steered_model_is_that_of_the_plain_one():
    model, plain = Sequence(), Sequence()
    with attach(model, SAE, site=USER, steering=STEERING):
        model(IDS)
        state = model.state_dict()
        assert list(state) == list(plain.state_dict())
        plain.load_state_dict(state)
        assert len(list(model.parameters())) == len(list(plain.parameters()))


# --- batch sizes --------------------------------------------------------------------------------


@pytest.mark.parametrize("per_user", [False, True], ids=["one strength", "one per user"])
def test_batches_of_other_sizes_compile_once_more_at_most(per_user):
    model = Sequence()
    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        fast, found = compiled(model), []
        for batch in (2, 3, 5, 9, 17, 70):
            if per_user:
                attachment.alpha = torch.linspace(0, 2, batch)
            close(fast(some_ids(batch)), model(some_ids(batch)))
            found.append(graphs())
        assert found[-1] == found[1]


def test_a_steered_model_is_exported_for_batches_of_any_size():
    model = Sequence()
    with attach(model, SAE, site=USER, steering=STEERING):
        sizes = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(model, (IDS,), dynamic_shapes=sizes).module()
        for batch in (2, 7, 70):
            close(program(some_ids(batch)), model(some_ids(batch)))


def test_a_recipe_that_is_refused_leaves_the_graph_alone():
    model = Sequence()
    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        fast = compiled(model)
        steered = fast(IDS)
        with pytest.raises(SiteError, match="alpha is nan"):
            attachment.steering = replace(OTHER, alpha=float("nan"))
        assert torch.equal(fast(IDS), steered)
