import json
import os
import subprocess
import sys
import time

import obstore
import pytest

from cluster.lease import PREFIX, Lease, current
from cluster.store import Store
from operators.errors import LeaseLostError, StoreHeldError


@pytest.fixture
def store(tmp_path):
    return Store.at(str(tmp_path / "store"))


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
        "import sys, time; from cluster.lease import Lease; from cluster.store import Store\n"
        "Lease(Store.at(sys.argv[1]), 'killed', 'index', 3600).__enter__(); print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", program, store.uri], stdout=subprocess.PIPE, text=True)
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
