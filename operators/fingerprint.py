"""Fingerprints: what made a row.

A fingerprint is a hash of the input's fingerprint, the operator's ``VERSION`` and every parameter and model revision
that changes the output. Batch sizes, devices and actor counts are not in it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any


def fingerprint(*parts: Any) -> str:
    """Return 32 hexadecimal digits that stand for JSON-like values, in order."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_reject)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def _reject(value: Any) -> Any:
    raise TypeError(f"a fingerprint is made of JSON values, got {type(value).__name__}")
