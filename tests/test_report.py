import json
import shlex
import statistics
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

import pytest

from operators.errors import without_credentials
from pipelines.report import SCHEMA, Prices, make_report
from pipelines.report_page import to_html
from pipelines.report_text import to_text

FIRST_NIGHT = datetime(2026, 3, 1, 2, tzinfo=UTC)
VOID = {"meta", "link", "br", "hr", "img", "input"}


def summary(**parts):
    return {
        "job": "nightly",
        "run_id": "run",
        "headline": "published release 13: 120 new, 60 changed, 55 gone, 2 failed",
        "counts": {"listed": 4000, "new": 120, "changed": 60, "gone": 55, "unchanged": 3765, "failed": 2, "waiting": 7},
        "samples": {"new": ["fresh.mp4"], "changed": ["edited.mp4"], "gone": ["deleted.mp4"]},
        "tokens": {"frame": 1000, "speech": 300},
        "failures": [],
        "stages": {"decode": stage(100, 80.0, actors=4), "encode": stage(100, 10.0)},
        "bottleneck": "decode",
        "seconds": {"extract": 50.0, "encode": 20.0, "total": 1800.0},
        "resources": {"CPU": 8.0, "GPU": 1.0},
        "store_bytes": 500_000_000_000,
        "index": {
            "index_id": "index-13",
            "clips": 9000,
            "tokens": 1_234_567,
            "segments": 12,
            "bytes": 44_000_000,
            "bytes_per_token": 35.6,
            "new_segments": 1,
            "merged_segments": 3,
            "dead_clips": 77,
            "rebuilt": None,
            "drift": 0.031,
            "drift_limit": 0.1,
            "tokens_by_modality": {"frame": 1_000_000, "speech": 234_567},
        },
        "gates": [gate("recall", 0.95, 0.9)],
        "release": {"release_id": 13, "state": "published", "live_before": 12},
    } | parts


def stage(rows, seconds, actors=1):
    return {"rows": rows, "seconds": seconds, "cpu_seconds": seconds, "actors": actors}


def gate(name, value, limit, passed=True):
    return {"name": name, "value": value, "limit": limit, "passed": passed, "detail": ""}


def failure(video_id, stage="decode", error="DecodeError", message="no moov atom", attempts=1, **more):
    known = {"video_id": video_id, "stage": stage, "error": error, "message": message, "attempts": attempts}
    return known | {"final": False, "quarantined": False} | more


def night(day=0, status="ok", exit_code=0, text=None, job="nightly", **parts):
    """A row of ``runs``, ``day`` nights after the first."""
    started = FIRST_NIGHT + timedelta(days=day)
    return {
        "run_id": f"run-{day}",
        "job": job,
        "status": status,
        "exit_code": exit_code,
        "started": started,
        "stopped": started + timedelta(minutes=30),
        "config": "{}",
        "code_version": "0.9",
        "summary": json.dumps(summary(**parts)) if text is None else text,
    }


def decoded_in(day, seconds, **more):
    """A night on which one actor decoded 100 rows."""
    return night(day, stages={"decode": stage(100, seconds)}, **more)


def report(run=None, earlier=(), store="s3://bucket/store", **more):
    return make_report(run or night(20), earlier, store, **more)


def refused(**more):
    return night(
        20,
        status="failed",
        exit_code=4,
        headline="NOT PUBLISHED: gate recall is 0.71, limit 0.90; release 12 stays live",
        gates=[gate("recall", 0.71, 0.9, passed=False)],
        release={"release_id": 13, "state": "refused", "live_before": 12},
        **more,
    )


EARLY = {
    "died with counts only": night(20, "died", None, text='{"counts": {"listed": 4000, "new": 120}}')
    | {"stopped": None},
    "failed before anything": night(20, "failed", 1, text="{}"),
    "no summary": night(20, "failed", 2, text=""),
    "null summary": night(20, "died", None, text=None) | {"summary": None, "started": None, "stopped": None},
    "malformed summary": night(20, "failed", 1, text='{"counts": '),
    "every part null": night(20, "failed", 1, **dict.fromkeys(summary())),
    "parts of the wrong kind": night(20, "failed", 1, counts=[], failures={}, stages=[], gates=[None], index="x"),
    "running": night(20, "running", None, text="{}") | {"stopped": None},
    "stage without figures": night(20, stages={"decode": None, "encode": {"rows": 3, "seconds": 0, "actors": 0}}),
}


@pytest.fixture(params=EARLY.values(), ids=EARLY.keys())
def early(request):
    return request.param


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and the text outside of style sheets."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def tags(self):
        return [tag for tag, _ in self.elements]


def commands(document):
    return [entry["command"] for entry in document["commands"]]


def section(text, title):
    return next(part for part in text.split("\n\n") if part.startswith(title))


# What happened


def test_the_first_line_says_what_happened_and_what_readers_see():
    first = to_text(report()).splitlines()[0]
    assert first == "published release 13: 120 new, 60 changed, 55 gone, 2 failed. Readers see release 13."


def test_the_first_line_of_a_refused_night_says_that_the_old_release_is_seen():
    first = to_text(report(refused())).splitlines()[0]
    assert first.startswith("NOT PUBLISHED: gate recall is 0.71") and first.endswith("Readers see release 12.")


def test_the_headline_is_the_heading_of_the_page():
    page = Page(to_html(report(refused())))
    assert page.tags().count("h1") == 1
    assert "NOT PUBLISHED: gate recall is 0.71, limit 0.90; release 12 stays live Readers see release 12." in page.text


@pytest.mark.parametrize(("status", "word"), [("died", "DIED"), ("failed", "FAILED"), ("running", "STILL RUNNING")])
def test_a_night_without_a_headline_gets_one(status, word):
    assert to_text(report(night(20, status, None, text="{}"))).startswith(word)


def test_a_release_published_by_a_run_that_then_failed_is_seen_by_readers_and_wants_a_look():
    document = report(night(20, "failed", 3))
    assert document["outcome"] == "published" and document["readers"] == "Readers see release 13."
    assert document["tone"] == "warn"
    assert "Exit code 3: more videos failed than max_failure_rate allows." in document["attention"]


def test_an_uneventful_night_wants_no_look():
    document = report(earlier=[night(19)])
    assert document["attention"] == []
    assert "NEEDS A LOOK" not in to_text(document) and "Needs a look" not in to_html(document)


def test_counts_come_with_sample_ids():
    lines = section(to_text(report()), "VIDEOS").splitlines()
    found = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert found["new"] == ["120", "fresh.mp4"]
    assert found["changed"] == ["60", "edited.mp4"]
    assert found["gone"] == ["55", "deleted.mp4"]
    assert found["unchanged"] == ["3,765"] and found["failed"] == ["2"] and found["waiting"] == ["7"]


def test_a_count_that_a_finished_run_left_out_is_zero_and_one_that_a_dead_run_did_not_reach_is_unknown():
    assert report(night(20, counts={"listed": 5}))["counts"]["gone"] == 0
    assert report(EARLY["died with counts only"])["counts"]["gone"] is None


# Failures


def test_failures_are_grouped_by_stage_and_error_the_most_frequent_first():
    failures = [failure("a", error="OpenError"), *(failure(f"v{i}") for i in range(4)), failure("b", stage="speech")]
    causes = report(night(20, failures=failures))["failures"]["causes"]
    assert [(cause["stage"], cause["error"], cause["videos"]) for cause in causes] == [
        ("decode", "DecodeError", 4),
        ("decode", "OpenError", 1),
        ("speech", "DecodeError", 1),
    ]
    assert [sample["video_id"] for sample in causes[0]["samples"]] == ["v0", "v1", "v2"]


def test_a_failure_shows_its_message_attempts_and_quarantine():
    failures = [failure("a.mp4", message="no moov atom", attempts=3, quarantined=True), failure("b.mp4", attempts=1)]
    text = section(to_text(report(night(20, failures=failures))), "FAILURES")
    assert "2 x decode: DecodeError (1 quarantined)" in text
    assert "a.mp4 (3 attempts, quarantined)" in text and "no moov atom" in text
    assert "b.mp4 (1 attempt, tried again next run)" in text


def test_a_video_that_failed_twice_for_one_cause_counts_once():
    (cause,) = report(night(20, failures=[failure("a"), failure("a")]))["failures"]["causes"]
    assert cause["videos"] == 1 and len(cause["samples"]) == 1


def test_the_true_number_of_failures_is_told_when_fewer_are_listed():
    counts = {"listed": 4000, "failed": 900}
    document = report(night(20, counts=counts, failures=[failure("a"), failure("b")]))
    assert "FAILURES: 900 VIDEOS, 2 OF THEM BELOW" in to_text(document)
    assert "Failures: 900 videos, 2 of them below" in Page(to_html(document)).text


# Against the nights before


def test_a_stage_is_compared_with_the_median_of_seven_nights_and_an_eighth_is_ignored():
    seconds = [9000.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.0]
    earlier = [decoded_in(day, value) for day, value in enumerate(seconds)]
    (decode,) = report(decoded_in(20, 26.0), earlier)["stages"]
    assert decode["median_seconds"] == statistics.median(seconds[1:]) == 13.0
    assert decode["times_slower"] == pytest.approx(2.0)  # a quotient of two rates


def test_only_nights_of_the_same_job_that_ended_are_compared_with():
    others = [
        decoded_in(1, 500.0, job="index"),
        decoded_in(2, 500.0, status="died"),
        decoded_in(3, 500.0, status="running"),
    ]
    document = report(decoded_in(20, 10.0), [decoded_in(0, 10.0), *others, decoded_in(20, 500.0)])
    assert document["stages"][0]["median_seconds"] == 10.0
    assert [entry["run_id"] for entry in document["nights"]] == ["run-0", "run-20"]


@pytest.mark.parametrize(("seconds", "slow"), [(14.9, False), (15.0, True), (30.0, True)])
def test_a_stage_is_flagged_from_one_and_a_half_times_the_median(seconds, slow):
    document = report(decoded_in(20, seconds), [decoded_in(day, 10.0) for day in range(7)])
    assert document["stages"][0]["slow"] is slow
    assert ("SLOWER" in section(to_text(document), "STAGES")) is slow
    assert any("decode" in note for note in document["attention"]) is slow


def test_a_night_with_twice_the_work_is_not_a_slow_one():
    document = report(night(20, stages={"decode": stage(200, 20.0)}), [decoded_in(0, 10.0)])
    assert document["stages"][0]["times_slower"] == pytest.approx(1.0)  # a quotient of two rates


def test_throughput_counts_the_seconds_that_the_actors_shared():
    decode = report()["stages"][0]
    assert (decode["seconds"], decode["rows_per_second"]) == (20.0, 5.0)  # 100 rows, 80 busy seconds, 4 actors


def test_the_bottleneck_is_marked():
    document = report(night(20, bottleneck="encode"))
    marked = [line for line in to_text(document).splitlines() if "bottleneck" in line]
    assert [line.split()[0] for line in marked] == ["encode"]
    assert "encode Bottleneck" in Page(to_html(document)).text


def test_steps_are_given_in_wall_seconds_against_the_median():
    earlier = [night(day, seconds={"extract": value, "total": 60.0}) for day, value in enumerate([20.0, 25.0, 30.0])]
    steps = {step["name"]: step for step in report(earlier=earlier)["steps"]}
    assert steps["extract"] == {"name": "extract", "seconds": 50.0, "median_seconds": 25.0, "ratio": 2.0}
    assert steps["encode"]["median_seconds"] is None
    assert list(steps)[-1] == "total" and steps["total"]["ratio"] == 30.0


def test_a_gate_shows_its_limit_verdict_and_the_nights_before():
    earlier = [
        night(0, gates=[gate("recall", 0.93, 0.9)]),
        night(1, gates=[]),
        night(2, gates=[gate("recall", 0.94, 0.9)]),
    ]
    document = report(refused(), earlier)
    assert document["gates"][0]["earlier"] == [0.93, None, 0.94]
    (line,) = [line for line in to_text(document).splitlines() if line.startswith("  recall")]
    assert line.split() == ["recall", "FAILED", "0.710", "0.900", "0.930", "–", "0.940"]


def test_drift_above_its_limit_wants_a_look():
    document = report(night(20, index=summary()["index"] | {"drift": 0.2, "rebuilt": "codec drift"}))
    assert "Codec drift is 0.200, limit 0.100: the codec no longer fits." in document["attention"]
    assert "The index was rebuilt: codec drift." in document["attention"]


def test_the_page_draws_a_trend_of_each_night_that_has_a_value():
    earlier = [night(day) for day in range(5)] + [night(6, seconds={}, counts={}, gates=[]) | {"stopped": None}]
    labels = [found["aria-label"] for tag, found in Page(to_html(report(earlier=earlier))).elements if tag == "svg"]
    (total,) = [label for label in labels if label.startswith("Total time")]
    assert total.count("30 min") == 6 and total.count("–") == 1


def test_a_first_night_draws_no_trend_and_says_so():
    document = report()
    assert "No earlier night to compare with" in Page(to_html(document)).text
    assert "MEDIAN OF" not in to_text(document)


# The index, the cost and what to type


def test_index_and_tokens_are_shown():
    text = to_text(report())
    assert "44.0 MB, 35.6 bytes a token" in text
    assert "12 (1 new, 3 merged)" in text and "dead clips  77" in text
    rows = [line.split() for line in section(text, "TOKENS").splitlines()[2:]]
    assert rows == [["frame", "1,000", "1,000,000"], ["speech", "300", "234,567"]]


def test_without_prices_nothing_is_said_of_cost():
    document = report()
    assert document["cost"] is None
    for shown in (to_text(document), to_html(document)):
        assert "cost" not in shown.lower() and "EUR" not in shown


def test_cost_is_hours_times_prices_and_storage_is_by_the_month():
    document = report(prices=Prices("EUR", cpu_hour=0.05, gpu_hour=2.0, gb_month=0.02))
    assert document["cost"]["run"] == pytest.approx(8 * 0.5 * 0.05 + 1 * 0.5 * 2.0)  # half an hour, in floats
    assert document["cost"]["store_month"] == pytest.approx(10.0)  # 500 GB
    for shown in (to_text(document), Page(to_html(document)).text):
        assert "EUR 1.20" in shown and "EUR 10.00" in shown


def test_a_night_that_recorded_no_resources_has_an_unknown_cost_not_none():
    document = report(night(20, resources=None, store_bytes=None), prices=Prices("EUR", 1.0))
    assert document["cost"]["run"] is None and document["cost"]["store_month"] is None
    assert "EUR" not in to_text(document) and "ended before it recorded" in to_text(document)


def test_the_rollback_command_goes_to_the_release_before_and_quotes_the_store():
    document = report(store="s3://bucket/it's a; store")
    assert shlex.split(commands(document)[0]) == [
        *("maxreel", "rollback", "--to", "12", "--store", "s3://bucket/it's a; store", "--reason", "..."),
    ]
    assert commands(document)[0] in Page(to_html(document)).text


@pytest.mark.parametrize(
    "release",
    [
        {"release_id": 1, "state": "published", "live_before": None},
        {"release_id": 13, "state": "unchanged", "live_before": 12},
        None,
    ],
)
def test_there_is_no_rollback_without_a_published_release_and_one_before(release):
    assert not any("rollback" in command for command in commands(report(night(20, release=release))))


def test_a_refused_release_can_be_published_all_the_same():
    assert "maxreel publish 13 --store s3://bucket/store" in commands(report(refused()))
    assert not any("rollback" in command for command in commands(report(refused())))


def test_the_failures_command_is_there_where_something_failed():
    listing = "maxreel failures --run run-20 --store s3://bucket/store"
    assert listing in commands(report())
    assert listing not in commands(report(night(20, counts={"listed": 4000})))


def test_a_long_command_is_continued_as_a_shell_reads_it():
    document = report(store="s3://bucket/" + "folder/" * 9 + "a store")
    lines = section(to_text(document), "NEXT").splitlines()
    start = next(index for index, line in enumerate(lines) if "rollback" in line)
    assert lines[start].endswith("\\")
    typed = "\n".join(lines[start : next(index for index, line in enumerate(lines) if "--reason" in line) + 1])
    assert shlex.split(typed.replace("\\\n", "")) == shlex.split(commands(document)[0])


# Nights that ended early


def test_a_night_that_ended_early_renders_in_every_form(early):
    document = report(early, [night(day) for day in range(7)], prices=Prices("EUR", 1.0))
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["headline"] in to_text(document)
    assert document["headline"] in Page(to_html(document)).text


def test_a_night_that_ended_early_is_compared_with_without_harm(early):
    document = report(night(21), [early | {"status": "failed"}])
    assert to_text(document) and Page(to_html(document)).open == []


# What came from outside


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "x' onmouseover='alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "v" * 500,
    "🎬 видео 视频",
]


def hostile():
    failures = [failure(video_id, video_id, video_id, f"</p>{video_id}") for video_id in HOSTILE]
    stages = {name: stage(1, 1.0) for name in HOSTILE}
    gates = [gate(name, 0.5, 0.5) | {"detail": name} for name in HOSTILE]
    samples = {"new": HOSTILE, "changed": HOSTILE, "gone": HOSTILE}
    run = night(20, headline=HOSTILE[0], samples=samples, failures=failures, stages=stages, gates=gates)
    return report(run | {"run_id": HOSTILE[1]}, [run], store="/data/" + HOSTILE[1])


def test_hostile_ids_are_text_on_the_page_and_never_markup():
    page = Page(to_html(hostile()))
    plain = Page(to_html(report(night(20, failures=[failure("a")]), [night(1)])))
    assert all(video_id in page.text for video_id in HOSTILE[:5])
    assert set(page.tags()) <= set(plain.tags())
    assert not [name for _, found in page.elements for name in found if name.startswith("on") or name == "src"]


def test_the_page_fetches_nothing_and_runs_nothing():
    html = to_html(report(earlier=[night(day) for day in range(7)]))
    for forbidden in ("http:", "https:", "src=", "href=", "@import", "url(", "<script", "<link", "<iframe"):
        assert forbidden not in html
    policies = [found["content"] for tag, found in Page(html).elements if tag == "meta" and "http-equiv" in found]
    assert policies and policies[0].startswith("default-src 'none'; style-src 'unsafe-inline'")


@pytest.mark.parametrize("make", [report, lambda: report(refused(), [night(1)]), hostile])
def test_the_page_is_well_formed(make):
    page = Page(to_html(make()))
    assert page.open == []
    assert page.tags().count("table") == page.tags().count("caption") > 0
    assert [name for tag, found in page.elements if tag == "meta" for name in found.values()].count("viewport") == 1


def test_control_characters_reach_no_form():
    video_id = "a\x1b[31mred\nsecond\x00line\u202egnp.exe\ud800"
    document = report(night(20, samples={"new": [video_id]}, failures=[failure(video_id, message=video_id)]))
    for shown in (to_text(document), to_html(document)):
        assert not set(shown) & set("\x1b\x00\u202e\ud800")
        shown.encode()
    assert document["samples"]["new"] == ["a\ufffd[31mred second\ufffdline\ufffdgnp.exe\ufffd"]


def test_text_stays_within_100_columns():
    document = hostile()
    body = to_text(document).split("\nNEXT\n")[0]
    assert len(body.splitlines()) > 40
    assert max(map(len, body.splitlines())) <= 100


# The document


def test_the_document_is_plain_json_with_its_schema():
    document = report(refused(failures=[failure("a")]), [night(1)], prices=Prices("EUR", 1.0))
    assert document["schema"] == SCHEMA == "maxreel.report/1"
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_a_document_read_back_from_json_shows_the_same():
    document = report(earlier=[night(1)])
    again = json.loads(json.dumps(document))
    assert to_text(again) == to_text(document) and to_html(again) == to_html(document)


def test_a_figure_that_is_not_a_number_is_unknown():
    document = report(night(20, gates=[gate("recall", float("nan"), 0.9, passed=None)]))
    assert document["gates"][0]["value"] is None
    assert "not measured" in to_text(document)


# Credentials


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/a.mp4", "s3://bucket/a.mp4"),
        ("s3://key:secret@bucket/a.mp4", "s3://bucket/a.mp4"),
        ("s3://key:se/cr?et@bucket/a.mp4", "s3://bucket/a.mp4"),
        ("http://user@host/a", "http://host/a"),
        ("https://host/a.mp4?X-Amz-Signature=abc&b=c", "https://host/a.mp4"),
        ("http://host:9000/a@b.mp4", "http://host:9000/a@b.mp4"),
        ("GET 'https://u:p@host/a?sig=abc': 403", "GET 'https://host/a': 403"),
        ("from http://a:b@c/d?e to http://f:g@h/i?j", "from http://c/d to http://h/i"),
        ("is this a question? mail me@host", "is this a question? mail me@host"),
    ],
)
def test_a_uri_loses_its_credentials_and_its_query_and_nothing_else(text, shown):
    assert without_credentials(text) == shown


def test_no_form_shows_a_credential_or_a_query():
    uri = "https://user:hunter2@host/a.mp4?signature=topsecret"
    run = night(20, headline=f"failed on {uri}", failures=[failure(uri, message=f"m {uri} " + "x" * 960 + uri)])
    document = report(run, store="s3://user:hunter2@bucket/a store?signature=top secret topsecret")
    for shown in (json.dumps(document), to_text(document), to_html(document)):
        assert "hunter2" not in shown and "signature" not in shown and "secret" not in shown
    assert document["store"] == "s3://bucket/a store"


def test_a_long_message_is_not_cut_in_the_middle_of_a_credential():
    message = "x" * 970 + " https://user:hunter2-and-the-rest-of-a-long-password@host/a.mp4"
    document = report(night(20, failures=[failure("a", message=message)]))
    assert "hunter2" not in json.dumps(document)
