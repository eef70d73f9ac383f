"""What is tried again when a store does not answer, and by whom.

Measured against a server that answers 503, 500 or 429 or cuts the connection (``tests/test_s3.py``), with the libraries'
defaults:

========= =========================================================== ==================================================
library   each request                                                gives up
========= =========================================================== ==================================================
obstore   11 attempts, waits from 0.1 s doubling to 15 s with jitter  after 1.7 to 19 s (seen), 180 s at most
Lance     4 attempts with the same waits, some requests in several    after 18 to 24 requests, 2.5 to 6 s
          rounds: five failures in a row were survived by reads,
          appends and writes of fragments
pyarrow   3 attempts, random waits of up to 1 and 2 s                 after 0.7 to 2.4 s; we ask for more attempts
                                                                      (``operators/remote.py``)
========= =========================================================== ==================================================

So the lease and JSON objects need nothing of ours, and reading what Lance gives needs little. What is added is patience
where a job of hours would be lost: `retried` around commits, upserts and fragments. A commit whose answer is lost is
found by its id (``cluster/commits.py``; Lance found its own in the one case that was tried), and a lease whose answer is
lost by its run (``cluster/lease.py``; obstore reports it as taken).
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from operators.errors import StorageError, without_credentials

log = logging.getLogger("maxreel")

ATTEMPTS = 5
"""Waits of 1, 2, 4 and 8 s, less up to half: with Lance's own, half a minute, while a lease lasts for a minute."""

FINAL = re.compile(r"status code: 4(?!08|09|12|29)\d\d|\(os error (13|28|30)\)")
"""Refusals, and file systems that are full, read-only or not ours."""

Result = TypeVar("Result")


def retried(action: Callable[[], Result], what: str) -> Result:
    """Return what an action returns; one that fails because of storage is done again after a while.

    Only for actions that may be done twice. Storage that refuses (403) or lacks what is asked for (404) is not asked again.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return action()
        except (OSError, StorageError) as error:
            if not _is_transient(error):
                raise
            log.warning("%s failed (%s); trying again", what, without_credentials(str(error)))
        time.sleep(random.uniform(0.5, 1.0) * 2.0 ** (attempt - 1))
    return action()


def _is_transient(error: OSError | StorageError) -> bool:
    if isinstance(error, StorageError) and not isinstance(error.__cause__, OSError | ValueError):
        return False  # found by us and not by a library: a lost lease, a table that is not there
    return FINAL.search(str(error)) is None
