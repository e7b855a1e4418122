"""The compiled loops: the same as torch operations give, and left aside where torch is needed."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import steerrec
from steerrec import compiled
from steerrec.autoencoder import SparseAutoencoder
from steerrec.compiled import as_arrays, kernels, step_kernels
from steerrec.errors import ModelError
from steerrec.ranking import INSERTED, Best
from steerrec.selection import largest
from steerrec.steering import Steering, SteerTransform

WIDTH, LATENTS, K = 8, 512, 5


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def transform(splice="delta", *, latents=LATENTS, k=K):
    sae = SparseAutoencoder(WIDTH, latents, k, generator=generator()).requires_grad_(False)
    sae.b_enc.normal_(0, 0.1, generator=generator(1))
    sae.b_dec.normal_(0, 0.1, generator=generator(2))
    shift = 0.3 * torch.randn(latents, generator=generator(3))
    return SteerTransform(sae, Steering(shift, splice=splice))


def by_definition(step, x, alpha):
    """The formulas of the method, one vector after the other, with a full sort."""
    sae, rows = step.sae, []
    for row, strength in zip(x, alpha, strict=True):
        z = (row - sae.b_dec) @ sae.W_enc + sae.b_enc

        def decoded(z):
            order = z.argsort(descending=True)[: sae.k]
            return sum(z[j].clamp_min(0) * sae.W_dec[j] for j in order.tolist()) + sae.b_dec

        after = decoded(z + strength * step.step.shift)
        rows.append(row + after - decoded(z) if step.steering.splice == "delta" else after)
    return torch.stack(rows)


def forget_loops():
    compiled.kernels.cache_clear()
    compiled.step_kernels.cache_clear()


@pytest.fixture
def calls(monkeypatch):
    """How often a loop was used."""
    used = []

    class Counted:
        def __init__(self, loops):
            self.loops = loops

        def __getattr__(self, name):
            return lambda *args: used.append(name) or getattr(self.loops, name)(*args)

    counted = Counted(kernels()), Counted(step_kernels())
    for module in ("selection", "ranking"):
        monkeypatch.setattr(f"steerrec.{module}.kernels", lambda: counted[0])
    monkeypatch.setattr("steerrec.plans.step_kernels", lambda: counted[1])
    return used


@pytest.mark.parametrize("splice", ["delta", "reconstruct"])
@pytest.mark.parametrize("rows", [1, 2, 7, 300])
@pytest.mark.parametrize("latents", [512, 500, 6, 5])
def test_a_steered_vector_is_what_the_formulas_say(calls, splice, rows, latents):
    step = transform(splice, latents=latents)
    x = torch.randn(rows, WIDTH, generator=generator(4))
    alpha = torch.rand(rows, generator=generator(5)) * 4 - 2
    torch.testing.assert_close(step(x, alpha), by_definition(step, x, alpha), atol=1e-5, rtol=1e-5)
    same = torch.full((rows,), 0.7)
    torch.testing.assert_close(step(x, 0.7), by_definition(step, x, same), atol=1e-5, rtol=1e-5)
    assert set(calls) == {"steered"}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 40), width=st.integers(1, 300))
@example(seed=0, k=40, width=40)
@example(seed=0, k=1, width=1)
def test_the_largest_among_many_ties(seed, k, width):
    k = min(k, width)
    values = torch.randint(-3, 4, (5, width), generator=generator(seed)).float()
    entries, indices = largest(values, k)
    expected = values.sort(dim=1, descending=True).values[:, :k]
    assert torch.equal(entries.sort(dim=1, descending=True).values, expected)
    assert all(len(set(row)) == k for row in indices.tolist())
    assert torch.equal(entries, values.gather(1, indices))


@pytest.mark.parametrize(
    "row",
    [
        torch.zeros(4096),
        -torch.zeros(4096),
        torch.full((4096,), 3e38),
        torch.linspace(-1e38, 1e38, 4096),
        torch.full((4096,), 1e-45) * torch.arange(4096),
        torch.cat([torch.ones(4095), torch.full((1,), 1.0000001)]),
        torch.cat([torch.full((64,), 5.0), torch.zeros(4032)]).reshape(64, 64).T.reshape(-1),
        torch.arange(4096.0),
        -torch.arange(4096.0),
    ],
    ids=["zeros", "−0", "huge", "wide", "tiny", "nearly equal", "one group", "up", "down"],
)
def test_the_largest_of_hard_rows(calls, row):
    values = torch.stack([row, row.flip(0)])
    entries, indices = largest(values, 32)
    expected = values.topk(32).values
    assert torch.equal(entries.sort(dim=1, descending=True).values, expected)
    assert all(len(set(chosen)) == 32 for chosen in indices.tolist())
    assert calls == ["largest"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_are_left_to_torch(value):
    values = torch.randn(3, 4096, generator=generator())
    values[1, 77] = value
    found = largest(values, 32)[0].sort(dim=1, descending=True).values
    torch.testing.assert_close(found, values.topk(32).values, equal_nan=True, atol=0, rtol=0)
    step, x = transform(), torch.randn(3, WIDTH, generator=generator())
    x[1, 2] = value
    steered = step(x)
    assert not steered[1].isfinite().any()
    torch.testing.assert_close(steered[[0, 2]], step(x[[0, 2]]))


def test_an_empty_edit_changes_no_bit():
    step = transform()
    x = torch.randn(300, WIDTH, generator=generator())
    assert torch.equal(step(x, 0.0), x)
    assert torch.equal(step(x, torch.zeros(300)), x)
    assert torch.equal(step.with_steering(Steering(torch.zeros(LATENTS)))(x, 3.0), x)


def test_nothing_that_is_given_is_written_to():
    step, x = transform(), torch.randn(3, WIDTH, generator=generator())
    before = {name: tensor.clone() for name, tensor in step.state_dict().items()}
    given, shift = x.clone(), step.step.shift.clone()
    step(x)
    assert torch.equal(x, given)
    assert torch.equal(step.step.shift, shift)
    assert all(torch.equal(tensor, before[name]) for name, tensor in step.state_dict().items())


def test_strengths_that_share_their_memory_are_taken_one_by_one(calls):
    step, x = transform(), torch.randn(4, WIDTH, generator=generator())
    one = torch.tensor(0.5)
    for alpha in (one, one.expand(4), torch.full((8,), 0.5)[::2], torch.full((4,), 0.5).double()):
        torch.testing.assert_close(step(x, alpha), step(x, 0.5))
    assert calls


def test_vectors_in_any_layout_and_dtype():
    step = transform()
    x = torch.randn(WIDTH, 6, generator=generator()).T
    assert not x.is_contiguous()
    torch.testing.assert_close(step(x), step(x.contiguous()))
    assert step(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(step(x.bfloat16()).float(), step(x), atol=0.05, rtol=0.05)
    doubled = transform().double()
    torch.testing.assert_close(doubled(x.double()).float(), step(x))


def test_no_rows_at_all():
    assert transform()(torch.zeros(0, WIDTH)).shape == (0, WIDTH)
    entries, indices = largest(torch.zeros(0, 16), 3)
    assert entries.shape == indices.shape == (0, 3)


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_gradients_come_from_torch():
    step = transform()
    x = torch.randn(3, WIDTH, generator=generator(), requires_grad=True)
    y = step(x)
    assert y.requires_grad
    close(y.detach(), step(x.detach()))
    y.sum().backward()
    assert x.grad is not None
    alpha = torch.ones(3, requires_grad=True)
    step(x.detach(), alpha).sum().backward()
    assert alpha.grad.abs().sum() > 0


def test_forward_mode_derivatives_are_those_of_finite_differences():
    step, x = transform().double(), torch.randn(3, WIDTH, generator=generator()).double()
    direction = torch.randn(3, WIDTH, generator=generator(1)).double()
    expected = (step(x + 1e-6 * direction) - step(x - 1e-6 * direction)) / 2e-6
    step32 = transform()
    tangent = torch.func.jvp(step32, (x.float(),), (direction.float(),))[1]
    torch.testing.assert_close(tangent.double(), expected, atol=1e-4, rtol=1e-4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.float(), direction.float())
        torch.testing.assert_close(forward_ad.unpack_dual(step32(dual)).tangent, tangent)


def test_vmap():
    step, x = transform(), torch.randn(3, WIDTH, generator=generator())
    close(torch.vmap(lambda row: step(row[None])[0])(x), step(x))


def test_modes_see_every_operation():
    step, x = transform(), torch.randn(3, WIDTH, generator=generator())
    with FlopCounterMode(display=False) as counter:
        close(step(x), transform()(x))
    assert counter.get_total_flops() >= 2 * 2 * 3 * WIDTH * LATENTS
    graph = make_fx(step)(x)
    other = torch.randn(3, WIDTH, generator=generator(9))
    close(graph(other), step(other))


def test_which_tensors_become_arrays():
    x = torch.randn(3, 4)
    (array,) = as_arrays(x)
    array[0, 0] = 7
    assert x[0, 0] == 7
    for other in (x.double(), x.to("meta"), x.T, x.clone().requires_grad_()):
        assert as_arrays(other) is None
    with torch.no_grad():
        assert as_arrays(x.clone().requires_grad_()) is not None


def test_without_numba_torch_does_it_all(monkeypatch):
    step, x = transform(), torch.randn(3, WIDTH, generator=generator())
    expected = step(x)
    forget_loops()
    monkeypatch.setitem(sys.modules, "steerrec.kernels", None)  # as if the import failed
    try:
        with pytest.warns(RuntimeWarning, match="numba cannot be used"):
            close(step(x), expected)
        close(step(x), expected)
    finally:
        forget_loops()


def test_threads_do_not_wait_for_each_other_nor_mix():
    step = transform()
    inputs = [torch.randn(50, WIDTH, generator=generator(i)) for i in range(8)]
    expected = [step(x, float(i)) for i, x in enumerate(inputs)]
    wrong = []

    def run(i):
        right = (torch.equal(step(inputs[i], float(i)), expected[i]) for _ in range(50))
        if not all(right):
            wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_compiler_that_fails_leaves_it_to_torch(monkeypatch):
    step, x = transform(), torch.randn(3, WIDTH, generator=generator())
    expected = step(x)

    def full(name):
        raise OSError(28, "No space left on device")

    forget_loops()
    monkeypatch.setattr(compiled, "import_module", full)
    try:
        with pytest.warns(RuntimeWarning, match="No space left on device"):
            close(step(x), expected)
    finally:
        forget_loops()


@pytest.mark.slow  # it compiles all of them twice
def test_loops_are_compiled_anew_where_one_that_is_part_of_them_has_changed(tmp_path):
    """numba looks at the file of the function alone."""
    package, there = Path(steerrec.__file__).parent, tmp_path / "steerrec"
    shutil.copytree(package, there, ignore=shutil.ignore_patterns("__pycache__", "page"))
    environment = {"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}

    def sizes():
        script = "import steerrec, steerrec.step_kernels; print(steerrec.__file__)"
        command = [sys.executable, "-c", script]
        found = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
        )
        assert found.stdout.strip().startswith(str(tmp_path))
        return {path.name for path in (tmp_path / "cache").rglob("*steered*.nbc")}

    once = sizes()
    assert once
    assert sizes() == once
    with (there / "lanes.py").open("a") as file:
        file.write("\n# changed\n")
    assert len(sizes()) == 2 * len(once)


def test_more_than_there_are_is_refused_as_torch_does():
    with pytest.raises(RuntimeError, match="out of range"):
        largest(torch.randn(2, 8), 9)
    assert largest(torch.randn(2, 8), 0)[1].shape == (2, 0)


def test_second_derivatives():
    step = transform()
    x = torch.randn(2, WIDTH, generator=generator(), requires_grad=True)
    (first,) = torch.autograd.grad(step(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.isfinite().all()
    assert second.abs().sum() > 0


# --- the best items


def by_sorting(scores, k):
    """Ids and scores of the k best of each row, equal ones by column; -1 for minus infinity."""
    rows = []
    for row in scores.tolist():
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))
        kept = [j if row[j] > -float("inf") else -1 for j in order[:k]]
        rows.append(kept + [-1] * (k - len(kept)))
    return torch.tensor(rows)


def best_in_chunks(scores, k, chunk):
    found = Best(k)
    for start in range(0, scores.shape[1], chunk):
        part = scores[:, start : start + chunk].contiguous()
        found.add(part, torch.arange(start, start + part.shape[1]))
    return found


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 10**6),
    users=st.integers(1, 4),
    items=st.integers(1, 400),
    k=st.integers(1, INSERTED),
    chunk=st.integers(1, 400),
    values=st.sampled_from([2, 7, 10**6]),
)
def test_the_best_items_are_those_of_a_full_sort(seed, users, items, k, chunk, values):
    draw = generator(seed)
    scores = torch.randint(-values, values, (users, items), generator=draw).float() / 3
    scores[torch.rand(users, items, generator=draw) < 0.1] = -torch.inf
    scores[torch.rand(users, items, generator=draw) < 0.01] = torch.inf
    scores[scores == 0] *= -1  # a negative zero equals a positive one
    found = best_in_chunks(scores, k, chunk)
    ids = by_sorting(scores, k)
    assert torch.equal(found.ids, ids)
    expected = scores.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, -torch.inf)
    assert torch.equal(found.values, expected)


def test_the_loop_and_torch_make_the_same_lists(calls, monkeypatch):
    scores = torch.randint(0, 50, (20, 3000), generator=generator()).float()
    by_loop = best_in_chunks(scores, 10, 700)
    assert calls == ["best"] * 5
    monkeypatch.setattr("steerrec.ranking.kernels", lambda: None)
    by_torch = best_in_chunks(scores, 10, 700)
    assert torch.equal(by_loop.ids, by_torch.ids)
    assert torch.equal(by_loop.values, by_torch.values)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("row", [None, 0, 10, 19])
def test_lists_are_made_by_several_threads(calls, monkeypatch, threads, row):
    scores = torch.randint(0, 50, (20, 3000), generator=generator()).float()
    whole = best_in_chunks(scores, 10, 700)
    assert len(calls) == 5
    monkeypatch.setattr("steerrec.ranking._SHARE", 1000)
    monkeypatch.setattr("steerrec.beside._MOST", threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if row is None:
            found = best_in_chunks(scores, 10, 700)
            assert torch.equal(found.ids, whole.ids)
            assert torch.equal(found.values, whole.values)
            assert len(calls) == 5 + 5 * threads
        else:
            scores[row, 2000] = torch.nan
            with pytest.raises(ModelError, match="a score is NaN"):
                best_in_chunks(scores, 10, 700)
    finally:
        torch.set_num_threads(before)


def test_what_torch_has_begun_the_loop_can_go_on_with(monkeypatch):
    scores = torch.randint(0, 9, (5, 300), generator=generator()).float()
    for wide in (1, 0):
        found = Best(20)
        for number, start in enumerate(range(0, 300, 15)):
            part = scores[:, start : start + 15]  # no contiguous memory: torch
            part = part if number % 2 == wide else part.contiguous()
            found.add(part, torch.arange(start, start + 15))
        assert torch.equal(found.ids, by_sorting(scores, 20))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("column", [0, 77, 199])
def test_a_score_that_is_no_number_is_refused(column, sign):
    scores = torch.zeros(3, 200)
    scores[1, column] = sign * torch.nan
    with pytest.raises(ModelError, match="a score is NaN"):
        Best(5).add(scores, torch.arange(200))
