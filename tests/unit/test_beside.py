"""`beside`: parts of one job in several threads."""

import contextlib
import gc
import os
import signal
import threading
import weakref
from functools import partial

import pytest
import torch

from steerrec import beside as module
from steerrec.autoencoder import SparseAutoencoder
from steerrec.beside import beside, shares
from steerrec.steering import Steering, SteerTransform

WIDTH, LATENTS, K = 16, 256, 8


@pytest.fixture
def threads(monkeypatch):
    """Set how many threads torch uses, for one test."""
    monkeypatch.setattr(module, "_MOST", 64)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("number", "rows", "expected"),
    [
        (1, 100, [range(100)]),
        (2, 100, [range(50), range(50, 100)]),
        (3, 100, [range(33), range(33, 66), range(66, 100)]),
        (4, 70, [range(35), range(35, 70)]),  # of 32 at least
        (4, 31, [range(31)]),
        (2, 0, [range(0)]),
    ],
)
def test_shares(threads, number, rows, expected):
    threads(number)
    assert shares(rows, 32) == expected


def test_calls_run_at_the_same_time_in_threads_of_their_own():
    both = threading.Barrier(2, timeout=60)

    def meet():
        both.wait()
        return threading.get_ident()

    here, there = beside([meet, meet])
    assert here == threading.get_ident() != there


def test_results_come_in_the_order_of_the_calls():
    assert beside([partial(pow, 2, n) for n in range(9)]) == [2**n for n in range(9)]


class Nobody:
    """A pool whose threads are all busy."""

    def __init__(self):
        self.waiting = []

    def hand_over(self, turn):
        self.waiting.append(turn)


@pytest.fixture
def nobody(monkeypatch):
    pool = Nobody()
    monkeypatch.setattr(module, "_pool", pool)
    return pool


def test_a_call_that_no_thread_has_begun_is_made_here(nobody):
    assert beside([threading.get_ident] * 3) == [threading.get_ident()] * 3
    assert len(nobody.waiting) == 2


def test_a_call_that_nobody_has_begun_is_not_made_after_a_failure(nobody):
    made = []

    def fail():
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        beside([fail, partial(made.append, 1)])
    for turn in nobody.waiting:
        turn.take(object())  # a thread at last
    assert not made


def test_what_waits_in_the_queue_and_what_failed_hold_nothing(nobody):
    class Large:
        def __call__(self):
            return 1

    class Failing(Large):
        def __call__(self):
            raise ArithmeticError

    gc.disable()
    try:
        for calls in ([Large()], [Large(), Large()], [Large(), Failing(), Large()]):
            held = [weakref.ref(call) for call in calls]
            with contextlib.suppress(ArithmeticError):
                beside(calls)
            calls.clear()
            assert [call() for call in held] == [None] * len(held)
        del calls
    finally:
        gc.enable()


def test_where_no_thread_can_be_started_each_call_is_made_once(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    made = []
    monkeypatch.setattr(module, "_pool", module._Pool())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        beside([partial(made.append, n) for n in range(3)])
    assert made == [0, 1, 2]
    both = threading.Barrier(2, timeout=60)
    beside([both.wait, both.wait])  # a thread at last
    assert made == [0, 1, 2]


def test_there_are_no_more_threads_than_asked_for(monkeypatch):
    monkeypatch.setattr(module, "_MOST", 2)
    monkeypatch.setattr(module, "_pool", module._Pool())
    before = threading.active_count()
    for _ in range(9):
        beside([threading.get_ident] * 5)
    assert threading.active_count() == before + 2


def test_an_interruption_of_the_own_call_waits_for_the_others():
    begun, ended = threading.Event(), []

    def other():
        begun.set()
        threading.Event().wait(0.3)
        ended.append(True)

    def own():
        begun.wait(60)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        beside([own, other])
    assert ended


@pytest.mark.parametrize("times", [1, 3])
def test_an_interruption_is_raised_only_when_all_calls_have_ended(times):
    begun, interrupted, ended = threading.Event(), [], []

    def other():
        begun.set()
        for _ in range(times):
            threading.Event().wait(0.1)
            os.kill(os.getpid(), signal.SIGUSR1)
        threading.Event().wait(0.3)
        ended.append(True)

    def interrupt(*_):
        interrupted.append(True)
        raise KeyboardInterrupt

    usual = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            beside([partial(begun.wait, 60), other])
    finally:
        signal.signal(signal.SIGUSR1, usual)
    assert ended
    assert len(interrupted) == times


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_exception_is_raised_only_when_all_calls_have_ended(failing):
    ended, begun = [], threading.Event()

    def call(n):
        if n == failing:
            assert n > 0 or begun.wait(60)  # so that there is something to wait for
            raise ArithmeticError(n)
        begun.set()
        threading.Event().wait(0.05)
        ended.append(n)

    with pytest.raises(ArithmeticError, match=str(failing)):
        beside([partial(call, n) for n in range(3)])
    were = list(ended)
    threading.Event().wait(0.1)
    assert ended == were
    assert failing == 0 or sorted(ended) == sorted({0, 1, 2} - {failing})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_threads_of_its_own():
    beside([threading.get_ident] * 2)  # the parent has one now
    child = os.fork()
    if child == 0:
        met = threading.Barrier(2, timeout=20)
        try:
            beside([met.wait, met.wait])
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def transform():
    sae = SparseAutoencoder(WIDTH, LATENTS, K).requires_grad_(False)
    return SteerTransform(sae, Steering(randn(LATENTS, seed=1)))


@pytest.mark.parametrize("users", [1, 63, 127, 128, 300, 700])
@pytest.mark.parametrize("each", [False, True], ids=["one strength", "one a user"])
def test_steered_vectors_do_not_depend_on_the_number_of_threads(threads, transform, users, each):
    x = randn(users, WIDTH, seed=2)
    alpha = randn(users, seed=3) if each else 0.7
    threads(1)
    with torch.no_grad():
        alone = transform(x, alpha)
        for number in (2, 3):
            threads(number)
            assert torch.equal(transform(x, alpha), alone)
        expected = transform._by_torch(x, alpha.reshape(-1, 1) if each else alpha)
    torch.testing.assert_close(alone, expected)


def test_many_threads_may_steer_at_the_same_time(transform):
    x = randn(300, WIDTH, seed=2)
    with torch.no_grad():
        expected = transform(x)
        found = beside([partial(transform, x)] * 8)
    assert all(torch.equal(each, expected) for each in found)


@pytest.mark.parametrize("place", [0, 149, 150, 299])
def test_numbers_that_are_not_finite_go_to_torch_from_any_share(threads, transform, place):
    threads(2)
    x = randn(300, WIDTH, seed=2)
    x[place, 0] = torch.inf
    with torch.no_grad():
        found = transform(x)
        expected = transform._by_torch(x, 1.0)
    torch.testing.assert_close(found, expected, equal_nan=True)
