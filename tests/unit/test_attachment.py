"""An SAE on a live model: strength per request, who is steered, and that nothing stays behind."""

import asyncio
import contextvars
import gc
import threading
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from steerrec.attachment import AttachmentReport, attach
from steerrec.data import Histories
from steerrec.errors import SiteError
from steerrec.handles import FastPathOff
from steerrec.hooks import edit
from steerrec.positions import Firing
from steerrec.sites import Lengths, Site, TokenIds
from steerrec.steering import SteerTransform

from .small_models import (
    ALL,
    IDS,
    REAL,
    USER,
    WIDTH,
    Sequence,
    random_sae,
    random_steering,
    replica_of,
    some_ids,
)
from .toy_models import hooked, tiny_sasrec

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

SAE = random_sae()
STEERING = random_steering()
PLAIN = Sequence()(IDS)


@pytest.fixture
def model():
    return Sequence()


def steps_of(row, positions):
    real = [step for step, token in enumerate(row) if token != 0]
    return {"user": real[-1:], "real": real, "all": range(len(row))}[positions]


def by_hand(ids, alphas, positions="user", steering=STEERING):
    """The output when each user is steered on their own; None is a user who is not."""
    transform, output = SteerTransform(SAE, steering), Sequence()(ids)
    for user, (row, alpha) in enumerate(zip(ids.tolist(), alphas, strict=True)):
        for step in steps_of(row, positions) if alpha is not None else ():
            output[user, step] = transform(output[user, step][None], float(alpha))[0]
    return output


class Failure(Exception):
    pass


def fail(*_):
    raise Failure


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_the_recipe_moves_what_it_steers():
    for alphas in ([1, 0, 0], [0, 1, 0], [0, 0, 1]):
        moved = (by_hand(IDS, alphas) - PLAIN).abs().amax(dim=(1, 2))
        assert [bool(distance > 0.5) for distance in moved] == [bool(alpha) for alpha in alphas]


# --- strength -----------------------------------------------------------------------------------

STRENGTHS = {
    "float": (0.7, [0.7] * 3),
    "int": (-2, [-2] * 3),
    "zero": (0.0, [0.0] * 3),
    "0-d": (torch.tensor(0.7), [0.7] * 3),
    "0-d integer": (torch.tensor(2), [2] * 3),
    "one per user": (torch.tensor([0.0, 2.0, -1.5]), [0.0, 2.0, -1.5]),
    "one per user, float64": (torch.tensor([0.5, 1, 3], dtype=torch.float64), [0.5, 1, 3]),
    "one per user, integers": (torch.tensor([0, 2, -1]), [0, 2, -1]),
    "callable, float": (lambda firing: 0.5 * firing.batch_size, [1.5] * 3),
    "callable, 0-d": (lambda firing: torch.tensor(0.5), [0.5] * 3),
    "callable of the ids": (lambda f: (f.tokens != 0).sum(dim=1) / 2, [1.5, 0.5, 2.0]),
    "callable of the rows": (
        lambda f: f.rows[:, 0].sign(),
        [float(PLAIN[user, step, 0].sign()) for user, step in enumerate([2, 0, 3])],
    ),
}
strengths = pytest.mark.parametrize(("alpha", "alphas"), STRENGTHS.values(), ids=STRENGTHS.keys())


@strengths
def test_strength_of_a_scope(model, alpha, alphas):
    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        with attachment.scope(alpha=alpha):
            close(model(IDS), by_hand(IDS, alphas))
        close(model(IDS), by_hand(IDS, [1, 1, 1]))
    assert torch.equal(model(IDS), PLAIN)


@strengths
def test_strength_of_an_attachment(model, alpha, alphas):
    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        attachment.alpha = alpha
        assert attachment.alpha is alpha
        close(model(IDS), by_hand(IDS, alphas))
        attachment.alpha = 0.3
        close(model(IDS), by_hand(IDS, [0.3] * 3))


def test_what_a_callable_is_given(model):
    seen = []
    with (
        attach(model, SAE, site=REAL, steering=STEERING) as attachment,
        attachment.scope(alpha=lambda firing: seen.append(firing) or 1.0),
    ):
        model(IDS)
    (firing,) = seen
    assert isinstance(firing, Firing)
    assert torch.equal(firing.rows, PLAIN[IDS != 0])
    assert firing.batch_size == 3
    assert torch.equal(firing.tokens, IDS)
    assert firing.owners.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert firing.call == 0
    assert firing.per_row(torch.tensor([5, 6, 7])).tolist() == [5, 5, 5, 6, 7, 7, 7, 7]


@given(
    batch=st.integers(0, 5),
    positions=st.sampled_from([USER, REAL, ALL]),
    splice=st.sampled_from(["delta", "reconstruct"]),
    data=st.data(),
)
def test_a_user_in_a_batch_is_steered_as_that_user_alone(batch, positions, splice, data):
    model, ids = Sequence(), some_ids(batch, seed=batch)
    numbers = st.sampled_from([-3.0, -0.5, 0.0, 0.25, 1.0, 4.0])
    alphas = data.draw(st.lists(numbers, min_size=batch, max_size=batch))
    steering = random_steering(splice=splice)
    with attach(model, SAE, site=positions, steering=steering) as attachment:
        attachment.alpha = torch.tensor(alphas)
        together = model(ids)
        for user, alpha in enumerate(alphas):
            attachment.alpha = alpha
            close(together[user : user + 1], model(ids[user : user + 1]))
    close(together, by_hand(ids, alphas, positions.positions, steering))
    if positions is not ALL:
        assert torch.equal(together[ids == 0], Sequence()(ids)[ids == 0])


def test_strength_per_user_of_a_jagged_tensor():
    class Jagged(nn.Module):
        def __init__(self):
            super().__init__()
            self.pack, self.body = nn.Identity(), nn.Identity()

        def forward(self, rows, lengths):
            self.pack(lengths)
            return self.body(rows)

    model, rows, lengths = Jagged(), torch.randn(7, WIDTH), torch.tensor([3, 1, 3])
    site = Site("body", layout="jagged", positions="real", positions_from=Lengths("pack"))
    alpha = torch.tensor([0.5, -1.0, 2.0])
    with (
        attach(model, SAE, site=site, steering=STEERING) as attachment,
        attachment.scope(alpha=alpha, users=torch.tensor([True, False, True])),
    ):
        steered = model(rows, lengths)
    by_row = torch.tensor([0.5, 0.5, 0.5, 0.0, 2.0, 2.0, 2.0])
    close(steered, SteerTransform(SAE, STEERING)(rows, by_row))
    assert torch.equal(steered[3], rows[3])


# --- who is steered -----------------------------------------------------------------------------

USERS = {
    "mask": torch.tensor([True, False, True]),
    "callable": lambda firing: (firing.tokens != 0).sum(dim=1) > 1,
}


@pytest.mark.parametrize("users", USERS.values(), ids=USERS.keys())
@pytest.mark.parametrize("site", [USER, REAL, ALL], ids=lambda site: site.positions)
@pytest.mark.parametrize("splice", ["delta", "reconstruct"])
def test_users_who_are_not_asked_for_stay_bit_for_bit(model, users, site, splice):
    site = replace(site, positions_from=USER.positions_from)
    steering = random_steering(splice=splice)
    with (
        attach(model, SAE, site=site, steering=steering) as attachment,
        attachment.scope(users=users, alpha=torch.tensor([2.0, 3.0, -1.0])),
    ):
        steered = model(IDS)
    assert torch.equal(steered[1], PLAIN[1])
    close(steered, by_hand(IDS, [2.0, None, -1.0], site.positions, steering))


def test_nobody_and_everybody(model):
    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        everybody = model(IDS)
        with attachment.scope(users=torch.zeros(3, dtype=torch.bool)):
            assert torch.equal(model(IDS), PLAIN)
        with attachment.scope(users=torch.ones(3, dtype=torch.bool)):
            assert torch.equal(model(IDS), everybody)


# --- scopes -------------------------------------------------------------------------------------


def test_a_scope_turns_steering_off_and_on(model):
    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        on = model(IDS)
        with attachment.scope(enabled=False):
            assert torch.equal(model(IDS), PLAIN)
            with attachment.scope(enabled=True):
                assert torch.equal(model(IDS), on)
            assert torch.equal(model(IDS), PLAIN)
        attachment.enabled = False
        assert torch.equal(model(IDS), PLAIN)
        with attachment.scope(enabled=True):
            assert torch.equal(model(IDS), on)
        attachment.enabled = True
        assert torch.equal(model(IDS), on)


def test_a_scope_of_an_attachment_that_only_observes_steers_nothing(model):
    with attach(model, SAE, site=USER) as attachment, attachment.scope(alpha=3.0, enabled=True):
        assert torch.equal(model(IDS), PLAIN)


def test_an_inner_scope_takes_from_the_outer_one_what_it_does_not_set(model):
    one, two = torch.tensor([True, True, False]), torch.tensor([False, True, True])
    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        attachment.alpha = 0.5
        with attachment.scope(users=one):
            close(model(IDS), by_hand(IDS, [0.5, 0.5, None]))
            with attachment.scope(alpha=2.0):
                close(model(IDS), by_hand(IDS, [2.0, 2.0, None]))
                with attachment.scope(users=two, enabled=False):
                    assert torch.equal(model(IDS), PLAIN)
                    with attachment.scope(enabled=True, alpha=torch.tensor([1.0, 2.0, 3.0])):
                        close(model(IDS), by_hand(IDS, [None, 2.0, 3.0]))
                close(model(IDS), by_hand(IDS, [2.0, 2.0, None]))
            attachment.alpha = -1.0
            close(model(IDS), by_hand(IDS, [-1.0, -1.0, None]))
        close(model(IDS), by_hand(IDS, [-1.0, -1.0, -1.0]))


def test_a_scope_is_of_one_attachment(model):
    with (
        attach(model, SAE, site=USER, steering=STEERING) as one,
        attach(model, SAE, site=USER, steering=STEERING) as other,
    ):
        with one.scope(enabled=False), other.scope(alpha=0.25):
            close(model(IDS), by_hand(IDS, [0.25] * 3))
        with one.scope(alpha=0.25), other.scope(enabled=False):
            close(model(IDS), by_hand(IDS, [0.25] * 3))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_scopes_end_with_an_exception(model, error):
    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        on = model(IDS)
        with (
            pytest.raises(error),
            attachment.scope(alpha=2.0),
            attachment.scope(users=torch.tensor([True, False, False])),
        ):
            raise error
        assert torch.equal(model(IDS), on)
        with pytest.raises(SiteError), attachment.scope(alpha=torch.ones(7)):
            model(IDS)
        assert torch.equal(model(IDS), on)


def outputs(attachment, model, alpha):
    with attachment.scope(alpha=alpha):
        while True:
            yield model(IDS)


def test_a_generator_that_is_closed_early_ends_its_scope(model):
    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        on = model(IDS)
        generator = outputs(attachment, model, 0.25)
        close(next(generator), by_hand(IDS, [0.25] * 3))
        generator.close()
        assert torch.equal(model(IDS), on)
        generator = outputs(attachment, model, 0.25)
        next(generator)
        del generator  # as a loop that breaks does
        assert torch.equal(model(IDS), on)


def test_generators_end_their_scopes_in_any_order(model):
    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        on = model(IDS)
        first, second = (outputs(attachment, model, alpha) for alpha in (0.25, 4.0))
        next(first)
        close(next(second), by_hand(IDS, [4.0] * 3))
        first.close()
        close(model(IDS), by_hand(IDS, [4.0] * 3))
        second.close()
        assert torch.equal(model(IDS), on)


def test_a_generator_may_be_closed_in_another_context(model):
    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        on = model(IDS)
        generator = outputs(attachment, model, 0.25)
        contextvars.copy_context().run(next, generator)
        assert torch.equal(model(IDS), on)
        generator.close()
        assert torch.equal(model(IDS), on)


def test_an_async_generator_that_a_task_leaves_ends_its_scope(model):
    async def stream(attachment):
        with attachment.scope(alpha=0.25):
            while True:
                yield model(IDS)

    async def request(attachment):
        async for output in stream(attachment):
            close(output, by_hand(IDS, [0.25] * 3))
            break
        for _ in range(3):
            await asyncio.sleep(0)  # lets the loop close the generator
        return model(IDS)

    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        on = model(IDS)
        assert torch.equal(asyncio.run(request(attachment)), on)


def test_tasks_do_not_see_each_others_scopes(model):
    async def request(attachment, alpha):
        with attachment.scope(alpha=alpha):
            await asyncio.sleep(0)
            first = model(IDS)
            with attachment.scope(users=torch.tensor([alpha > 1, True, True])):
                await asyncio.sleep(0)
                second = model(IDS)
            await asyncio.sleep(0)
            return first, second, model(IDS)

    async def requests(attachment):
        return await asyncio.gather(*(request(attachment, alpha) for alpha in (0.5, 2.0, -1.0)))

    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        for alpha, found in zip((0.5, 2.0, -1.0), asyncio.run(requests(attachment)), strict=True):
            first, second, third = found
            close(first, by_hand(IDS, [alpha] * 3))
            close(second, by_hand(IDS, [alpha if alpha > 1 else None, alpha, alpha]))
            assert torch.equal(first, third)


def test_a_task_and_a_worker_thread_take_over_the_scope_that_they_are_started_in(model):
    async def requests(attachment):
        with attachment.scope(alpha=0.25):
            return await asyncio.gather(
                asyncio.to_thread(model, IDS), asyncio.create_task(request())
            )

    async def request():
        return model(IDS)

    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        for found in asyncio.run(requests(attachment)):
            close(found, by_hand(IDS, [0.25] * 3))


# --- threads ------------------------------------------------------------------------------------


def in_threads(*functions):
    """What functions return that run at the same time, each in a thread."""
    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result() for future in [pool.submit(function) for function in functions]]


class Meeting(nn.Module):
    """Where all threads wait for each other."""

    barrier = None

    def forward(self, x):
        if self.barrier is not None:
            self.barrier.wait()
        return x


class MeetingSequence(Sequence):
    """All threads are in the middle of a forward before any of them comes to the site."""

    def __init__(self):
        super().__init__()
        self.meeting = Meeting()

    def encode(self, ids):
        return self.norm(torch.relu(self.meeting(self.layer(self.embedding(ids)))))


def serve(model, attachment, requests, *, turns, under):
    """What each request gives at each of its turns, alone or with others at the same time.

    A request is its ids and the strengths that it asks for in turn.
    """
    barrier = threading.Barrier(len(requests), timeout=30)
    model.meeting.barrier = barrier

    def answers(ids, alphas):
        found = []
        try:
            for turn in range(turns):
                with under(alphas[turn % len(alphas)]):
                    output = model(ids)
                    barrier.wait()
                    found.append((output, attachment.latents.dense(32)))
        except BaseException:
            barrier.abort()
            raise
        return found

    return in_threads(*(partial(answers, *request) for request in requests))


REQUESTS = [
    (some_ids(3, seed=1), [0.5, torch.tensor([1.0, 0.0, 2.0])]),
    (some_ids(3, seed=2), [-1.5, lambda firing: 4.0, 0.0]),
]


def mixed(alone, together):
    """At how many turns a request got something else than when it was alone."""
    pairs = [pair for (a,), b in zip(alone, together, strict=True) for pair in zip(a, b, strict=1)]
    return sum(not (torch.equal(o, p) and torch.equal(m, n)) for (o, m), (p, n) in pairs)


def test_threads_that_steer_one_model_do_not_mix():
    model, turns = MeetingSequence(), 300
    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        go = partial(
            serve, model, attachment, turns=turns, under=lambda a: attachment.scope(alpha=a)
        )
        alone = [go([request]) for request in REQUESTS]
        together = go(REQUESTS)
    assert [len(found) for found in together] == [turns, turns]
    assert mixed(alone, together) == 0


def test_threads_that_set_the_strength_of_the_attachment_do_mix():
    """What the test above would show of a strength that all threads share."""
    model = MeetingSequence()
    with attach(model, SAE, site=USER, steering=STEERING) as attachment:

        def under(alpha):
            attachment.alpha = alpha
            return nullcontext()

        go = partial(serve, model, attachment, turns=20, under=under)
        alone = [go([request]) for request in REQUESTS]
        assert mixed(alone, go(REQUESTS)) > 0


def test_a_thread_does_not_see_the_scope_of_the_one_that_starts_it(model):
    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        on = model(IDS)
        with attachment.scope(enabled=False):
            (found,) = in_threads(lambda: model(IDS))
        assert torch.equal(found, on)
        attachment.alpha = 0.25  # this, every thread sees
        (found,) = in_threads(lambda: model(IDS))
        close(found, by_hand(IDS, [0.25] * 3))


def test_the_replicas_of_data_parallel_are_steered_without_scopes(model):
    """They run in threads of their own, each with a part of the batch."""
    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        replicas = [partial(replica_of(model), ids) for ids in (IDS[:2], IDS[2:])]
        with attachment.scope(alpha=5.0):
            close(torch.cat(in_threads(*replicas)), by_hand(IDS, [1.0] * 3))
        attachment.alpha = 0.25
        close(torch.cat(in_threads(*replicas)), by_hand(IDS, [0.25] * 3))
        attachment.alpha = torch.tensor([0.25, 1.0, 2.0])
        with pytest.raises(SiteError, match="3 values for a batch of 2 histories"):
            in_threads(*replicas)


def test_latents_are_those_of_the_thread(model):
    one, other = some_ids(2, seed=3), some_ids(4, seed=4)
    with attach(model, SAE, site=USER) as attachment:
        model(one)
        mine = attachment.latents

        def elsewhere():
            with pytest.raises(SiteError, match="run the model first"):
                attachment.latents  # noqa: B018
            model(other)
            return attachment.latents

        (theirs,) = in_threads(elsewhere)
        assert len(theirs.values) == 4
        assert torch.equal(attachment.latents.dense(32), mine.dense(32))
        expected = SAE.encode(Sequence()(other)[torch.arange(4), (other != 0).sum(dim=1) - 1])
        assert torch.equal(theirs.dense(32), expected.dense(32))


# --- what is refused ----------------------------------------------------------------------------

BAD_STRENGTHS = [
    ("strong", "alpha is 'strong'; expected a finite number"),
    (True, "alpha is True; expected a finite number"),
    (float("nan"), "alpha is nan; expected a finite number"),
    (float("-inf"), "alpha is -inf; expected a finite number"),
    ([0.5, 1.0, 2.0], r"alpha is \[0.5, 1.0, 2.0\]; expected a finite number, a tensor"),
    (1j, "alpha is 1j; expected a finite number"),
    (torch.tensor([1.0, float("nan"), 0.0]), r"alpha is a tensor \(3,\); expected one finite"),
    (torch.tensor(float("inf")), r"alpha is a tensor \(\); expected one finite number"),
    (torch.ones(3, 1), r"alpha is a tensor \(3, 1\); expected .* one per history"),
]
bad_strengths = pytest.mark.parametrize(("alpha", "message"), BAD_STRENGTHS, ids=str)


@bad_strengths
def test_a_strength_that_is_none_is_refused(model, alpha, message):
    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        on = model(IDS)
        with pytest.raises(SiteError, match=message), attachment.scope(alpha=alpha):
            model(IDS)
        with pytest.raises(SiteError, match=message):
            attachment.alpha = alpha
        with pytest.raises(SiteError, match=message), attachment.scope(alpha=lambda _: alpha):
            model(IDS)
        assert attachment.alpha == 1.0
        assert torch.equal(model(IDS), on)


@bad_strengths
def test_a_recipe_of_no_strength_never_touches_the_model(model, alpha, message):
    with pytest.raises(SiteError, match=message):
        attach(model, SAE, site=USER, steering=replace(STEERING, alpha=alpha))
    assert hooked(model) == []


def test_a_recipe_of_no_strength_leaves_the_one_in_force(model):
    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        on = model(IDS)
        with pytest.raises(SiteError, match="alpha is nan"):
            attachment.steering = random_steering(seed=9, alpha=float("nan"))
        assert attachment.steering is STEERING
        assert torch.equal(model(IDS), on)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": torch.ones(2)}, "2 values for a batch of 3 histories"),
        ({"alpha": torch.ones(1)}, "1 values for a batch of 3 histories"),
        ({"alpha": lambda _: torch.ones(4)}, "4 values for a batch of 3 histories"),
        ({"alpha": lambda _: None}, "alpha is None; expected a finite number"),
        ({"users": torch.ones(2, dtype=torch.bool)}, "2 values for a batch of 3 histories"),
        ({"users": torch.ones(3, 4, dtype=torch.bool)}, r"users is a torch.bool tensor \(3, 4\)"),
        ({"users": torch.tensor(True)}, r"users is a torch.bool tensor \(\); expected a boolean"),
        ({"users": torch.tensor([1, 0, 1])}, r"users is a torch.int64 tensor \(3,\); expected a b"),
        ({"users": lambda _: torch.ones(3)}, r"users is a torch.float32 tensor \(3,\); expected"),
        ({"users": [True, False, True]}, "users is a list of 3; expected a boolean tensor"),
        ({"users": lambda _: True}, "users is a bool; expected a boolean tensor"),
    ],
    ids=str,
)
@pytest.mark.parametrize("site", [USER, REAL, ALL], ids=lambda site: site.positions)
def test_what_does_not_fit_the_batch_is_told(model, site, settings, message):
    with attach(model, SAE, site=site, steering=STEERING) as attachment:
        on = model(IDS)
        with pytest.raises(SiteError, match=message), attachment.scope(**settings):
            model(IDS)
        assert torch.equal(model(IDS), on)


def test_an_attachments_strength_that_does_not_fit_the_batch_is_told(model):
    with attach(model, SAE, site=USER, steering=STEERING) as attachment:
        attachment.alpha = torch.ones(2)
        with pytest.raises(SiteError, match="2 values for a batch of 3 histories"):
            model(IDS)
        close(model(IDS[:2]), by_hand(IDS[:2], [1, 1]))


# --- several attachments ------------------------------------------------------------------------


def recipes(count):
    return [
        (random_sae(seed=seed), random_steering(seed=seed, splice=splice, alpha=alpha))
        for seed, splice, alpha in zip(
            range(1, count + 1), ["delta", "reconstruct", "delta"], [1.0, 0.5, -2.0], strict=False
        )
    ]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_attachments_on_one_site_act_in_the_order_in_which_they_were_made(model, order):
    made = [recipes(3)[i] for i in order]
    last = (torch.arange(3), torch.tensor([2, 0, 3]))
    with ExitStack() as stack:
        attachments = [
            stack.enter_context(attach(model, sae, site=USER, steering=steering))
            for sae, steering in made
        ]
        rows, latents = PLAIN[last], []
        for sae, steering in made:
            latents.append(sae.encode(rows).dense(32))
            rows = SteerTransform(sae, steering)(rows)
        output = model(IDS)
        close(output[last], rows)
        for attachment, seen in zip(attachments, latents, strict=True):
            close(attachment.latents.dense(32), seen)
        attachments[1].remove()
        rows = PLAIN[last]
        for sae, steering in (made[0], made[2]):
            rows = SteerTransform(sae, steering)(rows)
        close(model(IDS)[last], rows)
    assert torch.equal(model(IDS), PLAIN)
    assert hooked(model) == []


def test_attachments_on_several_sites_of_one_model(model):
    (one, at_layer), (two, at_norm), (three, at_input) = recipes(3)
    layer = Site("layer", positions="real", positions_from=USER.positions_from)
    norm_input = replace(USER, at="input")
    with (
        attach(model, two, site=USER, steering=at_norm),
        attach(model, one, site=layer, steering=at_layer),
        attach(model, three, site=norm_input, steering=at_input),
    ):
        output = model(IDS)
    last = (torch.arange(3), torch.tensor([2, 0, 3]))
    hidden = model.layer(model.embedding(IDS))
    hidden[IDS != 0] = SteerTransform(one, at_layer)(hidden[IDS != 0])
    hidden = torch.relu(hidden)
    hidden[last] = SteerTransform(three, at_input)(hidden[last])
    hidden = model.norm(hidden)
    hidden[last] = SteerTransform(two, at_norm)(hidden[last])
    close(output, hidden)


def test_attachments_and_edits_act_in_the_order_in_which_they_were_made(model):
    last = (torch.arange(3), torch.tensor([2, 0, 3]))
    transform = SteerTransform(SAE, STEERING)
    with edit(model, USER, lambda rows: rows * 2), attach(model, SAE, site=USER, steering=STEERING):
        close(model(IDS)[last], transform(PLAIN[last] * 2))
    with attach(model, SAE, site=USER, steering=STEERING), edit(model, USER, lambda rows: rows * 2):
        close(model(IDS)[last], transform(PLAIN[last]) * 2)


# --- observing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("site", [USER, REAL, ALL], ids=lambda site: site.positions)
@pytest.mark.parametrize(
    "how", ["no recipe", "disabled", "disabled in a scope", "recipe taken off"]
)
def test_observing_leaves_the_very_same_objects(model, site, how):
    emitted, kept = [], []
    model.norm.register_forward_hook(lambda _, __, output: emitted.append(output))
    with attach(model, SAE, site=site, steering=None if how == "no recipe" else STEERING) as found:
        model.norm.register_forward_hook(lambda _, __, output: kept.append(output))
        found.enabled = how != "disabled"
        if how == "recipe taken off":
            found.steering = None
        with found.scope(enabled=False if how == "disabled in a scope" else None):
            output = model(IDS)
        assert output is kept[0] is emitted[0]
        rows = {"user": PLAIN[[0, 1, 2], [2, 0, 3]], "real": PLAIN[IDS != 0], "all": PLAIN}
        expected = SAE.encode(rows[site.positions].reshape(-1, WIDTH))
        assert torch.equal(found.latents.dense(32), expected.dense(32))
    assert torch.equal(output, PLAIN)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("site", [USER, REAL, ALL], ids=lambda site: site.positions)
def test_what_was_observed_stays_when_the_model_writes_to_its_tensors_later(model, site, batch):
    with attach(model, SAE, site=site) as attachment:
        output = model(IDS[:batch])
        before = attachment.latents
        output.zero_()
        assert torch.equal(attachment.latents.dense(32), before.dense(32))


# --- the report ---------------------------------------------------------------------------------


def test_the_report_says_how_it_went(model):
    site = Site("*orm", positions_from=USER.positions_from)
    with attach(model, SAE, site=site, steering=STEERING) as attachment:
        expected = AttachmentReport(
            site=USER,
            firings=0,
            used=0,
            shape=None,
            steering="steering",
            alpha=1.0,
            enabled=True,
            mha_fast_path_off=False,
            compiled=False,
        )
        assert attachment.report() == expected
        model(IDS)
        model(IDS[:2])
        expected = replace(expected, firings=2, used=2, shape=(2, 4, WIDTH))
        assert attachment.report() == expected
        with attachment.scope(alpha=0.25, enabled=False):
            assert attachment.report() == expected
        attachment.enabled, attachment.alpha = False, 3
        assert attachment.report() == replace(expected, enabled=False, alpha=3)
        attachment.steering = replace(STEERING, name="other", alpha=0.5)
        assert attachment.report() == replace(expected, enabled=False, steering="other", alpha=0.5)
        attachment.steering = None
        assert attachment.report().steering is None
        assert attachment.firings == 2
    assert attachment.report().firings == 2


def test_the_report_tells_firings_that_count_from_those_that_do_not():
    model = nn.Sequential(nn.Linear(3, WIDTH), norm := nn.LayerNorm(WIDTH), norm, norm)
    site = Site("1", layout="BH", call=1)
    with attach(model, SAE, site=site, steering=STEERING) as attachment:
        model(torch.ones(2, 3))
    assert (attachment.report().firings, attachment.report().used) == (3, 1)
    assert attachment.report().shape == (2, WIDTH)


# --- the end of the block -----------------------------------------------------------------------


class Unused(Sequence):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(WIDTH, WIDTH)


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("site", [Site("unused", layout="BH"), replace(USER, path="unused")])
def test_a_site_that_did_not_fire_while_the_model_ran_is_an_error(site, no_warnings):
    model = Unused()
    with (
        pytest.raises(SiteError, match="'unused' never fired while Unused scored"),
        attach(model, SAE, site=site),
    ):
        model(IDS)
    assert hooked(model) == []


def test_a_bypassed_root_is_known_by_its_token_ids(no_warnings):
    model = Unused()
    with (
        pytest.raises(SiteError, match="'unused' never fired"),
        attach(model, SAE, site=replace(USER, path="unused")),
    ):
        model.encode(IDS)


def test_a_call_that_never_counted_is_an_error(model, no_warnings):
    with (
        pytest.raises(SiteError, match="fired 1 times, but never as the call=1 that counts"),
        attach(model, SAE, site=replace(USER, call=1)),
    ):
        model(IDS)


@pytest.mark.parametrize("steering", [None, STEERING])
def test_a_model_that_was_not_run_is_worth_a_warning(model, steering):
    with (
        pytest.warns(UserWarning, match="'norm' saw nothing: the model was not run") as warned,
        attach(model, SAE, site=USER, steering=steering),
    ):
        pass
    assert warned[0].filename == __file__


def test_a_recommender_that_was_probed_may_go_without_a_run(no_warnings):
    rec = tiny_sasrec()
    with attach(rec, random_sae()) as attachment:
        pass
    assert attachment.firings == 0
    with attach(rec, random_sae()):
        rec.score(rec.make_batch(Histories.from_lists([[1, 2]])))


def test_the_probe_neither_fires_nor_steers_what_is_attached(no_warnings):
    rec = tiny_sasrec()
    with attach(rec, random_sae(), steering=STEERING) as first, attach(rec, random_sae(seed=1)):
        assert first.firings == 1  # it has seen the probe of the second
        with pytest.raises(SiteError, match="has not fired"):
            _ = first.latents


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_the_block_is_the_one_that_is_seen(error, no_warnings):
    model = Unused()
    with pytest.raises(error, match="in the block"), attach(model, SAE, site=USER):
        raise error("in the block")
    model.layer.register_forward_hook(fail)
    with pytest.raises(Failure), attach(model, SAE, site=Site("unused", layout="BH")):
        model(IDS)
    assert hooked(model) == ["layer"]


def test_a_block_in_which_the_site_fired_is_silent(model, no_warnings):
    with attach(model, SAE, site=USER):
        model(IDS)
    attachment = attach(model, SAE, site=USER)
    attachment.remove()  # taken off by hand: nobody asked


# --- dtypes and sizes ---------------------------------------------------------------------------

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("site", [USER, REAL, ALL], ids=lambda site: site.positions)
@pytest.mark.parametrize("splice", ["delta", "reconstruct"])
def test_the_host_keeps_its_dtype_and_device(model, dtype, site, splice):
    model.to(dtype)
    plain, steering = model(IDS), random_steering(splice=splice)
    with attach(model, SAE, site=site, steering=steering) as attachment:
        steered = model(IDS)
        with attachment.scope(alpha=torch.tensor([1.0, 0.0, 2.0]), users=USERS["mask"]):
            masked = model(IDS)
    assert steered.dtype == masked.dtype == plain.dtype == dtype
    assert steered.device == plain.device
    transform, expected = SteerTransform(SAE, steering), plain.clone()
    cells = [(u, s) for u, row in enumerate(IDS.tolist()) for s in steps_of(row, site.positions)]
    index = tuple(torch.tensor(cells).T)
    expected[index] = transform(plain[index])
    torch.testing.assert_close(steered, expected, atol=1e-3, rtol=1e-2)
    assert not torch.equal(steered, plain)
    untouched = torch.ones(IDS.shape, dtype=torch.bool)
    untouched[index] = False
    assert torch.equal(steered[untouched], plain[untouched])
    assert torch.equal(masked[1], plain[1])
    assert all(parameter.dtype == torch.float32 for parameter in SAE.parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_latents_do_not_depend_on_the_hosts_dtype(model, dtype):
    model.to(dtype)
    with attach(model, SAE, site=USER) as attachment:
        model(IDS)
    rows = model(IDS)[[0, 1, 2], [2, 0, 3]].float()
    assert attachment.latents.values.dtype == torch.float32
    assert torch.equal(attachment.latents.dense(32), SAE.encode(rows).dense(32))


def test_under_autocast_the_sae_computes_in_its_own_dtype(model):
    transform, last = SteerTransform(SAE, STEERING), (torch.arange(3), torch.tensor([2, 0, 3]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(IDS)
        with attach(model, SAE, site=USER, steering=STEERING):
            steered = model(IDS)
    assert steered.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(steered[last], transform(plain[last]), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("site", [USER, REAL, ALL], ids=lambda site: site.positions)
@pytest.mark.parametrize("splice", ["delta", "reconstruct"])
def test_small_batches(model, batch, site, splice):
    ids, steering = some_ids(batch, seed=5), random_steering(splice=splice)
    with attach(model, SAE, site=site, steering=steering) as attachment:
        close(model(ids), by_hand(ids, [1.0] * batch, site.positions, steering))
        rows = {"user": batch, "real": int((ids != 0).sum()), "all": ids.numel()}
        assert attachment.latents.values.shape == (rows[site.positions], SAE.k)
        with attachment.scope(alpha=torch.full((batch,), 2.0)):
            close(model(ids), by_hand(ids, [2.0] * batch, site.positions, steering))
        with attachment.scope(users=torch.zeros(batch, dtype=torch.bool)):
            assert torch.equal(model(ids), Sequence()(ids))
        with attachment.scope(alpha=lambda firing: torch.ones(firing.batch_size)):
            assert model(ids).shape == (batch, 4, WIDTH)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_history_without_items_is_never_touched(model, batch):
    ids = torch.tensor([[0, 0, 0, 0], [1, 2, 0, 0]])[:batch]
    with attach(model, SAE, site=USER, steering=STEERING):
        steered = model(ids)
    close(steered, by_hand(ids, [1.0] * batch))
    assert torch.equal(steered[0], model(ids)[0])


# --- torch's fast path for multi-head attention -------------------------------------------------


class Encoder(nn.Module):
    """torch's own encoder, which has a fast path, between modules that have none."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embedding = nn.Embedding(12, WIDTH, padding_idx=0)
            layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)
            self.norm = nn.LayerNorm(WIDTH)
        self.eval().requires_grad_(False)

    def forward(self, ids):
        x = self.encoder(self.embedding(ids), src_key_padding_mask=ids == 0)
        return self.norm(x[:, : ids.shape[1]])


INSIDE = Site("encoder.layers.1", positions_from=USER.positions_from)
DEEP_INSIDE = Site("encoder.layers.0.linear2", positions="all")
OUTSIDE = replace(USER, path="norm")


def is_on():
    return torch.backends.mha.get_fastpath_enabled()


@pytest.fixture
def fast_path():
    """Nothing that a test does to the switch stays."""
    assert is_on()
    assert FastPathOff._count == 0
    yield
    gc.collect()
    stayed, left = is_on(), FastPathOff._count
    torch.backends.mha.set_fastpath_enabled(True)
    assert (stayed, left) == (True, 0)


@pytest.fixture
def slow_output(fast_path):
    torch.backends.mha.set_fastpath_enabled(False)
    output = Encoder()(IDS)
    torch.backends.mha.set_fastpath_enabled(True)
    return output


@pytest.mark.parametrize("site", [INSIDE, DEEP_INSIDE], ids=lambda site: site.path)
def test_observing_inside_an_encoder_layer_equals_the_model_without_the_fast_path(
    slow_output, site
):
    model = Encoder()
    with attach(model, SAE, site=site) as attachment:
        assert torch.equal(model(IDS), slow_output)
        assert attachment.report().mha_fast_path_off
        assert not is_on()
    assert attachment.firings == 1
    assert is_on()
    torch.testing.assert_close(model(IDS)[IDS != 0], slow_output[IDS != 0])


def test_where_the_site_does_not_need_it_the_switch_is_left_alone(fast_path):
    model = Encoder()
    plain = model(IDS)
    for site in (OUTSIDE, Site("embedding", positions="all"), Site("encoder", positions="all")):
        with attach(model, SAE, site=site) as attachment:
            assert is_on()
            assert torch.equal(model(IDS), plain)
            assert not attachment.report().mha_fast_path_off


@pytest.mark.parametrize("asked", [False, True])
def test_the_switch_does_as_it_is_told(fast_path, asked):
    model = Encoder()
    with attach(model, SAE, site=OUTSIDE, mha_fast_path=asked) as attachment:
        model(IDS)
        assert is_on() == asked
        assert attachment.report().mha_fast_path_off != asked
    assert is_on()


def test_the_last_one_to_go_turns_the_fast_path_on_again(fast_path):
    model, other = Encoder(), Encoder()
    outer = attach(model, SAE, site=INSIDE)
    with edit(other, DEEP_INSIDE, torch.clone):
        with attach(model, SAE, site=OUTSIDE):
            assert not is_on()
            model(IDS)
        outer.remove()
        assert not is_on()
        outer.remove()
        assert not is_on()
    assert is_on()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_turns_the_fast_path_on_again(fast_path, error):
    model = Encoder()

    def fail(*_):
        raise error("stop")

    with pytest.raises(error, match="stop"), attach(model, SAE, site=INSIDE):
        raise error("stop")
    assert is_on()
    model.norm.register_forward_hook(fail)
    with pytest.raises(error, match="stop"), attach(model, SAE, site=INSIDE):
        model(IDS)
    assert is_on()
    bad = replace(INSIDE, positions_from=TokenIds("nowhere"))
    with pytest.raises(SiteError, match="no module 'nowhere'"):
        attach(model, SAE, site=bad)
    assert is_on()


def test_a_model_that_is_thrown_away_with_its_attachment_gives_the_fast_path_back(fast_path):
    model = Encoder()
    attachment = attach(model, SAE, site=INSIDE)
    model(IDS)
    assert not is_on()
    del attachment
    gc.collect()
    assert not is_on()  # it is on the model still
    del model
    gc.collect()
    assert is_on()


def test_a_fast_path_that_was_off_before_stays_off(fast_path):
    torch.backends.mha.set_fastpath_enabled(False)
    model = Encoder()
    with attach(model, SAE, site=INSIDE):
        model(IDS)
    assert not is_on()
    torch.backends.mha.set_fastpath_enabled(True)


def test_steering_inside_an_encoder_layer(slow_output):
    model = Encoder()
    first, second = model.encoder.layers
    torch.backends.mha.set_fastpath_enabled(False)
    hidden = model.embedding(IDS)
    for layer in (first, second):
        hidden = layer(hidden, src_key_padding_mask=IDS == 0)
    torch.backends.mha.set_fastpath_enabled(True)
    last = (torch.arange(3), torch.tensor([2, 0, 3]))
    hidden[last] = SteerTransform(SAE, STEERING)(hidden[last])
    with attach(model, SAE, site=INSIDE, steering=STEERING):
        steered = model(IDS)
    close(steered, model.norm(hidden))
    rest = torch.ones(IDS.shape, dtype=torch.bool)
    rest[last] = False
    assert torch.equal(steered[rest], slow_output[rest])


# --- nothing stays ------------------------------------------------------------------------------


def state_of(model):
    """All that hooks leave on modules, and the attributes of each."""
    kinds = [kind for kind in vars(nn.Module()) if "hooks" in kind]
    return [
        (
            {kind: dict(getattr(module, kind)) for kind in kinds if getattr(module, kind)},
            set(vars(module)),
        )
        for module in model.modules()
    ]


def cycle(model, turn):
    """Attach, use and remove, in a way that depends on the turn; every other time it fails."""
    layer = model.encoder.layers[0]
    site = [INSIDE, OUTSIDE, DEEP_INSIDE, replace(OUTSIDE, path="", method="forward")][turn % 4]
    try:
        with attach(model, SAE, site=site, steering=STEERING if turn % 3 else None) as attachment:
            if turn % 8 == 0:
                with attachment.scope(alpha=2.0):
                    model(IDS)
            if turn % 16 == 2:
                with layer.norm1.register_forward_hook(fail):
                    model(IDS)
            if turn % 2:
                raise Failure
    except Failure:
        pass


@pytest.mark.filterwarnings("ignore:.* saw nothing")  # some turns do not run the model
@pytest.mark.parametrize("cycles", [800, pytest.param(10_000, marks=pytest.mark.slow)])
def test_attaching_again_and_again_leaves_nothing_behind(fast_path, cycles):
    model = Encoder()
    plain, found = model(IDS), state_of(model)
    for turn in range(200):  # what is made once
        cycle(model, turn)
    gc.collect()
    objects = len(gc.get_objects())
    traced = []
    tracemalloc.start()
    try:
        for _ in range(4):
            for turn in range(100):
                cycle(model, turn)
            gc.collect()
            traced.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    grown = [after - before for before, after in pairwise(traced)]
    assert min(grown) < 5_000  # bytes; a table may grow once, a leak grows each time
    for turn in range(cycles - 600):
        cycle(model, turn)
    gc.collect()
    assert len(gc.get_objects()) - objects < 200
    assert state_of(model) == found
    assert is_on()
    assert torch.equal(model(IDS), plain)
