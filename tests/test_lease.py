import json
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import obstore
import pytest

from cluster.lease import PREFIX, Lease, current
from cluster.store import Store
from operators.errors import LeaseLostError, StorageError, StoreHeldError


def test_a_second_run_is_refused_and_told_who_holds_the_store(store):
    with (
        Lease(store, "run-a", "index"),
        pytest.raises(StoreHeldError, match=r"run-a \(index\).*process " + str(os.getpid())),
    ):
        Lease(store, "run-b", "index").__enter__()


def test_a_released_store_is_free_at_once(store):
    with Lease(store, "run-a", "index"):
        pass
    with Lease(store, "run-b", "index"):
        assert current(store)[1].run_id == "run-b"


def test_an_expired_lease_of_another_host_is_taken_over_and_its_holder_may_not_commit(store):
    lost = Lease(store, "run-a", "index", lease_seconds=0.4)
    lost.__enter__()
    lost._stop.set()  # the holder hangs: no more heartbeats
    lost._thread.join()
    time.sleep(0.5)
    with Lease(store, "run-b", "index"), pytest.raises(LeaseLostError, match="run the command again"):
        lost.check()


def test_a_holder_learns_from_its_heartbeat_that_it_was_replaced(store):
    holder = Lease(store, "run-a", "index", lease_seconds=0.4)
    with holder:
        generation, _ = current(store)
        obstore.put(store.objects, f"{PREFIX}/{generation + 1:012d}.json", b'{"run_id": "thief"}')
        time.sleep(0.3)
        with pytest.raises(LeaseLostError):
            holder.check()


def test_heartbeats_keep_a_lease_longer_than_its_expiry(store):
    with Lease(store, "run-a", "index", lease_seconds=0.4) as lease:
        time.sleep(0.8)
        lease.check()
        with pytest.raises(StoreHeldError):
            Lease(store, "run-b", "index").__enter__()


def test_a_run_killed_on_this_machine_frees_the_store_at_once(store):
    program = (
        "import json, sys, time; from cluster.lease import Lease; from cluster.store import Store\n"
        "store = Store.at(sys.argv[1], json.loads(sys.argv[2]))\n"
        "Lease(store, 'killed', 'index', 3600).__enter__(); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, store.uri, json.dumps(dict(store.options))]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    with pytest.raises(StoreHeldError, match="killed"):
        Lease(store, "next", "index").__enter__()
    child.kill()
    child.wait()
    child.stdout.close()
    with Lease(store, "next", "index"):
        assert current(store)[1].run_id == "next"


def test_only_one_of_two_contenders_creates_the_next_generation(store):
    obstore.put(store.objects, f"{PREFIX}/{1:012d}.json", json.dumps({"cut": "short"}).encode())
    first = Lease(store, "run-a", "index")
    late = Lease(store, "run-b", "index")
    first.__enter__()
    late._generation = 2  # it read the store before the first one wrote
    with pytest.raises(obstore.exceptions.AlreadyExistsError):
        late._write(create=True)
    first.__exit__(None, None, None)


def test_one_of_two_contenders_gets_the_lease(store):
    for round_ in range(20):
        start, held, outcomes = threading.Barrier(2), threading.Barrier(2), []

        def contend(run_id, start=start, held=held, outcomes=outcomes):
            start.wait()
            with ExitStack() as stack:
                try:
                    stack.enter_context(Lease(store, run_id, "index"))
                    outcomes.append(run_id)
                except StoreHeldError:
                    outcomes.append(None)
                held.wait()

        contenders = [threading.Thread(target=contend, args=(f"run-{round_}-{name}",)) for name in "ab"]
        for thread in contenders:
            thread.start()
        for thread in contenders:
            thread.join()
        assert len(outcomes) == 2
        assert outcomes.count(None) == 1


def test_a_contender_that_slept_through_another_lease_does_not_get_the_one_after(store):
    """It read generation 0 and creates 1, which in the meantime was used, released and forgotten."""
    late = Lease(store, "late", "index")
    write = late._write

    def write_late(create):
        with Lease(store, "first", "index"):
            pass
        stack.enter_context(Lease(store, "second", "index"))
        write(create=create)

    late._write = write_late
    with ExitStack() as stack, pytest.raises(StoreHeldError):
        stack.enter_context(late)


def test_a_lease_whose_answer_was_lost_is_ours(s3, tmp_path):
    store = s3.store(tmp_path.name)
    s3.fail("lose the answer", path="_lease/", method="PUT")
    with Lease(store, "run-a", "index") as lease:
        lease.check()
        assert [method for method, path in s3.requests() if path.endswith("1.json")].count("PUT") == 2


def test_a_release_that_fails_is_said_and_harms_nothing(s3, tmp_path, caplog):
    store = s3.store(tmp_path.name)
    with Lease(store, "run-a", "index", lease_seconds=60):
        s3.fail(403, path="_lease/", method="PUT")
    assert "was not released" in caplog.text


def test_a_store_that_refuses_says_what_to_do(s3):
    store = Store.at("s3://night/refused", s3.options | {"aws_secret_access_key": "wrong"})
    with pytest.raises(StorageError, match="403.*AWS_ACCESS_KEY_ID") as caught:
        Lease(store, "run-a", "index").__enter__()
    assert "wrong" not in str(caught.value)
