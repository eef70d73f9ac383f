import pyarrow as pa
import pytest

from cluster.session import RESERVED_CPUS, TASK_CPUS, Pool, check_schedule, even_sizes, plan_actors
from operators.errors import ConfigError, ScheduleError
from pipelines.extract import _block_sizes

SHARES = {"decode": 1.0, "speech": 1.0, "screen_text": 6.0}
OPEN = dict.fromkeys(SHARES)


@pytest.mark.parametrize("num_cpus", [1, 2, 3, 4, 16, 96])
def test_planned_pools_always_leave_room_for_the_tasks_beside_them(num_cpus):
    pools = plan_actors(SHARES, num_cpus, OPEN, 10**6)
    assert all(pool.num_actors >= 1 for pool in pools)
    check_schedule(pools, int(RESERVED_CPUS / TASK_CPUS), {"CPU": num_cpus})


def test_the_slow_stage_gets_most_of_the_actors():
    by_name = {pool.name: pool.num_actors for pool in plan_actors(SHARES, 16, OPEN, 10**6)}
    assert by_name == {"decode": 2, "speech": 2, "screen_text": 12}


def test_a_pool_size_that_is_set_is_kept_and_no_pool_outgrows_the_work():
    pools = plan_actors(SHARES, 16, OPEN | {"speech": 5}, num_items=3)
    assert {pool.name: pool.num_actors for pool in pools} == {"decode": 2, "speech": 5, "screen_text": 3}


def test_a_job_that_would_wait_for_ever_is_refused_with_its_arithmetic():
    pools = [Pool("decode", 2, 0.9), Pool("speech", 1, 0.5)]
    with pytest.raises(ScheduleError, match=r"2\.60 CPUs \(decode 2 x 0\.9, speech 1 x 0\.5, tasks 3 x 0\.1\).*has 2"):
        check_schedule(pools, 3, {"CPU": 2.0})
    with pytest.raises(ConfigError, match="1.00 GPUs"):
        check_schedule([Pool("encode", 1, 0.5, num_gpus=1)], 0, {"CPU": 2.0})


@pytest.mark.parametrize(("num_rows", "num_blocks"), [(0, 0), (5, 5), (7, 3), (4096 * 3 + 1, 4096)])
def test_blocks_hold_every_row_and_differ_by_one_at_most(num_rows, num_blocks):
    sizes = even_sizes(num_rows, num_blocks)
    assert (sum(sizes), len(sizes)) == (num_rows, num_blocks)
    assert max(sizes, default=0) - min(sizes, default=0) <= 1


def test_videos_with_a_file_go_one_by_one_and_others_together():
    work = pa.table({"has_file": [True] * 3 + [False] * 600})
    assert _block_sizes(work) == [1, 1, 1, 200, 200, 200]
