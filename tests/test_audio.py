"""Audio out: honest bytes in six formats, trimming, speed, levels."""

import io
import tracemalloc

import numpy as np
import pytest
import soundfile
from hearing import median_pitch_hz
from serving import decode, pcm

from audio import (
    EDGE_S,
    FORMATS,
    PEAK,
    AudioChunk,
    choose_rate,
    encode_stream,
    encode_whole,
    level,
    resample,
    stretch,
    trim,
)
from errors import EngineFault, InvalidRequest

RATE = 24_000


def hum(seconds, hertz=140.0, rate=RATE):
    """A voice-like sound: a pulse train's first harmonics, in syllables."""
    t = np.arange(round(seconds * rate)) / rate
    wave = sum(np.sin(2 * np.pi * hertz * k * t) / k for k in range(1, 9)) * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * t))
    return AudioChunk((0.2 * wave).astype(np.float32), rate)


def quiet(seconds, rate=RATE):
    """Digital silence."""
    return np.zeros(round(seconds * rate), np.float32)


def encoded(name, chunks, rate=RATE, encode=encode_stream):
    """All the bytes of a format."""
    return b"".join(encode(iter(chunks), FORMATS[name], rate))


@pytest.mark.parametrize("seconds", [0.05, 0.913, 2.0, 3.0071])
@pytest.mark.parametrize("name", FORMATS)
def test_a_decoder_reads_back_the_same_duration(name, seconds):
    data = encoded(name, [hum(seconds)])
    samples, rate = (pcm(data), RATE) if name == "pcm" else decode(data)
    assert len(samples) / rate == pytest.approx(seconds, abs=0.06)


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_cut_at_the_end(name):
    data = encoded(name, [AudioChunk(np.concatenate([quiet(0.8), hum(0.2).samples]), RATE)])
    samples, rate = (pcm(data), RATE) if name == "pcm" else decode(data)
    tail = samples[round(0.8 * rate) :]
    assert np.sum(tail**2) / rate == pytest.approx(np.sum(hum(0.2).samples ** 2) / RATE, rel=0.1)


@pytest.mark.parametrize("name", ["mp3", "aac", "opus", "pcm"])
def test_bytes_leave_chunk_by_chunk(name):
    parts = list(encode_stream(iter([hum(0.8), hum(0.8), hum(0.8)]), FORMATS[name], RATE))
    assert len(parts) >= 3
    assert min(map(len, parts[:3])) > 100


@pytest.mark.parametrize(("name", "magic"), [
    ("wav", b"RIFF"), ("flac", b"fLaC"), ("opus", b"OggS"), ("mp3", b"\xff\xf3"), ("aac", b"\xff\xf1"),
])  # fmt: skip
def test_each_format_starts_as_itself(name, magic):
    assert encoded(name, [hum(0.5)]).startswith(magic)


@pytest.mark.parametrize("name", ["wav", "flac"])
def test_a_whole_file_carries_its_true_length(name):
    info = soundfile.info(io.BytesIO(encoded(name, [hum(0.5), hum(0.75)], encode=encode_whole)))
    assert (info.frames, info.samplerate, info.channels, info.subtype) == (30_000, RATE, 1, "PCM_16")


def test_a_long_file_is_in_memory_once():
    """Hours of it are asked for by one request: floats of it all, and their copies, were six times as much."""
    chunk, seconds = hum(5), 300
    tracemalloc.start()
    try:
        size = len(encoded("wav", (chunk for _ in range(seconds // 5)), encode=encode_whole))
        assert tracemalloc.get_traced_memory()[1] < 2.5 * size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["wav", "flac"])
def test_whole_and_streamed_samples_are_the_same(name):
    chunks = [hum(0.5), hum(0.7)]
    whole, streamed = (decode(encoded(name, chunks, encode=way))[0] for way in (encode_whole, encode_stream))
    assert np.array_equal(whole, streamed)


@pytest.mark.parametrize(("name", "rate"), [(n, r) for n, f in FORMATS.items() for r in f.rates if r >= 16_000])
def test_every_rate_of_a_format_works(name, rate):
    data = encoded(name, [resample(hum(1.0), rate)], rate)
    samples, heard = (pcm(data), rate) if name == "pcm" else decode(data)
    assert len(samples) / heard == pytest.approx(1.0, abs=0.09)
    assert median_pitch_hz(samples, heard) == pytest.approx(140, rel=0.02)


def test_a_rate_that_the_format_lacks_is_refused():
    assert choose_rate(FORMATS["wav"], None, 22_050) == 22_050
    assert choose_rate(FORMATS["opus"], None, 22_050) == 24_000
    assert choose_rate(FORMATS["pcm"], None, 22_050) == 24_000
    with pytest.raises(InvalidRequest, match="24000"):
        choose_rate(FORMATS["pcm"], 16_000, 24_000)


@pytest.mark.parametrize("speed", [0.25, 0.4, 0.7, 0.9, 1.1, 1.5, 2.2, 4.0])
def test_stretching_keeps_the_pitch_and_hits_the_duration(speed):
    stretched = stretch(hum(3.0), speed)
    assert stretched.seconds == pytest.approx(3.0 / speed, rel=0.02)
    assert median_pitch_hz(*stretched) == pytest.approx(140, rel=0.03)


def test_trimming_leaves_a_short_quiet_edge_and_no_click():
    trimmed = trim(AudioChunk(np.concatenate([quiet(0.4), hum(1.0).samples, quiet(0.6)]), RATE))
    assert trimmed.seconds == pytest.approx(1.0 + 2 * EDGE_S, abs=0.02)
    assert abs(trimmed.samples[0]) == abs(trimmed.samples[-1]) == 0


def test_a_loud_edge_is_faded():
    trimmed = trim(AudioChunk(np.full(2400, 0.5, np.float32), RATE))
    assert np.abs(np.diff(trimmed.samples, prepend=0, append=0)).max() < 0.01


@pytest.mark.parametrize("samples", [quiet(0.5), np.zeros(0, np.float32), np.full(2400, np.nan, np.float32)])
def test_what_is_not_speech_is_a_fault(samples):
    with pytest.raises(EngineFault):
        trim(AudioChunk(samples, RATE))


def test_a_loud_chunk_is_turned_down_not_clipped():
    louder = level(hum(1.0), 20).samples
    assert np.abs(louder).max() == pytest.approx(PEAK, rel=1e-3)
    assert np.corrcoef(louder, hum(1.0).samples)[0, 1] > 0.9999
