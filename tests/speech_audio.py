"""Speech made on the spot with eSpeak NG, for tests."""

from __future__ import annotations

import ctypes
import functools

import espeakng_loader
import numpy as np

from operators.schema import SAMPLE_RATE_HZ

AUDIO_OUTPUT_SYNCHRONOUS = 2
CHARS_UTF8 = 1
RATE_PARAMETER = 1
WORDS_PER_MINUTE = 140

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_chunks: list[np.ndarray] = []


@_Callback
def _collect(samples, num_samples, events):
    if samples and num_samples > 0:
        _chunks.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
    return 0


@functools.cache
def _library() -> tuple[ctypes.CDLL, int]:
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data = espeakng_loader.get_data_path().encode()
    rate_hz = library.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, data, 0)
    library.espeak_SetSynthCallback(_collect)
    library.espeak_SetParameter(RATE_PARAMETER, WORDS_PER_MINUTE, 0)
    return library, rate_hz


def synthesize(text: str, voice: str = "en") -> np.ndarray:
    """Return mono int16 samples at `SAMPLE_RATE_HZ`."""
    library, rate_hz = _library()
    _chunks.clear()
    library.espeak_SetVoiceByName(voice.encode())
    encoded = text.encode()
    library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 0, 0, CHARS_UTF8, None, None)
    library.espeak_Synchronize()
    samples = np.concatenate(_chunks).astype(np.float64)
    at = np.arange(int(len(samples) * SAMPLE_RATE_HZ / rate_hz)) * rate_hz / SAMPLE_RATE_HZ
    return np.interp(at, np.arange(len(samples)), samples).astype(np.int16)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * SAMPLE_RATE_HZ), dtype=np.int16)
