"""Which firing counts, methods as sites, and where sites learn which positions are real."""

import copy
import io
import itertools
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from steerrec.attachment import attach
from steerrec.capturing import capture
from steerrec.data import Histories
from steerrec.errors import SiteError
from steerrec.handles import WatchedMethod, hook_method
from steerrec.hooks import edit
from steerrec.recommender import ItemHead
from steerrec.sites import Lengths, RealMask, Site, TokenIds

from .small_models import IDS, WIDTH, random_sae, random_steering, replica_of, some_ids
from .tiny import catalogue
from .toy_models import hooked

LAST = (torch.arange(3), torch.tensor([2, 0, 3]))  # the user positions of IDS


class Tenfold(nn.Module):
    """Ten times its input; fails at the firing that it is told to."""

    fail_at = 0
    error = ValueError
    firings = 0

    def forward(self, x):
        self.firings += 1
        if self.firings == self.fail_at:
            raise self.error("in the model")
        return x * 10


class Loop(nn.Module):
    """Embeds token ids and multiplies by ten as often as `times` says."""

    def __init__(self, times=2):
        super().__init__()
        self.times = times
        torch.manual_seed(0)
        self.embedding = nn.Embedding(12, WIDTH, padding_idx=0)
        self.body = Tenfold()
        self.head = nn.Identity()
        self.requires_grad_(False)

    def forward(self, ids):
        return self.encode(ids)

    def encode(self, ids):
        x = self.embedding(ids)
        for _ in range(self.times):
            x = self.body(x)
        return self.head(x)


def by_call(model, ids):
    return model(ids)


def by_method(model, ids):
    return model.encode(ids)


SITE = Site("body", positions_from=TokenIds("embedding"), call="all")
either_way = pytest.mark.parametrize("run", [by_call, by_method], ids=["root", "root bypassed"])


def expected(model, ids, call):
    """The user vectors of the firings of one forward that count, by hand."""
    users = ids.ne(0).sum(dim=1) - 1
    x = model.embedding(ids)[torch.arange(len(ids)), users]
    firings = [x * 10 ** (k + 1) for k in range(model.times)]
    return {"first": firings[:1], "last": firings[-1:], "all": firings}.get(call) or [firings[call]]


# --- the call policy ----------------------------------------------------------------------------


@either_way
@pytest.mark.parametrize("call", ["first", "last", "all", 0, 1, 2])
def test_the_firings_that_count_are_captured(run, call):
    model, site = Loop(times=3), replace(SITE, call=call)
    plain = run(model, IDS)
    with capture(model, site) as captured:
        assert torch.equal(run(model, IDS), plain)
    torch.testing.assert_close(captured[site], torch.cat(expected(model, IDS, call)))


@given(
    times=st.integers(1, 4),
    call=st.sampled_from(["first", "last", "all"]) | st.integers(0, 3),
    batches=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    run=st.sampled_from([by_call, by_method]),
)
def test_every_forward_counts_from_its_own_beginning(times, call, batches, run):
    model, site = Loop(times), replace(SITE, call=call)
    inputs = [some_ids(batch, seed=seed) for seed, batch in enumerate(batches)]
    never = isinstance(call, int) and call >= times
    message = rf"fired {times * len(inputs)} times, but never as the call={call} that counts"
    with pytest.raises(SiteError, match=message) if never else nullcontext():  # noqa: SIM117
        with capture(model, site) as captured:
            for ids in inputs:
                run(model, ids)
    if never:
        return
    rows = [row for ids in inputs for row in expected(model, ids, call)]
    torch.testing.assert_close(captured[site], torch.cat(rows))
    assert hooked(model) == []


@either_way
def test_the_only_firing_of_a_forward_may_happen_in_every_forward(run):
    model, site = Loop(times=1), replace(SITE, call="only")
    with capture(model, site) as captured:
        for _ in range(3):
            run(model, IDS)
    assert captured[site].shape == (9, WIDTH)


@either_way
def test_a_second_firing_of_what_is_to_fire_once_is_an_error(run):
    model = Loop(times=2)
    with (
        pytest.raises(SiteError, match="'body' fired 2 times in one forward; say which counts"),
        capture(model, replace(SITE, call="only")),
    ):
        run(model, IDS)
    assert hooked(model) == []


@either_way
@pytest.mark.parametrize(
    ("call", "change"),
    [("first", 7 * 100), (0, 7 * 100), (1, 7 * 10), (2, 7), ("all", 7 * 100 + 7 * 10 + 7)],
)
def test_an_edit_changes_the_firings_that_count(run, call, change):
    """What is added at one of three firings is multiplied by those that follow."""
    model = Loop(times=3)
    plain = run(model, IDS)
    with edit(model, replace(SITE, call=call), lambda rows: rows + 7) as hook:
        edited = run(model, IDS)
    plain[LAST] += change
    torch.testing.assert_close(edited, plain)
    assert (hook.firings, hook.used) == (3, 3 if call == "all" else 1)


def test_without_a_source_and_a_root_each_firing_is_a_forward_of_its_own():
    model, site = Loop(times=2), Site("body", positions="all")
    with edit(model, site, lambda rows: rows) as hook:
        model.encode(IDS)
    assert (hook.firings, hook.used) == (2, 2)
    with pytest.raises(SiteError, match="fired 2 times in one forward"), capture(model, site):
        model(IDS)


@pytest.mark.parametrize("call", ["first", "last", 0, 1])
def test_without_a_source_and_a_root_nothing_tells_which_firing_it_is(call):
    model, site = Loop(times=2), Site("body", positions="all", call=call)
    with capture(model, site) as captured:
        model(IDS)
    assert len(captured[site]) == IDS.numel()
    with pytest.raises(SiteError, match="own forward is bypassed"), capture(model, site):
        model.encode(IDS)


@pytest.mark.parametrize("call", ["first", 1, "all"])
def test_the_replicas_of_data_parallel_count_as_the_model_does(call):
    model = Loop(times=3)
    with edit(model, replace(SITE, call=call), lambda rows: rows + 7):
        edited = model(IDS)
        with ThreadPoolExecutor(2) as pool:
            for found in pool.map(lambda replica: replica(IDS), [replica_of(model)] * 2):
                assert torch.equal(found, edited)


# --- forwards that do not come to their end -----------------------------------------------------

ways = pytest.mark.parametrize(
    ("first", "then"),
    list(itertools.product([by_call, by_method], repeat=2)),
    ids=lambda way: way.__name__,
)
ways_of_interruption = pytest.mark.parametrize(
    ("first", "then"),
    [
        (by_call, by_call),
        (by_method, by_call),
        (by_method, by_method),
        (by_call, by_method),  # torch calls no hooks after what is no Exception
    ],
    ids=lambda way: way.__name__,
)


@ways
@pytest.mark.parametrize("call", ["first", 1, "all"])
def test_counting_begins_anew_after_an_exception_in_a_forward(first, then, call):
    model, seen = Loop(times=2), []
    model.body.fail_at = 2
    with edit(model, replace(SITE, call=call), lambda rows: seen.append(rows)):
        with pytest.raises(ValueError, match="in the model"):
            first(model, IDS)
        then(model, IDS)
        then(model, IDS)
    rows = expected(model, IDS, call)
    before = [] if call == 1 else rows[:1]  # of the forward that failed
    torch.testing.assert_close(torch.cat(seen), torch.cat(before + rows + rows))


@ways
def test_the_only_firing_is_the_only_one_also_after_an_exception(first, then):
    model = Loop(times=1)
    model.body.fail_at = 1
    site = Site("embedding", positions_from=TokenIds("embedding"))  # fires before the failure
    with edit(model, site, lambda rows: rows + 1) as hook:
        with pytest.raises(ValueError, match="in the model"):
            first(model, IDS)
        then(model, IDS)
        then(model, IDS)
    assert hook.firings == hook.used == 3


@ways_of_interruption
def test_counting_begins_anew_after_ctrl_c(first, then):
    model = Loop(times=1)
    model.head = Tenfold()
    model.head.fail_at, model.head.error = 1, KeyboardInterrupt
    with edit(model, replace(SITE, call="only"), lambda rows: rows + 1) as hook:
        with pytest.raises(KeyboardInterrupt):
            first(model, IDS)
        then(model, IDS)
        then(model, IDS)
    assert hook.firings == hook.used == 3


@ways_of_interruption
def test_counting_begins_anew_after_a_capture_that_stops_on_the_same_model(first, then):
    model = Loop(times=1)
    plain = model(IDS)
    with edit(model, replace(SITE, call="only"), lambda rows: rows + 7) as hook:
        with capture(model, Site("body", positions="all"), stop=True):
            first(model, IDS)
        for _ in range(2):
            edited = then(model, IDS)
    assert torch.equal(edited[LAST], plain[LAST] + 7)
    assert hook.firings == hook.used == 3


def test_stop_waits_for_the_last_firing_where_that_is_wanted():
    model, head = Loop(times=2), Site("head", positions="all")
    last = replace(SITE, call="last")
    with capture(model, head, last, stop=True) as captured:
        model(IDS)
    torch.testing.assert_close(captured[last], expected(model, IDS, "last")[0])


def test_stop_waits_for_the_last_firing_when_another_site_fires_before_it():
    class Between(Loop):
        def encode(self, ids):
            return self.body(self.head(self.body(self.embedding(ids))))

    model, head = Between(), Site("head", positions="all")
    last = replace(SITE, call="last")
    with capture(model, head, last, stop=True) as captured:
        model(IDS)
    torch.testing.assert_close(captured[last], expected(model, IDS, "last")[0])


@pytest.mark.parametrize(("call", "firings"), [("first", 1), (0, 1), (1, 2), ("last", 4)])
def test_stop_ends_the_forward_at_the_firing_that_counts(call, firings):
    model, site = Loop(times=4), replace(SITE, call=call)
    with capture(model, site, stop=True) as captured:
        model(IDS)
    assert model.body.firings == firings
    assert len(captured[site]) == 3


# --- the last firing ----------------------------------------------------------------------------


class LoopRecommender:
    """`Loop` as a Recommender whose item matrix is the embedding."""

    def __init__(self, times=2, run=by_call):
        self.model = Loop(times).eval()
        self.run = run
        self.catalogue = catalogue([1] * 11)
        self.max_length = 6
        self.site = replace(SITE, call="last")

    @property
    def item_head(self):
        return ItemHead(self.model.embedding.weight[1:])

    def make_batch(self, histories):
        longest = int(histories.lengths.max(initial=1))
        return {"ids": torch.from_numpy(histories.padded(longest, -1) + 1)}

    def score(self, batch):
        ids = batch["ids"]
        x = self.run(self.model, ids)[torch.arange(len(ids)), ids.ne(0).sum(dim=1) - 1]
        return self.item_head.scores(x)

    def describe(self):
        return {}


def test_the_last_firing_cannot_be_edited_on_a_bare_module():
    model, site = Loop(), replace(SITE, call="last")
    with pytest.raises(SiteError, match="the last is known only once the forward is over"):
        edit(model, site, torch.zeros_like)
    with pytest.raises(SiteError, match="expected its number from 0 as call"):
        attach(model, random_sae(), site=site)
    assert hooked(model) == []


@pytest.mark.parametrize("times", [1, 2, 4])
@either_way
def test_attach_finds_out_which_firing_of_a_recommender_is_the_last(run, times):
    rec, sae, steering = LoopRecommender(times, run), random_sae(), random_steering(alpha=9.0)
    batch = rec.make_batch(Histories.from_lists([[1, 2, 3], [4], [5, 6, 7, 0]]))
    plain = rec.score(batch)
    by_number = replace(rec.site, call=times - 1)
    with attach(rec.model, sae, site=by_number, steering=steering):
        wanted = rec.score(batch)
    with attach(rec, sae, steering=steering) as attachment:
        assert torch.equal(rec.score(batch), wanted)
        assert torch.equal(rec.score(batch), wanted)
    assert not torch.allclose(wanted, plain)
    assert (attachment.report().firings, attachment.report().used) == (2 * times, 2)


def test_more_firings_than_were_seen_before_are_an_error():
    rec = LoopRecommender(times=2)
    with attach(rec, random_sae(), steering=random_steering()):
        rec.model(IDS)
        rec.model.times = 3
        with pytest.raises(SiteError, match="fired more often in one forward than the 2 times"):
            rec.model(IDS)
        rec.model.times = 2
        rec.model(IDS)


def test_fewer_firings_than_were_seen_before_are_an_error():
    rec = LoopRecommender(times=2)
    with attach(rec, random_sae(), steering=random_steering()):
        rec.model.times = 1
        with pytest.raises(SiteError, match="fired"):
            rec.model(IDS)


def test_an_exception_in_a_forward_before_the_last_firing_is_the_only_thing_said():
    rec = LoopRecommender(times=2)
    with attach(rec, random_sae(), steering=random_steering()):
        rec.model.body.firings, rec.model.body.fail_at = 0, 2
        with (
            warnings.catch_warnings(action="error"),
            pytest.raises(ValueError, match="in the model"),
        ):
            rec.model(IDS)
        rec.model(IDS)


def test_a_recommenders_site_that_does_not_fire_as_it_says_is_refused_at_once():
    rec = LoopRecommender(times=2)
    with pytest.raises(SiteError, match="'body' fired 2 times in one forward; say which counts"):
        attach(rec, random_sae(), site=replace(rec.site, call="only"))
    with pytest.raises(SiteError, match="fired 2 times, but never as the call=2 that counts"):
        attach(rec, random_sae(), site=replace(rec.site, call=2))
    assert hooked(rec.model) == []


class TwoForwards(LoopRecommender):
    """Scores with two forwards, of the history and of its latest item."""

    def score(self, batch):
        newest = batch["ids"].gather(1, batch["ids"].ne(0).sum(dim=1, keepdim=True) - 1)
        return super().score(batch) + super().score({"ids": newest})


@pytest.mark.parametrize(("times", "call"), [(1, "only"), (2, "last")])
def test_a_recommender_may_score_with_several_forwards(times, call):
    rec, sae, steering = TwoForwards(times), random_sae(), random_steering(alpha=9.0)
    site, batch = replace(rec.site, call=call), rec.make_batch(Histories.from_lists([[1, 2], [4]]))
    with attach(rec.model, sae, site=replace(site, call=times - 1), steering=steering):
        wanted = rec.score(batch)
    with attach(rec, sae, site=site, steering=steering):
        assert torch.equal(rec.score(batch), wanted)


# --- methods as sites ---------------------------------------------------------------------------


class Scorer(nn.Module):
    """A model whose user vector no module emits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3)
        self.requires_grad_(False)

    def score_items(self, users, *, scale=1.0):
        return users * scale

    def forward(self, x):
        return self.score_items(self.layer(x), scale=2.0)


X = torch.arange(12.0).reshape(4, 3)
SCORED = Site("", layout="BH", method="score_items")


@pytest.mark.parametrize(
    ("at", "change"), [("output", lambda h: h * 2 + 5), ("input", lambda h: (h + 5) * 2)]
)
def test_a_method_is_a_site(at, change):
    model, site = Scorer(), replace(SCORED, at=at)
    hidden = model.layer(X)
    with capture(model, site) as captured, edit(model, site, lambda rows: rows + 5):
        assert torch.equal(model(X), change(hidden))
    assert torch.equal(captured[site], hidden * 2 if at == "output" else hidden)
    assert "score_items" not in vars(model)
    assert torch.equal(model(X), hidden * 2)


def test_a_keyword_of_a_method_is_a_site():
    model = Scorer()
    model.score_items = lambda users, scale: users * scale
    model.forward = lambda x: model.score_items(users=x, scale=3)
    with edit(model, replace(SCORED, at="input", select=("users",)), lambda rows: rows + 1):
        assert torch.equal(model(X), (X + 1) * 3)


def test_forward_as_a_method_sees_direct_calls():
    class Direct(Scorer):
        def forward(self, x):
            return self.layer.forward(x)

    model = Direct()
    plain = model(X)
    with (
        pytest.raises(SiteError, match=r"'layer' never fired .*method='forward' sees"),
        capture(model, Site("layer", layout="BH")),
    ):
        model(X)
    site = Site("layer", layout="BH", method="forward")
    with capture(model, site) as captured, edit(model, site, lambda rows: rows * 2) as hook:
        assert torch.equal(model(X), plain * 2)
        assert torch.equal(model.layer(X), plain * 2)  # ordinary calls too, once each
    assert torch.equal(captured[site], torch.cat([plain, plain]))
    assert hook.firings == 2
    assert "forward" not in vars(model.layer)


def test_a_method_that_nobody_calls_is_told():
    model, site = Scorer(), Site("layer", layout="BH", method="extra_repr")
    with (
        pytest.raises(SiteError, match=r"nothing calls Linear.extra_repr\(\) on this object"),
        capture(model, site),
    ):
        model(X)
    assert "extra_repr" not in vars(model.layer)


@pytest.mark.parametrize("name", ["score_item", "weight", "in_features"])
def test_what_is_no_method_is_refused(name):
    model = Scorer()
    with pytest.raises(SiteError, match=f"Linear has no method '{name}'"):
        edit(model, Site("layer", layout="BH", method=name), torch.zeros_like)
    assert hooked(model) == []


# --- methods with watchers ----------------------------------------------------------------------


class Speaker(nn.Module):
    def say(self, text, end="."):
        return text + end


def watch(speaker, word, log=None):
    """Appends a word to what is said."""
    log = [] if log is None else log

    def before(module, args, kwargs):
        log.append(f"before {word}")

    def after(module, args, output):
        log.append(f"after {word}")
        return f"{output} {word}"

    return hook_method(speaker, "say", before=before, after=after)


def test_watchers_of_one_method_act_in_the_order_in_which_they_came():
    speaker, log, words = Speaker(), [], ["one", "two", "three"]
    for word in words:
        watch(speaker, word, log)
    assert speaker.say("so", end="!") == "so! one two three"
    assert log == [f"before {word}" for word in words] + [f"after {word}" for word in words]


def test_what_is_given_before_reaches_the_method_and_the_next_watcher():
    speaker, seen = Speaker(), []
    hook_method(speaker, "say", before=lambda m, args, kw: ((args[0] * 2,), {**kw, "end": "?"}))
    hook_method(speaker, "say", before=lambda m, args, kw: seen.append((m, args, kw)))
    assert speaker.say("so") == "soso?"
    assert seen == [(speaker, ("soso",), {"end": "?"})]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_watchers_go_in_any_order(order):
    speaker, words = Speaker(), ["one", "two", "three"]
    handles = [watch(speaker, word) for word in words]
    for gone in order:
        handles[gone].remove()
        handles[gone].remove()
        words[gone] = ""
        assert speaker.say("so") == " ".join(["so.", *filter(None, words)])
    assert vars(speaker).keys() == vars(Speaker()).keys()
    assert speaker.say.__func__ is Speaker.say


def test_an_attribute_of_the_modules_own_is_given_back():
    speaker = Speaker()
    speaker.say = own = lambda text: text + "~"
    handle = watch(speaker, "one")
    assert speaker.say("so") == "so~ one"
    handle.remove()
    assert vars(speaker)["say"] is own


def test_a_wrapper_that_somebody_put_over_a_watched_method_stays():
    speaker = Speaker()
    first = watch(speaker, "first")
    watched = speaker.say
    speaker.say = wrapper = lambda text: watched(text).upper()
    second = watch(speaker, "second")
    assert speaker.say("so") == "SO. FIRST second"
    first.remove()
    assert speaker.say("so") == "SO. second"
    second.remove()
    assert vars(speaker)["say"] is wrapper
    assert speaker.say("so") == "SO."
    speaker.say = watched  # the wrapper goes as it came
    third = watch(speaker, "third")
    assert speaker.say("so") == "so. third"
    third.remove()
    assert "say" not in vars(speaker)


def test_a_method_that_somebody_replaced_meanwhile_is_not_clobbered():
    speaker = Speaker()
    handle = watch(speaker, "one")
    speaker.say = theirs = lambda text: "theirs"
    handle.remove()
    assert vars(speaker)["say"] is theirs


def test_a_method_that_somebody_gave_back_meanwhile_stays_as_it_is():
    speaker = Speaker()
    handle = watch(speaker, "one")
    del speaker.say
    handle.remove()
    assert speaker.say("so") == "so."


def test_an_exception_in_a_method_leaves_its_watchers_on():
    speaker = Speaker()
    handle = watch(speaker, "one")
    with pytest.raises(TypeError):
        speaker.say(3)
    assert speaker.say("so") == "so. one"
    handle.remove()
    assert "say" not in vars(speaker)


def test_one_module_of_a_class_is_watched_and_not_the_others():
    one, other = Speaker(), Speaker()
    watch(one, "one")
    assert one.say("so") == "so. one"
    assert other.say("so") == "so."


def copied(model, how):
    if how == "deepcopy":
        return copy.deepcopy(model)
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


def negated(users, scale=1.0):
    return -users


class Weighted(Scorer):
    def score_items(self, users, *, scale=1.0):
        return self.layer(users) * scale


each_copy = pytest.mark.parametrize("how", ["deepcopy", "pickle"])


@each_copy
@pytest.mark.parametrize("own", [None, negated], ids=["of the class", "of its own"])
def test_a_copy_has_the_plain_method(how, own):
    model = Scorer()
    if own is not None:
        model.score_items = own
    plain = model(X)
    with edit(model, SCORED, torch.zeros_like) as hook:
        twin = copied(model, how)
        assert not model(X).any()
    assert torch.equal(twin(X), plain)
    assert not isinstance(twin.score_items, WatchedMethod)
    assert hook.firings == 1


@each_copy
def test_the_method_of_a_copy_reads_the_copys_own_weights(how):
    model = Weighted()
    plain = model(X)
    with edit(model, SCORED, torch.zeros_like):
        twin = copied(model, how)
    twin.layer.weight.zero_()
    twin.layer.bias.zero_()
    assert not twin.score_items(X).any()
    assert torch.equal(model(X), plain)


def test_methods_are_not_watched_in_data_parallel():
    """A replica would call the method of the model that it is one of."""
    model = nn.DataParallel(Weighted())
    with pytest.raises(SiteError, match="replicas of DataParallel cannot be watched at a method"):
        edit(model, SCORED, lambda rows: rows)
    assert hooked(model) == []


@each_copy
def test_a_copy_can_be_watched_and_copied_in_its_turn(how):
    model = Scorer()
    with edit(model, SCORED, torch.zeros_like):
        twin = copied(model, how)
    plain = model(X)
    with edit(twin, SCORED, lambda rows: rows + 1) as hook:
        assert torch.equal(twin(X), plain + 1)
        assert torch.equal(copied(twin, how)(X), plain)
    assert hook.firings == 1
    assert torch.equal(twin(X), plain)


# --- ids and lengths ----------------------------------------------------------------------------


class Teller(nn.Module):
    """Takes anything, in its forward and in a method."""

    def forward(self, *args, **kwargs):
        return None

    def note(self, *args, **kwargs):
        return None


class Told(nn.Module):
    """Hands its first argument to one module, and all others to another."""

    def __init__(self, method="__call__"):
        super().__init__()
        self.method = method
        self.teller = Teller()
        self.body = nn.Identity()

    def forward(self, x, *args, **kwargs):
        getattr(self.teller, self.method)(*args, **kwargs)
        return self.body(x)


HIDDEN = torch.arange(1.0, 25.0).reshape(3, 4, 2)
LENGTHS = torch.tensor([3, 0, 4])
OFFSETS = torch.tensor([0, 3, 3, 7])
MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
REST = torch.full((3,), 9)


def check(model, source, args, kwargs):
    """Real rows are read, and user rows written, as LENGTHS say."""
    real = Site("body", positions="real", positions_from=source)
    with capture(model, real) as captured:
        model(HIDDEN, *args, **kwargs)
    assert torch.equal(captured[real], torch.cat([HIDDEN[0, :3], HIDDEN[2]]))
    with edit(model, replace(real, positions="user"), lambda rows: rows + 100):
        edited = model(HIDDEN, *args, **kwargs)
    change = torch.zeros_like(HIDDEN)
    change[0, 2] = change[2, 3] = 100  # the second history has no user position
    assert torch.equal(edited, HIDDEN + change)
    assert hooked(model) == []


@pytest.mark.parametrize(
    ("source", "args", "kwargs"),
    [
        (TokenIds("teller"), (MASK,), {}),
        (TokenIds("teller"), (MASK.int(),), {}),
        (TokenIds("teller"), (LENGTHS, MASK.bool(), MASK.float()), {"ids": MASK}),
        (TokenIds("teller", 7), (torch.where(MASK == 1, 0, 7),), {}),
        (TokenIds("teller", select=(1,)), (1 - MASK, MASK), {}),
        (TokenIds("teller", select=("ids",)), (1 - MASK,), {"ids": MASK}),
        (TokenIds("", select=(1,)), (MASK, 1 - MASK), {}),
        (TokenIds("", select=("batch", "ids")), (), {"batch": {"ids": MASK, "other": REST}}),
    ],
)
def test_ids_that_a_module_takes(source, args, kwargs):
    check(Told(), source, args, kwargs)


@pytest.mark.parametrize(
    ("source", "args", "kwargs"),
    [
        (Lengths("teller"), (LENGTHS,), {}),
        (Lengths("teller"), (LENGTHS.int(),), {}),
        (Lengths("teller"), ("text", MASK.bool(), LENGTHS.float(), LENGTHS), {"rest": REST}),
        (Lengths("teller"), (), {"lengths": LENGTHS}),
        (Lengths("teller"), ({"lengths": LENGTHS},), {}),
        (Lengths("teller", (1,)), (REST, LENGTHS), {}),
        (Lengths("teller", (-1,)), (REST, LENGTHS), {}),
        (Lengths("teller", ("lengths",)), (REST,), {"lengths": LENGTHS}),
        (Lengths("teller", ("batch", "lengths")), (), {"batch": {"lengths": LENGTHS}}),
        (Lengths("teller", (0, 1)), ((REST, LENGTHS),), {}),
        (Lengths("teller", offsets=True), (OFFSETS,), {}),
        (Lengths("teller", ("offsets",), offsets=True), (REST,), {"offsets": OFFSETS}),
        (Lengths("", (1,)), (LENGTHS,), {}),
        (Lengths("", ("lengths",)), (), {"lengths": LENGTHS}),
    ],
)
def test_lengths_that_a_module_takes(source, args, kwargs):
    check(Told(), source, args, kwargs)


@pytest.mark.parametrize(
    ("source", "args", "kwargs"),
    [
        (Lengths("teller", method="note"), (LENGTHS,), {}),
        (Lengths("teller", ("n",), method="note"), (REST,), {"n": LENGTHS}),
        (Lengths("teller", (1,), offsets=True, method="note"), (REST, OFFSETS), {}),
        (RealMask("teller", (0,), method="note"), (MASK,), {}),
        (RealMask("teller", ("m",), padding=True, method="note"), (), {"m": MASK == 0}),
    ],
)
def test_lengths_and_masks_that_a_method_takes(source, args, kwargs):
    model = Told("note")
    check(model, source, args, kwargs)
    assert "note" not in vars(model.teller)


@pytest.mark.parametrize("offsets", [False, True])
def test_lengths_say_where_the_histories_of_a_jagged_tensor_end(offsets):
    model, rows = Told(), torch.arange(1.0, 15.0).reshape(7, 2)
    told = torch.tensor([0, 3, 4, 7] if offsets else [3, 1, 3])
    user = Site("body", layout="jagged", positions_from=Lengths("teller", offsets=offsets))
    real = replace(user, positions="real")
    with capture(model, user, real) as captured:
        model(rows, told)
    assert torch.equal(captured[user], rows[[2, 3, 6]])
    assert torch.equal(captured[real], rows)
    with edit(model, user, torch.zeros_like):
        assert model(rows, told).any(dim=1).nonzero().flatten().tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize(
    ("source", "args", "message"),
    [
        (Lengths("teller"), (), "fired before any lengths were seen at 'teller'"),
        (Lengths("teller"), (LENGTHS.float(),), "fired before any lengths were seen"),
        (Lengths("teller"), (LENGTHS[:2],), r"gives shape \(2,\); expected one length for each"),
        (Lengths("teller", offsets=True), (LENGTHS,), r"gives shape \(3,\); expected one length"),
        (Lengths("teller", (0,)), (MASK,), r"gives shape \(3, 4\); expected one length for each"),
        (Lengths("teller", (1,)), (LENGTHS,), r"positions_from: nothing at select=\(1,\)"),
        (Lengths("teller", ("n",)), (LENGTHS,), r"positions_from: nothing at select=\('n',\)"),
        (Lengths("teller", (0,)), ([3, 0, 4],), "positions_from leads to a list of 3, no tensor"),
        (RealMask("teller", (0,)), (MASK[:2],), r"positions \(3, 4\), but the mask at 'teller' ha"),
        (RealMask("teller", ("m",)), (MASK,), "positions_from: nothing at select"),
        (RealMask("body", (0,)), (MASK,), r"the mask at 'body' has shape \(3, 4, 2\)"),
        (TokenIds("teller"), (LENGTHS,), "fired before module 'teller' saw any token ids"),
        (TokenIds("teller"), (MASK, MASK), r"2 integer tensors enter 'teller'; .* select=\(...\)"),
        (TokenIds("teller", select=(1,)), (MASK,), r"positions_from: nothing at select=\(1,\)"),
        (TokenIds("teller", select=(0,)), (None,), "positions_from leads to a NoneType, no tensor"),
    ],
)
def test_lengths_and_masks_that_do_not_fit_are_told(source, args, message):
    model, site = Told(), Site("body", positions_from=source)
    with pytest.raises(SiteError, match=message) as error, capture(model, site):
        model(HIDDEN, *args)
    assert "site 'body'" in str(error.value)
    assert hooked(model) == []


# --- masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
@pytest.mark.parametrize("padding", [False, True], ids=["true where real", "true at padding"])
@pytest.mark.parametrize("axes", [2, 3])
def test_masks_of_any_kind(dtype, padding, axes):
    mask = ((MASK == 0) if padding else MASK).to(dtype)
    if axes == 3:
        mask = mask.unsqueeze(2)
    check(Told(), RealMask("teller", (0,), padding=padding), (mask,), {})
    check(Told(), RealMask("", ("mask",), padding=padding), (), {"mask": mask})
    check(Told(), RealMask("teller", (0, "mask"), padding=padding), ({"mask": mask},), {})


def test_an_additive_mask_is_a_padding_mask():
    mask = torch.zeros(3, 4).masked_fill(MASK == 0, -torch.inf)
    check(Told(), RealMask("teller", (0,), padding=True), (mask,), {})


@given(
    lengths=st.lists(st.integers(0, 4), min_size=0, max_size=4),
    layout=st.sampled_from(["BLH", "LBH", "BHL"]),
    positions=st.sampled_from(["user", "real"]),
)
def test_ids_lengths_offsets_and_masks_agree(lengths, layout, positions):
    n = torch.tensor(lengths, dtype=torch.int64)
    mask = torch.arange(4) < n[:, None]
    told = {
        TokenIds("teller"): mask.long() * 7,
        TokenIds("teller", pad_id=5): torch.where(mask, 0, 5),
        Lengths("teller"): n,
        Lengths("teller", offsets=True): torch.cat([n.new_zeros(1), n.cumsum(0)]),
        RealMask("teller", (0,)): mask,
        RealMask("teller", (0,), padding=True): ~mask,
    }
    changed = mask
    if positions == "user":
        changed = mask & (torch.arange(4) == n[:, None] - 1)
    x = torch.randn(len(n), 4, 2)
    order = {"BLH": (0, 1, 2), "LBH": (1, 0, 2), "BHL": (0, 2, 1)}[layout]
    wanted = torch.where(changed[..., None], x + 1, x).permute(order)
    model = Told()
    for source, value in told.items():
        site = Site("body", layout=layout, positions=positions, positions_from=source)
        with capture(model, site) as captured, edit(model, site, lambda rows: rows + 1):
            assert torch.equal(model(x.permute(order), value), wanted)
        rows = captured[site]
        if positions == "user":
            rows = rows[n > 0]
        assert torch.equal(rows, x[changed])


# --- Ctrl-C while the hooks are put on ----------------------------------------------------------


@pytest.mark.parametrize("number", range(1, 8))
@pytest.mark.parametrize("before", [True, False], ids=["before", "just after"])
def test_an_interruption_while_hooks_are_put_on_leaves_the_outputs_alone(
    monkeypatch, number, before
):
    """Two sites take seven hooks; one that torch had just registered may stay, and does nothing."""
    model, count = Loop(), 0
    plain = model(IDS)

    def interrupted(register):
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number and before:
                raise KeyboardInterrupt
            handle = register(*args, **kwargs)
            if count == number:
                raise KeyboardInterrupt
            return handle

        return wrapped

    user = Site("body", positions_from=TokenIds("embedding"), call="all")
    everywhere = Site("head", positions="all")
    with monkeypatch.context() as patch:
        for name in ("register_forward_hook", "register_forward_pre_hook"):
            patch.setattr(nn.Module, name, interrupted(getattr(nn.Module, name)))
        with pytest.raises(KeyboardInterrupt), capture(model, user, everywhere):
            pytest.fail("every hook was put on")
    assert len(hooked(model)) <= (0 if before else 1)
    assert torch.equal(model(IDS), plain)
    with capture(model, everywhere) as captured:
        model(IDS)
    assert len(captured[everywhere]) == IDS.numel()


# --- a single history


def test_a_mask_given_as_a_number_reads_the_same_for_one_history_and_for_many():
    site = Site("body", positions_from=RealMask("", ("mask",), padding=1))
    assert site.positions_from.padding is True
    assert Site.from_dict(site.to_dict()) == site
