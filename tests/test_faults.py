"""A run may die at any moment: SIGKILL at several stages, SIGTERM, and two nights at once. `benchmarks/faults.py` kills
more."""

import random
import signal
import time

import pytest

from benchmarks.faults import Corpus, Faults, Kill
from cluster.lease import current
from cluster.store import RUNS


@pytest.fixture
def faults(tmp_path):
    return Faults(tmp_path, Corpus(tmp_path / "corpus", num_texts=12, num_files=4), random.Random(0))


def runs(store):
    rows = store.open(RUNS).to_table(columns=["run_id", "status", "exit_code"]).to_pylist()
    return [(row["status"], row["exit_code"]) for row in rows]


def wait_for_lease(store, process):
    while process.poll() is None:
        _, holder = current(store)
        if holder is not None and not holder.released:
            return holder
        time.sleep(0.05)
    raise AssertionError(process.log.read_text())


@pytest.mark.slow
def test_nights_killed_at_several_stages_end_as_if_undisturbed(faults):
    """An actor and the driver; every row, what readers see at each kill, and what is left behind."""
    faults.undisturbed_night()
    faults.night([[Kill("actor", "encode", 1, 0.0), Kill("driver", "index", 3, 0.0)]])
    assert faults.wrong == []
    assert sum(faults.table.values()) >= 2, faults.table


def test_a_night_that_is_asked_to_end_frees_the_store_for_the_next_which_keeps_others_out(faults):
    asked = faults.start(faults.store)
    wait_for_lease(faults.store, asked)
    while "to do" not in asked.log.read_text():  # Ray is up, and has signal handlers of its own
        assert asked.poll() is None, asked.log.read_text()
        time.sleep(0.05)
    asked.send_signal(signal.SIGTERM)
    assert asked.wait(timeout=60) == 143
    assert current(faults.store)[1].released
    assert runs(faults.store) == [("failed", 143)]

    first = faults.start(faults.store)
    holder = wait_for_lease(faults.store, first)
    second = faults.run(faults.store)
    assert second.code == 5
    assert f"is held by run {holder.run_id} (nightly)" in second.error
    assert first.wait(timeout=300) == 0, first.log.read_text()
    assert sorted(runs(faults.store)) == [("failed", 143), ("ok", 0)]
