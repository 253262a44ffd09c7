from __future__ import annotations

import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from meliad_edge import charts
from meliad_edge.calibrate import calibrate
from meliad_edge.errors import MissingExtraError
from meliad_edge.exemplars import Exemplar
from meliad_edge.faithfulness import ScoreCurves
from meliad_edge.metrics import PixelMetrics, image_metrics, pixel_metrics
from meliad_edge.report import HeldOutScores, InspectedImage, ReportData, Table, write_report

VOID = {"meta", "img", "br", "link", "input", "hr", "path", "circle"}
HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}.png"

CURVES = ScoreCurves((0.0, 0.25, 1.0), (1.0, 0.5, 0.0), (1.0, 0.9, 0.0), (0.0, 0.75, 1.0), (0.0, 0.2, 1.0), 12)


class Page(HTMLParser):
    """Elements with their attributes and text; refuses wrong nesting."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self._open = [], [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def inspected(name, is_anomaly, score, shape=(60, 80, 3), **fields):
    image = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    return InspectedImage(name, "scratch" if is_anomaly else "good", is_anomaly, score, image, image[:, ::-1], **fields)


@pytest.fixture
def complete():
    generator = np.random.default_rng(0)
    is_anomaly = np.arange(90) < 30
    scores = generator.normal(size=90) + 2.0 * is_anomaly
    maps = generator.normal(size=(6, 12, 12))
    masks = np.zeros((6, 12, 12), bool)
    masks[:3, 2:5, 2:6] = True
    patch = np.full((48, 48, 3), 120, np.uint8)
    exemplar = Exemplar("scratch", "shot 7.png", 0, 0, 48, 48, patch)
    return ReportData(
        title="meliad on tiles",
        subtitle="10 labelled defects",
        image=image_metrics(scores, is_anomaly),
        pixel=pixel_metrics(maps, masks),
        test=HeldOutScores(scores, is_anomaly),
        calibration=calibrate(generator.normal(size=120)),
        gallery=(inspected("a.png", True, 9.0, mask=masks[0], resembles=(exemplar,)), inspected("b.png", False, -9.0)),
        highest_normals=(inspected("c.png", False, 9.0),),
        lowest_anomalies=(inspected("d.png", True, -9.0),),
        parity=Table("Score difference", ("engine", "value"), (("onnxruntime", 1e-6),)),
        latency=Table("Milliseconds", ("stage", "p50", "n"), (("infer", 12.3456, 1234),), note="On 2 cores."),
        events=Table("Events", ("time", "what"), (("12:03:41", "new"),)),
        interpretability=Table("Maps", ("measure", "value"), (("pointing", 0.75),)),
        faithfulness=charts.faithfulness_chart(CURVES),
        provenance=(("licence", "CC BY-SA 4.0"), ("seed", "0")),
    )


def written(tmp_path, data):
    path = tmp_path / "out" / "report.html"
    write_report(path, data)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    return Page(path.read_text(encoding="utf-8"))


def test_complete_report_is_self_contained_and_accessible(tmp_path, complete):
    page = written(tmp_path, complete)
    assert {"script", "link", "iframe", "object"}.isdisjoint(tag for tag, _ in page.elements)
    images = page.all("img")
    assert len(images) == 1 + 2 * 4 + 1 + 1  # colour bar; image and heat map each; one mask; one exemplar
    assert all(image["src"].startswith("data:image/") and image["alt"] for image in images)
    links = [value for _, attributes in page.elements for name, value in attributes.items() if name in ("href", "src")]
    assert all(link.startswith("data:") for link in links)
    assert len(page.all("caption")) == len(page.all("table")) == 5
    assert all("scope" in head for head in page.all("th"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    named_by = [a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a]
    assert {reference for names in named_by for reference in names.split()} <= set(ids)
    assert len(page.all("svg")) == len(page.all("desc")) == 4
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1


def test_figures_are_those_of_the_data(tmp_path, complete):
    words = written(tmp_path, complete).words
    image = complete.image
    assert (
        f"Image AUROC {image.image_auroc:.3f} {image.image_auroc_ci[0]:.3f} to {image.image_auroc_ci[1]:.3f}" in words
    )
    assert f"AUPRO 0.05 {complete.pixel.aupro_05:.3f}" in words
    assert "12.35 1,234" in words
    assert "On 2 cores." in words
    assert "resembles scratch shot 7.png" in words
    assert "licence CC BY-SA 4.0" in words


def test_decisions_are_counted_at_the_threshold(tmp_path, complete):
    threshold = complete.calibration.threshold
    scores = np.array([threshold, threshold - 1, threshold - 1, threshold - 1, threshold, threshold - 1])
    is_anomaly = np.array([False, False, False, False, True, True])
    data = ReportData("t", test=HeldOutScores(scores, is_anomaly), calibration=complete.calibration)
    words = written(tmp_path, data).words
    assert "normal 3 1 25 % false alarms" in words
    assert "anomalous 1 1 50 % missed" in words
    assert "1 % false alarms" in words
    assert "120 normal images" in words


def test_each_image_gets_its_verdict(tmp_path, complete):
    words = written(tmp_path, complete).words
    for name, verdict in (("a", "defect found"), ("b", "passed"), ("c", "false alarm"), ("d", "defect missed")):
        assert f"{name}.png {'good' if name in 'bc' else 'scratch'} {verdict}" in words
    undecided = written(tmp_path, replace(complete, calibration=None)).words
    assert "defect missed" not in undecided
    assert "false alarm " not in undecided


def test_sections_without_data_are_left_out(tmp_path, complete):
    assert written(tmp_path, ReportData("empty")).all("h2") == []
    tables = ("parity", "latency", "events", "interpretability")
    names = (*tables, "gallery", "highest_normals", "lowest_anomalies", "provenance")
    sections = {attributes["id"] for attributes in written(tmp_path, complete).all("h2")}
    for name in names:
        empty = None if name in tables else ()
        left = {a["id"] for a in written(tmp_path, replace(complete, **{name: empty})).all("h2")}
        assert sections - left == {name.replace("_", "-")}


def test_absent_pixel_metrics_say_why(tmp_path, complete):
    data = replace(complete, pixel=PixelMetrics(pixel_absent_because="the masks have no defective pixel"))
    words = written(tmp_path, data).words
    assert "No pixel metrics: the masks have no defective pixel." in words
    assert "Pixel AUROC" not in words


def test_hostile_names_stay_text(tmp_path, complete):
    patch = np.zeros((48, 48, 3), np.uint8)
    image = replace(
        inspected(HOSTILE, True, 1.0),
        defect=HOSTILE,
        resembles=(Exemplar(HOSTILE, HOSTILE, 0, 0, 1, 1, patch),),
    )
    table = Table(HOSTILE, (HOSTILE, HOSTILE), ((HOSTILE, HOSTILE),), note=HOSTILE)
    data = replace(
        complete, title=HOSTILE, subtitle=HOSTILE, gallery=(image,), events=table, provenance=((HOSTILE, HOSTILE),)
    )
    page = written(tmp_path, data)
    assert page.all("script") == []
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert all(image["src"].startswith("data:") for image in page.all("img"))
    # Title twice, subtitle; name, class, exemplar twice; caption, two heads, two cells, note; provenance twice.
    assert page.words.count(HOSTILE) == 15


def test_names_that_are_not_unicode_are_shown_escaped(tmp_path):
    words = written(tmp_path, ReportData("t", gallery=(inspected("caf\udce9.png", False, 0.0),))).words
    assert "caf\\udce9.png" in words


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 5000, 3), (3000, 2, 3), (641, 479, 3)])
def test_pictures_of_any_shape(tmp_path, shape):
    data = ReportData("t", gallery=(inspected("a.png", True, 0.0, shape, mask=np.ones(shape[:2])),))
    assert len(written(tmp_path, data).all("img")) == 3


def test_without_jinja2_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"jinja2 is not installed; .*\[train\]"):
        write_report(tmp_path / "report.html", ReportData("t"))


def points(d):
    return [tuple(float(value) for value in point.split()) for point in d.removeprefix("M").split("L")]


def test_roc_chart_starts_and_ends_in_the_corners_and_marks_the_threshold():
    chart = charts.roc_chart([0.0, 1.0, 2.0, 3.0], [False, True, False, True], 0.75, 1.5)
    curve = points(chart.series[1].d)
    assert curve[0] == (charts.LEFT, charts.BOTTOM)
    assert curve[-1] == (charts.RIGHT, charts.TOP)
    assert chart.marker[:2] == (chart.x_px(0.5), chart.y_px(0.5))
    assert "50.0% of the defects are found and 50.0% of the normal images alarm" in chart.description


@pytest.mark.parametrize("scores", [[1.0] * 4, [0.0, 1e-9, 1e9, 5.0], [-3.0, -2.0, -1.0, 0.0]])
@pytest.mark.parametrize("threshold", [None, 0.5, 1e12])
def test_every_chart_stays_inside_its_axes(scores, threshold):
    labels = [False, True, False, True]
    for chart in (
        charts.score_chart(scores, labels, threshold),
        charts.roc_chart(scores, labels, 0.5, threshold),
        charts.precision_recall_chart(scores, labels, 0.5, threshold),
        charts.faithfulness_chart(CURVES),
    ):
        drawn = [point for series in chart.series for point in points(series.d)]
        assert all(charts.LEFT <= x <= charts.RIGHT and charts.TOP <= y <= charts.BOTTOM for x, y in drawn)
        for axis in (chart.x, chart.y):
            assert 3 <= len(axis.ticks) <= 11
            assert all(axis.low - 1e-9 <= tick <= axis.high * (1 + 1e-9) + 1e-9 for tick in axis.ticks)


def test_histogram_shares_are_per_kind():
    chart = charts.score_chart([0.0, 0.0, 0.0, 1.0, 5.0], [False, False, False, False, True], None)
    highest = {series.label: min(y for _, y in points(series.d)) for series in chart.series}
    assert highest["normal"] == pytest.approx(chart.y_px(75.0), abs=0.1)
    assert highest["anomalous"] == pytest.approx(chart.y_px(100.0), abs=0.1)


def test_deletion_and_insertion_are_drawn_with_their_baselines():
    chart = charts.faithfulness_chart(CURVES)
    drawn = {series.kind: points(series.d) for series in chart.series}
    for kind, heights in (
        ("deletion", CURVES.deletion),
        ("deletion random", CURVES.deletion_random),
        ("insertion", CURVES.insertion),
        ("insertion random", CURVES.insertion_random),
    ):
        expected = [(chart.x_px(x), chart.y_px(y)) for x, y in zip(CURVES.shares, heights, strict=True)]
        assert np.array(drawn[kind]) == pytest.approx(np.array(expected), abs=0.1)
    assert "Mean score of 12 defects" in chart.description
    assert f"Area of deletion {0.25 * 0.75 + 0.75 * 0.25:.3f}, in random order {0.25 * 0.95 + 0.75 * 0.45:.3f}" in (
        chart.description
    )
