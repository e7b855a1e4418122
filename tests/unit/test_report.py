"""The trade-off plot: a file of the format asked for, and on it what a reader needs to know."""

import pytest
import torch
from matplotlib.figure import Figure

from steerrec.errors import StorageError
from steerrec.evaluation import Evaluation
from steerrec.report import plot_tradeoff
from steerrec.tradeoff import Sweep, SweepPoint

ALPHAS = (0.0, 0.5, 1.25)


def evaluation(alpha, mask_seen=False):
    """The more, the fairer, at a tenth of the nDCG for each step of 1."""
    metrics = {"ndcg@10": 0.2 - 0.02 * alpha, "ndcg_tail@10": 0.1}
    metrics |= {"gini@10": 0.8 - 0.2 * alpha, "ltc@10": 0.3 + 0.2 * alpha}
    protocol = {"split": "test", "mask_seen": mask_seen, "k": 10, "users": 6040, "items": 3416}
    return Evaluation(protocol, metrics, torch.empty(0))


def sweep_of(alphas, **options):
    found = [evaluation(alpha, **options) for alpha in alphas]
    points = (SweepPoint(*point) for point in zip(alphas, found, found, strict=True))
    return Sweep(tuple(points), {"name": "popsteer"})


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw a sweep, and get the figure that was written."""
    figures = []
    savefig = Figure.savefig

    def keep(figure, *arguments, **options):
        figures.append(figure)
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(sweep, **options):
        plot_tradeoff(sweep, tmp_path / "plot.png", title="Steering popularity", **options)
        return figures[-1]

    return draw


def texts(figure):
    """Every word of a figure."""
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


@pytest.mark.parametrize(
    ("name", "start"),
    [("plot.png", b"\x89PNG"), ("plot.svg", b"<?xml"), ("plot.pdf", b"%PDF"), ("plot", b"\x89PNG")],
)
def test_the_suffix_says_the_format(tmp_path, name, start):
    plot_tradeoff(sweep_of(ALPHAS), tmp_path / "new" / name, title="Steering")
    assert [file.name for file in (tmp_path / "new").iterdir()] == [name]
    assert (tmp_path / "new" / name).read_bytes().startswith(start)


def test_title_and_protocol(drawn):
    words = "\n".join(texts(drawn(sweep_of(ALPHAS))))
    assert "Steering popularity" in words
    assert "6,040 users, 3,416 items, test split, seen items not masked" in words
    words = "\n".join(texts(drawn(sweep_of(ALPHAS, mask_seen=True))))
    assert "seen items masked" in words


def test_axes_say_what_they_measure_and_which_way_is_good(drawn):
    gini, ltc = drawn(sweep_of(ALPHAS)).axes
    for axes in (gini, ltc):
        assert axes.get_xlabel() == "nDCG@10  (higher is better)"
    assert gini.get_ylabel() == "Gini@10 of item exposure  (lower is fairer)"
    assert ltc.get_ylabel() == "Long-tail coverage@10  (higher is better)"


def test_the_curves_are_the_test_metrics_with_each_strength_marked(drawn):
    for axes, metric in zip(drawn(sweep_of(ALPHAS)).axes, ("gini@10", "ltc@10"), strict=True):
        expected = [evaluation(alpha).metrics for alpha in ALPHAS]
        (curve,) = [line for line in axes.lines if len(line.get_xdata()) == len(ALPHAS)]
        assert list(curve.get_xdata()) == [metrics["ndcg@10"] for metrics in expected]
        assert list(curve.get_ydata()) == [metrics[metric] for metrics in expected]
        assert {"0.5", "1.25"} <= {text.get_text() for text in axes.texts}


@pytest.mark.parametrize(("budget", "chosen"), [(0.05, "0.5"), (0.15, "1.25")])
def test_the_choice_on_validation_is_marked(drawn, budget, chosen):
    words = "\n".join(texts(drawn(sweep_of(ALPHAS), budget=budget)))
    assert f"α = {chosen}, chosen on validation" in words


@pytest.mark.parametrize("alphas", [(0.0,), (0.0, 2.0)])
def test_nothing_is_marked_where_the_unsteered_model_is_the_choice(drawn, alphas):
    words = texts(drawn(sweep_of(alphas)))
    assert not any("chosen" in text for text in words)
    assert "unsteered" in words


def test_labels_that_would_lie_over_another_are_left_out(drawn):
    close = (0.0, 0.499, 0.5, 0.501, 1.25)
    for axes in drawn(sweep_of(close), budget=0.05).axes:
        shown = [label.get_text() for label in axes.texts if label.get_visible()]
        assert shown == ["0.5", "1.25"]  # 0.5 is the chosen one


def test_no_screen_and_no_global_state(monkeypatch, tmp_path):
    """A notebook's own figures and settings stay as they are."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "show", lambda: pytest.fail("shown"))
    before, figures = dict(mpl.rcParams), plt.get_fignums()
    plot_tradeoff(sweep_of(ALPHAS), tmp_path / "plot.png", title="Steering")
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == figures


def test_a_failure_leaves_the_old_plot(monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    plot_tradeoff(sweep_of(ALPHAS), tmp_path / "plot.png", title="Steering")
    old = (tmp_path / "plot.png").read_bytes()
    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(StorageError, match=r"cannot write .*plot.png: No space left on device"):
        plot_tradeoff(sweep_of(ALPHAS), tmp_path / "plot.png", title="Steering")
    with pytest.raises(StorageError):
        plot_tradeoff(sweep_of(ALPHAS), tmp_path / "other.png", title="Steering")
    assert [file.name for file in tmp_path.iterdir()] == ["plot.png"]
    assert (tmp_path / "plot.png").read_bytes() == old


def test_a_format_that_does_not_exist_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="docx"):
        plot_tradeoff(sweep_of(ALPHAS), tmp_path / "plot.docx", title="Steering")
    assert list(tmp_path.iterdir()) == []
