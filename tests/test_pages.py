import json
import re
import shutil
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet
import pytest

from operators.errors import ConfigError
from pipelines.evaluation_page import evaluation_page, highlighted
from pipelines.page import Axis
from pipelines.sweep_page import sweep_page
from tests.chromium import Chromium

VOID = {"meta", "img", "input"}
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "x' onmouseover='alert(1)",
    "{{ 7 * 7 }}" + "v" * 200,
]


class Element:
    """An element of a page: what is in it, in order, is elements and texts."""

    def __init__(self, tag, attributes):
        self.tag, self.attributes, self.content = tag, attributes, []

    def __getitem__(self, name):
        return self.attributes[name]

    def __iter__(self):
        for entry in self.content:
            if isinstance(entry, Element):
                yield entry
                yield from entry

    def all(self, tag=None, cls=None):
        classes = {cls} if cls else set()
        return [e for e in self if tag in (None, e.tag) and classes <= set((e.attributes.get("class") or "").split())]

    def one(self, tag=None, cls=None):
        (found,) = self.all(tag, cls)
        return found

    def by_id(self, name):
        return next((e for e in self if e.attributes.get("id") == name), None)

    @property
    def text(self):
        parts = (entry.text if isinstance(entry, Element) else entry for entry in self.content)
        return " ".join(" ".join(parts).split()) if self.tag not in ("style", "script") else ""


class Parsed(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.open = [Element("page", {})]
        self.feed(html)
        self.close()
        assert len(self.open) == 1, f"<{self.open[-1].tag}> is not closed"

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs))
        self.open[-1].content.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].content.append(data)


def parse(html):
    return Parsed(html).open[0]


# Folders whose content is known


def measured(value, queries=4):
    return {"queries": queries, "nDCG@10": value, "R@1": value / 2}


def against(difference, p_holm):
    known = {"difference": difference, "low": difference - 0.05, "high": difference + 0.05, "p": 0.003}
    return {"nDCG@10": known | {"p_holm": p_holm, "wins": 1, "ties": 2, "losses": 3}}


def system(kind, label, value, compared=None):
    groups = {"all": measured(value), "speech": measured(value, 3), "frame": measured(value, 1)}
    intervals = {group: {"nDCG@10": [value - 0.1, value + 0.1]} for group in groups}
    found = {"kind": kind, "label": label, "measures": groups, "intervals": intervals}
    return found | ({"against": compared} if compared else {})


def metrics(**parts):
    systems = {
        "sum_maxsim": system("primary", "Sum of maxima", 0.75),
        "rrf": system("fusion", "Rank fusion", 0.5, against(-0.25, 0.012)),
        "only:speech": system("single modality", "Only speech", 0.25, against(-0.5, 0.0001)),
        "without:frame": system("ablation", "Without frame", 0.8, against(0.05, 0.6)),
    }
    return {
        "schema": "maxreel-evaluation/1",
        "system": "sum_maxsim",
        "path": "index",
        "scorer": "sum_maxsim",
        "release_id": 3,
        "index_id": "index-3",
        "created": "2026-03-01T02:10:00+00:00",
        "depth": 100,
        "primary_measure": "nDCG@10",
        "measures": {"all": measured(0.75), "speech": measured(0.7, 3), "frame": measured(0.9, 1)},
        "intervals": {"all": {"nDCG@10": [0.65, 0.85]}, "speech": {"nDCG@10": [0.5, 0.8]}},
        "systems": systems,
        "overlap@10 with exact": 0.95,
        "modality_selection": {"accuracy": 0.625, "macro_f1": 0.5, "predicted": {"frame": 0.25, "speech": 0.75}},
        "cost": {"videos": 35, "clips": 61, "tokens_per_video": 412.0, "index_bytes_per_video": 15_200, "cores": 2}
        | {"p50_seconds": 0.0042, "p99_seconds": 0.0131, "queries_per_second": 231.0},
    } | parts


QUERIES = [("q1", "a cat", 1.0, "frame"), ("q2", "shoes at half price", 0.0, "speech"), ("q3", "news", 0.0, None)]
SPANS = [
    {"modality": "speech", "start_seconds": 3.0, "stop_seconds": 6.0, "text": "Buy Shoes, half off."},
    {"modality": "speech", "start_seconds": 9.0, "stop_seconds": 12.0, "text": "Buy Shoes, half off."},
    {"modality": "metadata", "start_seconds": None, "stop_seconds": None, "text": "An advertisement for running gear"},
    {"modality": "screen_text", "start_seconds": 4.0, "stop_seconds": 5.0, "text": "SALE"},
]
WINNERS = [
    {"token": "shoe", "modality": "speech", "score": 0.5, "start_seconds": 3.0, "text": SPANS[0]["text"]},
    {"token": "price", "modality": "screen_text", "score": 0.9, "start_seconds": 4.0, "text": "SALE"},
    {"token": "sneaker", "modality": "metadata", "score": 0.4, "start_seconds": None, "text": SPANS[2]["text"]},
    {"token": "at", "modality": "frame", "score": 0.1, "start_seconds": 4.0, "text": ""},
]


def clip(rank=1, query_id="q2", **parts):
    return {
        "query_id": query_id,
        "rank": rank,
        "video_id": f"video-{rank}",
        "title": f"Video {rank}",
        "score": 12.5,
        "relevant": {1: 2, 2: 0}.get(rank),
        "start_seconds": 0.0,
        "stop_seconds": 90.0,
        "best_seconds": 64.0,
        "thumbnail": b"\xff\xd8picture",
        "patch": [0.25, 0.5, 0.5, 0.75],
        "shares": [{"modality": "frame", "share": 0.25}, {"modality": "speech", "share": 0.75}],
        "winners": WINNERS,
        "spans": SPANS,
    } | parts


SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("query_id", "video_id", "title")),
        *((name, pa.int32()) for name in ("rank", "relevant")),
        ("score", pa.float32()),
        *((name, pa.float64()) for name in ("start_seconds", "stop_seconds", "best_seconds")),
        ("thumbnail", pa.binary()),
        ("query_image", pa.binary()),
        ("patch", pa.list_(pa.float32(), 4)),
        ("shares", pa.list_(pa.struct({"modality": pa.string(), "share": pa.float32()}))),
        (
            "winners",
            pa.list_(
                pa.struct(
                    {"token": pa.string(), "modality": pa.string(), "score": pa.float32()}
                    | {"start_seconds": pa.float64(), "text": pa.string()}
                )
            ),
        ),
        (
            "spans",
            pa.list_(
                pa.struct(
                    {"modality": pa.string(), "start_seconds": pa.float64()}
                    | {"stop_seconds": pa.float64(), "text": pa.string()}
                )
            ),
        ),
    ]
)


def write_parquet(rows, path, schema=None):
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema), path)


def evaluation(folder, document=None, queries=QUERIES, clips=None):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(document or metrics()))
    rows = [
        {"query_id": name, "text": text, "target_modality": target, "nDCG@10": value, "R@1": value}
        for name, text, value, target in queries
    ]
    write_parquet(rows, folder / "per_query.parquet")
    others = {"sum_maxsim": 0.0, "rrf": 0.5, "only:speech": -0.5, "without:frame": 0.0}
    shifted = [
        {"system": name} | row | {"nDCG@10": min(1.0, max(0.0, row["nDCG@10"] + shift))}
        for name, shift in others.items()
        for row in rows
    ]
    write_parquet(shifted, folder / "systems.parquet")
    write_parquet(
        [clip(1), clip(2), clip(3, thumbnail=None, patch=None)] if clips is None else clips,
        folder / "details.parquet",
        SCHEMA,
    )
    return folder


def cell(nbits, probes, quality, seconds, num_bytes, **more):
    return {
        "id": f"{nbits}{probes:03}",
        "settings": {"build_index.nbits": nbits, "search.probes": probes, "search.device": "cpu"},
        "measures": {"nDCG@10": quality, "R@1": quality / 2},
        "intervals": {"nDCG@10": [quality - 0.05, quality + 0.05]},
        "recall_exact": 0.9,
        "p50_seconds": seconds,
        "p99_seconds": 3 * seconds,
        "queries_per_second": 1 / seconds,
        "bytes_per_video": num_bytes,
        "tokens_per_video": 64,
        "pareto": True,
        "knee": False,
        "error": None,
    } | more


CELLS = [
    cell(1, 4, 0.50, 0.002, 1000),
    cell(4, 4, 0.70, 0.004, 4000, knee=True),
    cell(1, 16, 0.60, 0.005, 1000),
    cell(4, 16, 0.75, 0.050, 4000),
    cell(4, 64, 0.65, 0.090, 4000, pareto=False),
    {"id": "failed", "settings": {"build_index.nbits": 1, "search.probes": 64}, "error": "ScheduleError: 12 CPUs"},
]


def sweep(folder, cells=CELLS, best="search:\n  probes: 4\n", **parts):
    folder.mkdir(exist_ok=True)
    document = {
        "schema": "maxreel-sweep/1",
        "created": "2026-03-02T04:00:00+00:00",
        "primary_measure": "nDCG@10",
        "queries": 500,
        "axes": {"build_index.nbits": [1, 4], "search.probes": [4, 16, 64], "search.device": ["cpu"]},
        "cells": cells,
        "reused": {"encodings": 1, "indices": 2, "cells": 6, "from_cache": 3},
        "seconds": 1834.0,
    } | parts
    (folder / "sweep.json").write_text(json.dumps(document))
    if best is not None:
        (folder / "best.yaml").write_text(best)
    return folder


@pytest.fixture
def page(tmp_path):
    return parse(evaluation_page(evaluation(tmp_path / "evaluation")))


@pytest.fixture
def swept(tmp_path):
    return parse(sweep_page(sweep(tmp_path / "a sweep")))


def rows_of(section):
    """The rows of a section's first table by their headers."""
    return {row.all("th")[0].text: row for row in section.all("tbody")[0].all("tr")}


# Systems


def test_the_headline_is_the_primary_measure_with_its_interval(page):
    assert page.one("h1").text == "sum_maxsim: nDCG@10 0.750, 95 % interval 0.650 to 0.850"
    banner = page.one(cls="banner").text
    assert "Over 4 judged queries." in banner and "Release 3" in banner and "Index index-3" in banner


def test_a_ceiling_stands_beside_the_score(tmp_path):
    shown = evaluation_page(evaluation(tmp_path, metrics(ceiling={"nDCG@10": 0.648})))
    assert "A perfect ranker reaches nDCG@10 0.648 in this protocol." in parse(shown).one(cls="banner").text


def test_a_system_is_compared_with_interval_p_and_wins(page):
    row = rows_of(page.by_id("systems"))["Rank fusion fusion"]
    texts = [found.text for found in row.all("td")]
    assert texts[0] == "0.500 0.400 to 0.600"
    assert texts[2:5] == ["−0.250 worse −0.300 to −0.200", "0.012 0.003 alone", "1 / 2 / 3"]


@pytest.mark.parametrize(("difference", "p_holm", "word"), [(0.2, 0.01, "better"), (-0.2, 0.05, "unclear")])
def test_a_verdict_needs_significance(tmp_path, difference, p_holm, word):
    systems = metrics()["systems"] | {"rrf": system("fusion", "Rank fusion", 0.5, against(difference, p_holm))}
    row = rows_of(parse(evaluation_page(evaluation(tmp_path, metrics(systems=systems)))).by_id("systems"))
    assert row["Rank fusion fusion"].one(cls="badge").text == word


@pytest.mark.parametrize("missing", ["low", "p_holm", "ties"])
def test_there_is_no_bare_difference(tmp_path, missing):
    systems = {"sum_maxsim": system("primary", "Sum", 0.75)}
    systems["rrf"] = system("fusion", "Rank fusion", 0.5, against(-0.25, 0.01))
    systems["rrf"]["against"]["nDCG@10"][missing] = None
    assert "−0.250" not in parse(evaluation_page(evaluation(tmp_path, metrics(systems=systems)))).text


def test_intervals_of_all_systems_are_drawn_on_one_scale(page):
    drawn = [row.one(cls="whisker") for row in rows_of(page.by_id("systems")).values()]
    ends = {}
    for found, value in zip(drawn, (0.75, 0.5, 0.25, 0.8), strict=True):
        reach = found.one("line", "reach")
        ends |= {value: found.one("circle")["cx"], value - 0.1: reach["x1"], value + 0.1: reach["x2"]}
    shares = {value: float(share.rstrip("%")) for value, share in ends.items()}
    low, high = min(shares), max(shares)
    for value, share in shares.items():
        expected = shares[low] + (shares[high] - shares[low]) * (value - low) / (high - low)
        assert share == pytest.approx(expected, abs=0.02)  # written with two decimals


def test_a_modality_shows_its_queries_and_the_other_system_that_does_best(page):
    row = rows_of(page.by_id("modalities"))["speech"]
    assert (row.all("td")[0].text, row.all("td")[2].text) == ("0.700 0.500 to 0.800", "3")
    assert row.all("td")[3].text == "Without frame 0.800, 0.700 to 0.900"
    assert row.one("rect")["width"] == "70.0%"


def test_the_ablation_begins_with_the_whole_and_shows_what_each_modality_is_worth(page):
    section = page.by_id("ablation")
    headers = [row.one("th").text for body in section.all("tbody") for row in body.all("tr")]
    assert headers == ["Sum of maxima", "Without frame", "Only speech"]
    (only,) = section.all("tbody")[2].all("tr")
    assert "−0.500 worse −0.550 to −0.450 <0.001 1 / 2 / 3" in only.text


def test_selection_and_cost_are_shown(page):
    selection = page.by_id("selection")
    assert "Accuracy 0.625" in selection.text and "Macro F1 0.500" in selection.text and "any" not in selection.text
    assert [bar["width"] for bar in selection.all("rect", "part")] == ["25.0%", "75.0%"]
    cost = page.by_id("cost").text
    for shown in ("15.2 kB", "412", "4.2 ms", "13.1 ms", "231 on 2 cores", "35 61 clips"):
        assert shown in cost


PARTS = {"systems": {"systems", "ablation"}, "modality_selection": {"selection"}, "cost": {"cost"}, "intervals": set()}
ALL_PARTS = {"systems", "modalities", "ablation", "selection", "cost", "queries"}


@pytest.mark.parametrize(
    "absent", [*PARTS, "created", "primary_measure", "overlap@10 with exact", "index_id", "system"]
)
def test_an_absent_key_leaves_its_part_out_and_nothing_else(tmp_path, absent):
    document = metrics()
    del document[absent]
    page = parse(evaluation_page(evaluation(tmp_path, document)))
    assert {name for name in ALL_PARTS if page.by_id(name)} == ALL_PARTS - PARTS.get(absent, set())
    linked = {link["href"] for link in page.one("nav").all("a")}
    assert linked == {f"#{name}" for name in ALL_PARTS - PARTS.get(absent, set())}


def test_a_folder_with_measures_only_is_a_page(tmp_path):
    known = {"schema": "maxreel-evaluation/1", "measures": {"all": measured(0.75)}}
    (tmp_path / "metrics.json").write_text(json.dumps(known))
    page = parse(evaluation_page(tmp_path))
    assert page.one("h1").text == "the system: nDCG@10 0.750"
    assert not any(page.by_id(name) for name in ALL_PARTS)


def test_a_figure_that_is_not_a_number_is_unknown(tmp_path):
    folder = evaluation(tmp_path, metrics(cost={"p50_seconds": float("nan"), "videos": 35}))
    assert "nan" not in parse(evaluation_page(folder)).text.lower()


# Queries and their clips


def queries_of(page):
    return page.one("ol", "queries").all("summary", "query")


def test_queries_stand_worst_first(page):
    assert [query.one("code").text for query in queries_of(page)] == ["q2", "q3", "q1"]
    assert [found.text for found in queries_of(page)[2].all(cls="value")] == ["nDCG@10 1.000", "R@1 1.000"]


def test_a_measure_of_all_queries_is_no_column_of_one(tmp_path):
    document = metrics(measures={"all": measured(0.75) | {"MdR": 3.0}})
    page = parse(evaluation_page(evaluation(tmp_path, document)))
    assert "MdR 3" in page.all("dl", "figures")[0].text
    assert "MdR" not in page.by_id("queries").text


def test_a_query_tells_which_systems_did_better_and_worse(page):
    beside = [found.text for found in page.all("p", "beside")]
    assert beside[0] == "Better here: Rank fusion 0.500 . The same: 2 systems."
    assert beside[2] == "Worse: Only speech 0.500 . The same: 2 systems."


def test_a_query_without_anything_to_open_is_no_disclosure(tmp_path):
    folder = evaluation(tmp_path)
    (folder / "systems.parquet").unlink()
    queries = parse(evaluation_page(folder)).one("ol", "queries")
    assert [found.one("code").text for found in queries.all("summary", "query")] == ["q2"]
    assert [found.one("code").text for found in queries.all("div", "query")] == ["q3", "q1"]


def test_a_clip_shows_its_best_moment_with_the_winning_patch(page):
    first, _, third = page.all("li", "clip")
    picture = first.one("img")
    assert picture["src"] == "data:image/jpeg;base64,/9hwaWN0dXJl"
    assert picture["alt"] == "Frame at 01:04, the patch that won is outlined"
    patch = first.one("rect", "patch")
    assert [patch[name] for name in ("x", "y", "width", "height")] == ["0.25", "0.5", "0.25", "0.25"]
    assert not third.all("img") and not third.all("rect", "patch")
    assert "1 Video 1" in first.text and "score 12.500" in first.text and "00:00 to 01:30 best at 01:04" in first.text


def test_a_query_shows_its_image(tmp_path):
    clips = [clip(1, query_image=b"\xff\xd8asked"), clip(2)]
    (asked,) = parse(evaluation_page(evaluation(tmp_path / "e", clips=clips))).all("img", "asked")
    assert asked["src"] == "data:image/jpeg;base64,/9hhc2tlZA=="
    assert asked["alt"] == "The query's image"


def test_a_clip_shows_its_relevance(page):
    badges = [clip.all(cls="badge")[0].text for clip in page.all("li", "clip")]
    assert badges == ["✓ Relevant, grade 2", "✕ Not relevant", "Not judged"]


def test_the_shares_of_a_score_fill_one_bar_from_the_largest(page):
    bar = page.all("svg", "shares")[0]
    assert bar["aria-label"] == "Share of the score by modality: speech 75 %, frame 25 %"
    assert [(part["x"], part["width"]) for part in bar.all("rect")] == [("0%", "75.0%"), ("75.0%", "25.0%")]


def test_winning_tokens_stand_with_their_match_the_best_first(page):
    rows = page.all("table", "winners")[0].one("tbody").all("tr")
    assert [row.text for row in rows] == [
        "price screen_text 00:04 SALE 0.900",
        "shoe speech 00:03 Buy Shoes , half off. 0.500",
        "sneaker metadata An advertisement for running gear 0.400",
        "at frame 00:04 0.100",
    ]


def test_winning_words_are_highlighted_where_they_stand(page):
    spans, rest = page.all("li", "clip")[0].all("ul", "spans")
    assert [[mark.text for mark in span.all("mark")] for span in spans.all("li")] == [["Shoes"], [], ["SALE"]]
    assert [span.one(cls="by").text for span in spans.all("li")] == [
        "matched by shoe",
        "matched by sneaker",
        "matched by price",
    ]
    # The same words at another time did not win.
    assert [span.text for span in rest.all("li")] == ["speech 00:09 Buy Shoes, half off."]


def test_tokens_beyond_the_first_six_are_folded(tmp_path):
    winners = [WINNERS[0] | {"token": f"t{index}", "score": float(index)} for index in range(9)]
    clips = [clip(winners=winners)]
    found = parse(evaluation_page(evaluation(tmp_path, clips=clips))).one("li", "clip")
    shown, folded = (table.one("tbody") for table in found.all("table"))
    assert [row.one("th").text for row in shown.all("tr")] == ["t8", "t7", "t6", "t5", "t4", "t3"]
    assert [row.one("th").text for row in folded.all("tr")] == ["t2", "t1", "t0"]
    assert found.all("summary")[0].text == "3 more query tokens"


def test_a_long_match_is_cut_around_its_word(tmp_path):
    text = "word " * 60 + "needle " + "word " * 60
    winner = WINNERS[0] | {"token": "needle", "text": text}
    row = (
        parse(evaluation_page(evaluation(tmp_path, clips=[clip(winners=[winner])])))
        .one("table", "winners")
        .all("td")[0]
    )
    assert row.one("mark").text == "needle" and len(row.text) < 120
    assert "… word" in row.text and row.text.endswith("…")


def test_highlighting_keeps_every_character():
    text = " Don't <b>stop</b>, İstanbul! "
    pieces = highlighted(text, {"don't", "stop"})
    assert "".join(piece for piece, _ in pieces) == text
    assert [piece for piece, won in pieces if won] == ["Don't", "stop"]


def test_a_thousand_queries_make_a_page_of_less_than_two_megabytes(tmp_path):
    queries = [(f"q{index:04}", f"a query about {index}", index / 1000, "speech") for index in range(1000)]
    html = evaluation_page(evaluation(tmp_path, queries=queries, clips=[clip(query_id="q0000")]))
    page = parse(html)
    assert len(queries_of(page)) == 1000 and len(page.all("img")) == 1
    assert "clips are kept for 1 of 1,000 queries" in page.text
    assert len(html) < 2_000_000


# Sweeps


def dots_of(page, chart):
    plot = next(figure for figure in page.all("figure") if figure.one("figcaption")["id"] == chart)
    return {dot["href"]: dot for dot in plot.all("a", "dot")}


def at(dot):
    disc = dot.one("circle", "disc")
    return tuple(float(disc[name].rstrip("%")) for name in ("cx", "cy", "r"))


def test_the_knee_is_the_headline_and_is_marked_in_both_charts(swept):
    assert swept.one("h1").text == "The knee: nDCG@10 0.700 at 4.0 ms and 4.0 kB a video"
    assert "5 of 6 settings measured, 1 failed; 4 in the Pareto set" in swept.one(cls="banner").text
    assert [dot["aria-label"].split("; ")[2:] for dot in swept.all("a", "knee")] == [
        ["nbits 4", "probes 4", "the knee"],
    ] * 2


def test_dots_lie_by_quality_and_cost_with_the_third_objective_as_area(swept):
    dots = dots_of(swept, "latency")
    by_quality = [at(dots[f"#setting-{row}"]) for row in range(5)]  # rows are sorted by quality
    assert [y for _, y, _ in by_quality] == sorted(y for _, y, _ in by_quality)
    assert sorted(range(5), key=lambda row: by_quality[row][0]) == [4, 1, 3, 0, 2]  # 2, 4, 5, 50, 90 ms
    assert by_quality[0][2] / by_quality[4][2] == pytest.approx(2, abs=0.05)  # 4000 against 1000 bytes, in pixels


def test_an_axis_over_decades_is_logarithmic(swept):
    dots = dots_of(swept, "latency")
    x = {row: at(dots[f"#setting-{row}"])[0] for row in (4, 1, 0)}
    # 2, 4 and 50 ms, written with two decimals
    assert (x[0] - x[1]) / (x[1] - x[4]) == pytest.approx(3.644, abs=0.01)
    assert "median latency, logarithmic" in swept.text


def test_the_front_joins_what_leads_in_the_two_objectives_of_its_chart(swept):
    for chart, rows in (("latency", [4, 1, 0]), ("bytes", [3, 0])):
        plot = next(figure for figure in swept.all("figure") if figure.one("figcaption")["id"] == chart)
        dots = dots_of(swept, chart)
        places = [at(dots[f"#setting-{row}"])[:2] for row in rows]
        lines = [
            tuple(float(line[name].rstrip("%")) for name in ("x1", "y1", "x2", "y2")) for line in plot.all(cls="front")
        ]
        assert lines == [(*a, *b) for a, b in zip(places, places[1:], strict=False)]


def test_a_dot_is_a_link_to_its_row_that_says_what_it_is(swept):
    dot = dots_of(swept, "latency")["#setting-0"]
    label = "nDCG@10 0.750 (0.700 to 0.800); 50.0 ms median, 4.0 kB a video; nbits 4; probes 16; in the Pareto set"
    assert dot["aria-label"] == dot.one("title").text == label
    assert swept.by_id("setting-0").one("code").text == "4016"


def test_dots_are_coloured_by_bits_unless_chosen_otherwise(swept):
    dots = dots_of(swept, "latency")
    assert [dots[f"#setting-{row}"]["data-colours"] for row in range(5)] == ["1 1", "1 0", "1 2", "0 1", "0 0"]
    assert all(f"c{dot['data-colours'][0]}" in dot["class"].split() for dot in dots.values())
    assert [found.text for found in swept.one("select").all("option")] == ["nbits", "probes"]
    shown, other = swept.all("p", "values")
    assert shown.text == "nbits 1 nbits 4" and "hidden" not in shown.attributes and "hidden" in other.attributes


def test_the_table_has_every_measured_setting_best_first(swept):
    table = swept.one("table", "cells")
    heads = table.one("thead").all("th")
    assert [head.text for head in heads][:5] == ["Setting", "nbits", "probes", "nDCG@10", "R@1"]
    assert [head.text for head in heads if "aria-sort" in head.attributes] == ["nDCG@10"]
    assert all(len(head.all("button")) == 1 for head in heads[1:])
    rows = table.one("tbody").all("tr")
    assert [row.all("td")[2].text for row in rows][:2] == ["0.750 0.700 to 0.800", "0.700 0.650 to 0.750"]
    assert [row.all("td")[1]["data-by"] for row in rows] == ["16", "4", "64", "16", "4"]
    assert [badge.text for badge in table.all(cls="badge")] == ["Pareto", "knee", "Pareto", "Pareto"]


def test_failed_settings_are_listed_with_their_error(swept):
    assert [found.text for found in swept.one("ul", "errors").all("li")] == [
        "nbits 1, probes 64 ScheduleError: 12 CPUs"
    ]


def test_what_was_reused_and_what_did_not_vary_is_told(swept):
    facts = swept.one("dl", "facts").text
    for fact in (
        "Encodings 1",
        "Indices 2",
        "From the cache 3",
        "device cpu in all",
        "Time 31 min",
    ):
        assert fact in facts


def test_the_knee_is_a_configuration_with_its_command(swept, tmp_path):
    shown = [block.text for block in swept.all("pre")]
    assert shown[0] == "search: probes: 4"
    assert f"maxreel build-index -c '{tmp_path}/a sweep/best.yaml' --store STORE" in shown[1]


def test_a_sweep_without_a_knee_or_best_is_a_page(tmp_path):
    page = parse(sweep_page(sweep(tmp_path, cells=CELLS[:1], best=None, reused=None)))
    assert page.one("h1").text == "1 setting, no knee"
    assert (
        not page.all("pre") and not page.all("figure") and len(page.one("table", "cells").one("tbody").all("tr")) == 1
    )


def test_a_sweep_in_which_all_failed_is_a_page(tmp_path):
    page = parse(sweep_page(sweep(tmp_path, cells=CELLS[-1:])))
    assert "12 CPUs" in page.text and not page.all("table")


def test_a_setting_without_a_latency_is_in_the_table_and_not_in_its_chart(tmp_path):
    page = parse(sweep_page(sweep(tmp_path, cells=[*CELLS, cell(1, 64, 0.3, 1.0, 900, p50_seconds=None)])))
    assert len(dots_of(page, "latency")) == 5 and len(dots_of(page, "bytes")) == 6
    assert len(page.one("table", "cells").one("tbody").all("tr")) == 6


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0.61, 0.83, False), (0, 1, False), (3, 3, False), (0.002, 0.9, True)]
)
def test_an_axis_has_a_few_round_ticks_within_it(low, high, log):
    axis = Axis.over([low, high], log)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 6 and all(axis.low <= tick <= axis.high for tick in ticks)
    assert all(len(f"{tick:g}") <= 5 for tick in ticks)
    assert 0 <= axis.share(low) <= axis.share(high) <= 100


# What came from outside, and what a browser is allowed


def hostile_evaluation(folder):
    title, name, query, template = HOSTILE
    spans = [span | {"text": title, "modality": name} for span in SPANS]
    winners = [winner | {"token": query, "text": title, "modality": name} for winner in WINNERS]
    shares = [{"modality": name, "share": 1.0}]
    clips = [clip(query_id=name, title=title, video_id=template, spans=spans, winners=winners, shares=shares)]
    document = metrics(scorer=title, index_id=name, created="2026-03-01T02:10:00")
    document["systems"]["rrf"] |= {"label": title, "kind": template}
    document["measures"][name] = document["measures"]["speech"]
    document["modality_selection"]["predicted"] = {title: 1.0}
    return evaluation(folder, document, [(name, query, 0.0, title), ("q", title, 0.1, template)], clips)


def hostile_sweep(folder):
    settings = {name: name for name in HOSTILE}
    cells = [known | {"id": HOSTILE[0], "settings": settings, "error": None} for known in CELLS[:-1]]
    cells += [{"id": HOSTILE[1], "settings": settings, "error": HOSTILE[0]}]
    return sweep(folder, cells, best=HOSTILE[0], axes={name: [name, "other"] for name in HOSTILE})


EVERY = [
    (evaluation_page, evaluation),
    (evaluation_page, hostile_evaluation),
    (sweep_page, sweep),
    (sweep_page, hostile_sweep),
]


@pytest.mark.parametrize(
    ("to_html", "make", "plain"),
    [(evaluation_page, hostile_evaluation, evaluation), (sweep_page, hostile_sweep, sweep)],
)
def test_hostile_texts_are_shown_and_are_never_markup(tmp_path, to_html, make, plain):
    page = parse(to_html(make(tmp_path / HOSTILE[2])))
    known = {element.tag for element in parse(to_html(plain(tmp_path / "plain")))}
    assert all(text in page.text for text in HOSTILE)
    assert {element.tag for element in page} <= known and len(page.all("script")) == 1
    assert not [name for element in page for name in element.attributes if name.startswith("on")]


@pytest.mark.parametrize(("to_html", "make"), EVERY)
def test_a_page_asks_for_nothing(tmp_path, to_html, make):
    page = parse(to_html(make(tmp_path)))
    (policy,) = (e["content"] for e in page.all("meta") if e.attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'")
    links = [
        value for e in page for name, value in e.attributes.items() if name in ("href", "src", "xlink:href", "action")
    ]
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in links)
    assert not page.all("link") and not page.all("iframe") and not page.all("form")
    own = " ".join(str(text) for e in page.all("style") + page.all("script") for text in e.content)
    assert not re.search(r"https?:|url\(|@import|fetch|XMLHttpRequest|import\(", own)


@pytest.mark.parametrize(("to_html", "make"), EVERY)
def test_a_page_can_be_read_by_ear(tmp_path, to_html, make):
    page = parse(to_html(make(tmp_path)))
    assert page.one("html")["lang"] == "en" and page.one("head").one("title").text.endswith("– maxreel")
    names = [e["id"] for e in page if "id" in e.attributes]
    assert len(names) == len(set(names))
    pointed = [e[key] for e in page for key in ("aria-labelledby", "for") if key in e.attributes]
    pointed += [e["href"][1:] for e in page.all("a")]
    assert set(pointed) <= set(names)
    assert len(page.all("h1")) == 1 and page.all("main")
    for table in page.all("table"):
        assert table.all("caption")[0].text and all("scope" in head.attributes for head in table.all("th"))
    assert all("alt" in picture.attributes for picture in page.all("img"))
    assert all("aria-label" in dot.attributes for dot in page.all("a", "dot"))


@pytest.mark.parametrize(("to_html", "name"), [(evaluation_page, "metrics.json"), (sweep_page, "sweep.json")])
@pytest.mark.parametrize("text", [None, "{", '{"schema": "other/1"}', "[]"])
def test_a_folder_that_is_something_else_is_named(tmp_path, to_html, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / name))):
        to_html(tmp_path)


def test_a_table_that_cannot_be_read_is_named(tmp_path):
    folder = evaluation(tmp_path)
    (folder / "details.parquet").write_text("no parquet")
    with pytest.raises(ConfigError, match=re.escape(str(folder / "details.parquet"))):
        evaluation_page(folder)


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    opened = Chromium(program, tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page, and at the end asks whether it fetched, broke or forbade anything."""

    def show(to_html, make, width=1000, height=900, scheme="light"):
        path = tmp_path / "page.html"
        path.write_text(to_html(make(tmp_path / "folder")), encoding="utf-8")
        browser.open(path, width, height, scheme)
        return browser

    yield show
    assert [url for url in browser.requests() if not url.startswith("file:")] == []
    assert browser.complaints() == []


def tab_to(browser, selector):
    for _ in range(60):
        if browser.run(f"document.activeElement.matches({json.dumps(selector)})"):
            return
        browser.press("Tab")
    raise AssertionError(f"no way to {selector} by Tab")


def test_a_query_opens_and_closes_from_the_keyboard(opened):
    browser = opened(evaluation_page, evaluation)
    tab_to(browser, "summary.query")
    is_open = "document.activeElement.parentElement.open"
    assert browser.run(is_open) is False
    browser.press("Enter")
    assert browser.run(is_open) is True
    assert browser.run("document.querySelector('.clip').checkVisibility()") is True
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press(" ")
    assert browser.run(is_open) is False


def test_queries_are_filtered_by_what_is_typed(opened):
    browser = opened(evaluation_page, evaluation)
    tab_to(browser, "#filter")
    browser.press(*"half", " ", *"speech")
    shown = "[...document.querySelectorAll('.queries > li')].filter(row => row.checkVisibility()).length"
    assert browser.run(shown) == 1
    assert browser.run("document.getElementById('filtered').textContent") == "1 of 3 queries"
    browser.run("document.getElementById('filter').select()")
    browser.press("Backspace")
    assert browser.run(shown) == 3


def test_dots_tell_their_settings_and_lead_to_their_rows_from_the_keyboard(opened):
    browser = opened(sweep_page, sweep)
    tab_to(browser, ".dot")
    tip = (
        "[...document.querySelectorAll('.tip')].filter(tip => tip.checkVisibility()).map(tip => tip.textContent).join()"
    )
    assert "the knee" in browser.run(tip)  # where one comes in
    browser.press("ArrowRight")
    assert "0.600" in browser.run(tip) and "probes 16" in browser.run(tip)
    browser.press("Escape")
    assert browser.run(tip) == ""
    browser.press("Home", "Enter")
    assert browser.run("document.querySelector('tr:target code').textContent") == "1004"
    assert browser.run("document.querySelectorAll('.dot[tabindex=\"0\"]').length") == 2  # one a chart


def test_settings_are_sorted_by_the_column_that_is_pressed(opened):
    browser = opened(sweep_page, sweep)
    first = "document.querySelector('.cells tbody tr code').textContent"
    sorted_by = "[...document.querySelectorAll('th[aria-sort]')].map(th => th.textContent + ' ' + th.ariaSort).join()"
    assert browser.run(sorted_by) == "nDCG@10 descending"
    tab_to(browser, "th:nth-child(3) button")
    browser.press("Enter")
    assert (browser.run(first), browser.run(sorted_by)) == ("4064", "probes descending")
    browser.press("Enter")
    assert (browser.run(first), browser.run(sorted_by)) == ("4004", "probes ascending")


def test_dots_take_the_colours_of_the_chosen_setting(opened):
    browser = opened(sweep_page, sweep)
    browser.run("const s = document.querySelector('select'); s.value = 1; s.dispatchEvent(new Event('change'))")
    dots = "[0, 1, 2, 3, 4].map(row => document.querySelector(`[href='#setting-${row}']`))"
    assert browser.run(dots + ".map(dot => dot.getAttribute('class').match(/c\\d/)[0])") == [
        "c1",
        "c0",
        "c2",
        "c1",
        "c0",
    ]
    assert browser.run("document.querySelector('.values:not([hidden])').textContent").startswith("probes 4")


TALL = 12_000
"""Pixels: rows of queries are laid out when they come into the window."""


@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize(("to_html", "make"), EVERY)
def test_a_page_is_no_wider_than_its_window(opened, to_html, make, width):
    browser = opened(to_html, make, width, TALL)
    browser.run("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.querySelector('h1').checkVisibility()")


CONTRASTS = """(() => {
  const parse = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
  const linear = value => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = element => {
    const colour = parse(getComputedStyle(element).backgroundColor);
    return colour.length === 3 || colour[3] === 1 ? colour : behind(element.parentElement);
  };
  const weak = new Set();
  for (const element of document.body.querySelectorAll("*")) {
    if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
    if (!element.checkVisibility() || ["SCRIPT", "STYLE", "OPTION"].includes(element.tagName)) continue;
    const style = getComputedStyle(element), drawn = element instanceof SVGElement ? style.fill : style.color;
    const [dark, bright] = [light(parse(drawn)), light(behind(element))].sort((a, b) => a - b);
    const ratio = (bright + 0.05) / (dark + 0.05);
    if (ratio < 4.5) weak.add(`${element.tagName}.${element.getAttribute("class")}: ${ratio.toFixed(2)}`);
  }
  return [...weak];
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("to_html", "make"), [EVERY[0], EVERY[2]])
def test_every_text_stands_out_from_what_is_behind_it(opened, to_html, make, scheme):
    browser = opened(to_html, make, height=TALL, scheme=scheme)
    browser.run("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    assert browser.run(CONTRASTS) == []
