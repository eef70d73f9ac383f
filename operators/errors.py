"""Every error maxreel raises on purpose.

::

    MaxreelError                    exit code
    ├── ConfigError                 2   a setting, argument, manifest or model id is wrong
    │   └── ScheduleError           2   the job asks for more than the cluster has
    ├── TooManyFailuresError        3   finished, with more failures than max_failure_rate
    ├── GateFailedError             4   what was built is not good enough for readers
    ├── StoreHeldError              5   another run holds the store's lease
    ├── StorageError                1   the store cannot be read or written, or is not what it claims
    │   └── LeaseLostError          1   our lease was taken over while we worked
    ├── ModelError                  1   a model is missing, incomplete or not the one asked for
    ├── ShapeError                  1   arrays whose shapes do not fit
    └── ItemError                       one video is bad: a row in ``failures``, the job goes on
        ├── MediaError                  its bytes cannot be decoded; final until the source changes
        ├── SourceError                 its bytes cannot be read; tried again
        └── MediaTimeoutError           decoding took too long or killed its process; tried again

A message says what was got, what is allowed, which video, and what to do next.
"""

from __future__ import annotations

import re
from typing import Any

# A password may hold "/" or "?" as they are (AWS secrets do); a host's port is digits and no password.
_USER = re.compile(r"([a-z][a-z0-9+.-]*://)(?:[^\s/?#]*@|[^\s/:@]*:(?!\d+(?:[/?#\s]|$))\S*@)", re.IGNORECASE)
_QUERY = re.compile(r"([a-z][a-z0-9+.-]*://[^\s?]*)\?\S*?([\"')\]}>.,;:]*)(?=\s|$)", re.IGNORECASE)
_SIGNATURE = re.compile(r"<(AWSAccessKeyId|StringToSign\w*|SignatureProvided|CanonicalRequest\w*)>.*?</\1>", re.DOTALL)


def without_credentials(text: str) -> str:
    """Return a text whose URLs have lost their user, password and query string, without what S3 repeats of a signature.

    What follows ``?`` up to white space goes, but for closing quotes and punctuation at its end.
    """
    return _SIGNATURE.sub("", _QUERY.sub(r"\1\2", _USER.sub(r"\1", text)))


class MaxreelError(Exception):
    """Root of the tree; ``exit_code`` is what the command line ends with."""

    exit_code = 1
    result: Any = None  # what was done before it was raised, where that is worth printing


class ConfigError(MaxreelError):
    """A setting, argument, manifest or model id is wrong."""

    exit_code = 2


class ScheduleError(ConfigError):
    """The job asks for more than the cluster has, so it would wait for ever."""


class TooManyFailuresError(MaxreelError):
    """The job finished, but more videos failed than ``max_failure_rate`` allows."""

    exit_code = 3


class GateFailedError(MaxreelError):
    """What was built is not good enough for readers: they keep what they have."""

    exit_code = 4


class StoreHeldError(MaxreelError):
    """Another run holds the store's lease."""

    exit_code = 5


class StorageError(MaxreelError):
    """The store cannot be read or written, or is not what it claims to be."""


class LeaseLostError(StorageError):
    """Our lease was taken over while we worked; nothing more may be committed."""


class ModelError(MaxreelError):
    """A model is missing, incomplete or not the one that was asked for."""


class ShapeError(MaxreelError):
    """Arrays whose shapes do not fit together."""


class ItemError(MaxreelError):
    """One video is bad. Becomes a row in ``failures``; the job goes on."""

    final = False


class MediaError(ItemError):
    """The bytes of a video cannot be decoded: the same bytes will fail again."""

    final = True


class SourceError(ItemError):
    """The bytes of a video cannot be read: missing, forbidden or unreachable."""


class MediaTimeoutError(ItemError):
    """Decoding a video took longer than its limit, or killed its process."""
