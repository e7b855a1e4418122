"""The page: hostile texts stay texts, nothing is asked of any network, every size stays small."""

import json
import re
from html.parser import HTMLParser

import polars as pl
import pytest
import torch

from steerrec.artifact_site import SiteArtifact
from steerrec.attribution import score_neurons
from steerrec.autoencoder import SparseAutoencoder
from steerrec.data import Catalogue, leave_one_out
from steerrec.metrics import gini
from steerrec.profiles import popularity_contrast
from steerrec.report_charts import density_chart, lorenz_chart, tradeoff_charts
from steerrec.report_page import embedded, neuron_payload, render_report, write_report
from steerrec.reporting import lorenz, report_data, steering_of
from steerrec.steering import Steering
from steerrec.tradeoff import sweep

from .tiny import random_histories, random_recommender

ITEMS = 40
HOSTILE = [
    "<script>document.title='owned'</script>",
    "</script><img src=x onerror=alert(1)>",
    "]]> --> <!-- \u2028\u2029 \x00\x1b[31m",
    "שלום \u202eevil\u202c עולם",
    "🎬👩‍👩‍👧 Ünïcödé {{ 7 * 7 }} {% raw %}",
    "long " * 2000,
    "\ud800 half a pair".encode("utf-8", "replace").decode(),
    'javascript:alert(1)" onmouseover="alert(1)',
]


@pytest.fixture(scope="module")
def world():
    rec = random_recommender(ITEMS, 6)
    titles = [f"{HOSTILE[row % len(HOSTILE)]} {row}" for row in range(ITEMS)]
    kinds = ["<b>Horror</b>" if row < 10 else "Drama & more" for row in range(ITEMS)]
    rec.catalogue = Catalogue(
        rec.catalogue.frame.with_columns(pl.Series("title", titles), pl.Series("kind", kinds))
    )
    sae = SparseAutoencoder(6, 32, 4).requires_grad_(False)
    split = leave_one_out(random_histories(80, ITEMS, shortest=3), ITEMS)
    table = score_neurons(rec, sae, popularity_contrast(rec.catalogue), split.train, users=200)
    return rec, SiteArtifact(rec.site, sae, tables={"popularity": table}), split


@pytest.fixture(scope="module")
def data(world):
    return report_data(*world, users=5, source="<i>model</i>")


@pytest.fixture(scope="module")
def page(data):
    return render_report(data)


class Reader(HTMLParser):
    """What a browser would make of it, as far as tags go."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.attributes = [], []
        self.scripts, self._script = [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._script = tag == "script"
        if self._script:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._script = False

    def handle_data(self, data):
        if self._script:
            self.scripts[-1] += data


def test_hostile_texts_become_no_markup(page):
    read = Reader(page)
    assert read.tags.count("script") == 2  # the data and the script of the page
    assert "img" not in read.tags
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert "<b>Horror</b>" not in page
    assert "<i>model</i>" not in page
    assert "49" not in re.findall(r"Ünïcödé (\S+)", page)  # a title is no template
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "long " * 40 not in page  # ten thousand characters are cut off


def test_the_data_of_the_script_reads_back(data, page):
    payload = json.loads(Reader(page).scripts[0])
    assert payload == json.loads(json.dumps(neuron_payload(data.neurons)))
    assert len(payload["rows"]) == 32
    titles = [item[0] for item in payload["items"].values()]
    assert any(title.startswith("<script>") for title in titles)


def test_nothing_is_loaded_from_anywhere(page):
    links = [
        v for name, v in Reader(page).attributes if name in ("href", "src", "srcset", "action")
    ]
    assert all(link.startswith(("#", "data:,")) for link in links)
    assert "default-src 'none'" in page
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", page)


@pytest.mark.parametrize("text", HOSTILE)
def test_json_cannot_end_its_element(text):
    safe = embedded({"title": text, text: 1})
    assert not set(safe) & set("<>&\u2028\u2029")
    assert json.loads(safe)["title"] == text


def test_what_does_not_fit_has_no_details_and_still_a_row(data):
    small = neuron_payload(data.neurons, max_detail=3000)
    assert len(small["rows"]) == 32
    assert 0 < len(small["details"]) < 32
    assert list(small["details"]) == [str(row[0]) for row in small["rows"][: len(small["details"])]]


def test_the_page_tells_the_metrics_of_the_sweep(data, page):
    base = data.sweep["points"][0]["test"]["metrics"]
    for name in ("ndcg@10", "gini@10", "ltc@10"):
        assert f"{base[name]:.4f}" in page


def test_a_page_is_written_whole(tmp_path, data):
    file = write_report(data, tmp_path / "deep" / "report.html", title="A & B")
    text = file.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "<title>A &amp; B</title>" in text


def test_a_recorded_trade_off_is_taken_with_its_recipe(world, data):
    rec, here, split = world
    table = here.table("popularity")
    steering = Steering.popsteer(table, neurons=7, popsteer_compat=True)
    recorded = sweep(rec, here.sae, steering, split, alphas=[1.0], k=5, mask_seen=True).to_dict()
    recorded = json.loads(json.dumps(recorded))
    again = steering_of(recorded, here, table)
    torch.testing.assert_close(again.shift, steering.shift)
    assert again.splice == "reconstruct"
    told = report_data(rec, here, split, found=data.neurons, swept=recorded, users=2)
    assert told.sweep == recorded
    assert all(len(user.items) <= 10 for user in told.users)  # two lists of 5
    other = {**recorded, "steering": {"name": "learned", "rule": "learned"}}
    assert steering_of(other, here, table) is None
    assert report_data(rec, here, split, found=data.neurons, swept=other, users=1).sweep != other


def test_a_comparison_is_drawn_with_its_methods(data):
    settings = [
        {"value": v, "test": {"ndcg@10": 0.2 - v / 100, "gini@10": 0.8 - v / 10, "ltc@10": v / 10}}
        for v in (0, 1, 2)
    ]
    methods = [
        {
            "name": name,
            "control": name == "random",
            "settings": settings,
            "hypervolume": {"gini": v},
        }
        for v, name in enumerate(["random", "popsteer", *"abcdefgh"])
    ]
    charts = tradeoff_charts(data.sweep, {"methods": methods}, 1.0)
    assert len(charts) == 2
    names = {line.name: line.style for line in charts[0].lines}
    assert names["popsteer"] == "method-0"
    assert "random" not in names
    assert [names[name] for name in "hgfed"] == [f"method-{i}" for i in range(1, 6)]
    assert names["a"] == "other"


# --- charts


def test_a_lorenz_curve_of_hand_worked_lists():
    # item 0 four times, item 1 twice, item 2 twice, item 3 never
    before = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 2]])
    after = torch.tensor([[0, 1], [2, 3], [1, 0], [3, -1]])
    found = lorenz(before, after, 4)
    assert found.items == (0, 0.25, 0.5, 0.75, 1)
    assert found.before == (0, 0, 0.25, 0.5, 1)
    assert found.after[-1] == 1
    # Gini is one less twice the area under the curve, in steps of one item
    area = sum((a + b) / 2 * 0.25 for a, b in zip(found.before, found.before[1:], strict=False))
    assert 1 - 2 * area == pytest.approx(gini(torch.tensor([4, 2, 2, 0])))


def test_the_density_counts_every_neuron_once():
    chart = density_chart(torch.tensor([0.0, 0.0, 0.5, 1.0, 0.002, 0.03]))
    counted = [int(text.split()[0]) for *_, text in chart.bars]
    assert counted[0] == 2
    assert sum(counted) == 6
    assert density_chart(torch.zeros(3)).bars[0][-1].startswith("3 ")


def test_curves_stay_in_their_box(data):
    exposure = data.exposure
    charts = [
        lorenz_chart(exposure.items, exposure.before, exposure.after),
        *tradeoff_charts(data.sweep, None, data.alpha),
    ]
    for chart in charts:
        left, top, right, bottom = chart.box
        places = [
            tuple(map(float, pair.split()))
            for line in chart.lines
            if line.path
            for pair in line.path[1:].split("L")
        ]
        assert places
        assert all(left - 1 <= x <= right + 1 and top - 1 <= y <= bottom + 1 for x, y in places)
