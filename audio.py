"""Audio out: the formats, and the way from an engine's samples to a container's bytes."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import av
import numpy as np
import soundfile
import soxr

from errors import EngineFault, InvalidRequest

PCM_RATE = 24_000  # Hz; what OpenAI's clients assume of raw pcm
MPEG_RATES = (22_050, 24_000, 44_100, 48_000)  # at others the last frame may be over 60 ms too long


@dataclass(frozen=True)
class Format:
    """A response format: what HTTP calls it, what FFmpeg calls it, its rates in Hz and its bit rate in bit/s."""

    content_type: str
    container: str
    codec: str
    rates: tuple[int, ...] = (8_000, 11_025, 12_000, 16_000, 32_000, *MPEG_RATES)
    bit_rate: int | None = None
    whole: bool = False  # carries its length in its header, so it is sent in one piece unless `stream` is set
    primed: bool = False  # its first packets hold the codec's delay, and nothing in the container says so
    muxing: dict[str, str] = field(default_factory=dict)  # FFmpeg's options
    coding: dict[str, str] = field(default_factory=dict)


FORMATS = {
    "wav": Format("audio/wav", "wav", "pcm_s16le", whole=True),
    "flac": Format("audio/flac", "flac", "flac", whole=True),
    "pcm": Format("audio/pcm", "s16le", "pcm_s16le", rates=(PCM_RATE,)),
    "mp3": Format(
        "audio/mpeg", "mp3", "libmp3lame", MPEG_RATES, bit_rate=96_000, primed=True,
        muxing={"id3v2_version": "0", "write_xing": "0"}, coding={"reservoir": "0"},
    ),
    "opus": Format("audio/ogg", "ogg", "libopus", (24_000, 48_000), 64_000, muxing={"page_duration": "200000"}),
    "aac": Format("audio/aac", "adts", "aac", MPEG_RATES, bit_rate=96_000, primed=True),
}

EDGE_S = 0.05  # of quiet kept at either end of an utterance: AAC's first frame rings over 43 ms
FADE_S = 0.005  # at a joint, so that it does not click
QUIET = 10 ** (-50 / 20)  # -50 dBFS: a peak that counts as silence
PEAK = 10 ** (-0.5 / 20)  # louder utterances are turned down as a whole, not clipped


class AudioChunk(NamedTuple):
    """Samples (float32 mono, -1 to 1) and their rate in Hz."""

    samples: np.ndarray
    sample_rate: int

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return len(self.samples) / self.sample_rate


def silence(seconds: float, sample_rate: int) -> AudioChunk:
    """Return that much silence."""
    return AudioChunk(np.zeros(round(seconds * sample_rate), np.float32), sample_rate)


def trim(chunk: AudioChunk) -> AudioChunk:
    """Cut the silence at both ends down to EDGE_S and fade the ends; raise EngineFault on what is not speech."""
    samples, rate = chunk
    if not np.isfinite(samples).all():
        raise EngineFault("The engine returned samples that are not numbers.")
    loud = np.flatnonzero(np.abs(samples) > QUIET)
    if not loud.size:
        raise EngineFault("The engine returned silence for a text with something to speak.")
    edge = round(EDGE_S * rate)
    kept = samples[max(0, loud[0] - edge) : loud[-1] + edge].astype(np.float32)
    fade = np.linspace(0, 1, min(round(FADE_S * rate), len(kept)), dtype=np.float32)
    kept[: len(fade)] *= fade
    kept[len(kept) - len(fade) :] *= fade[::-1]
    return AudioChunk(kept, rate)


def level(chunk: AudioChunk, gain_db: float) -> AudioChunk:
    """Apply a gain, then turn the whole chunk down where a peak would clip."""
    samples = chunk.samples * np.float32(10 ** (gain_db / 20))
    peak = float(np.abs(samples).max(initial=0))
    return AudioChunk(samples * np.float32(PEAK / peak) if peak > PEAK else samples, chunk.sample_rate)


def resample(chunk: AudioChunk, sample_rate: int) -> AudioChunk:
    """Return the chunk at another rate in Hz."""
    if chunk.sample_rate == sample_rate:
        return chunk
    return AudioChunk(soxr.resample(chunk.samples, chunk.sample_rate, sample_rate), sample_rate)


def stretch(chunk: AudioChunk, speed: float) -> AudioChunk:
    """Speak `speed` times as fast at the same pitch (FFmpeg's atempo, which takes 0.5 to 2 well)."""
    if abs(speed - 1) < 1e-3:
        return chunk
    graph = av.filter.Graph()
    steps = max(1, math.ceil(abs(math.log2(speed))))
    nodes = [graph.add_abuffer(sample_rate=chunk.sample_rate, format="flt", layout="mono")]
    nodes += [graph.add("atempo", f"{speed ** (1 / steps):.6f}") for _ in range(steps)]
    nodes += [graph.add("abuffersink")]
    graph.link_nodes(*nodes).configure()
    graph.push(audio_frame(chunk, "flt"))
    graph.push(None)
    return AudioChunk(np.concatenate([frame.to_ndarray().ravel() for frame in pulled(graph)]), chunk.sample_rate)


def pulled(graph: av.filter.Graph) -> Iterator[av.AudioFrame]:
    """Yield a filter graph's frames until it has no more."""
    while True:
        try:
            yield graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return


def audio_frame(chunk: AudioChunk, sample_format: Literal["flt", "s16"]) -> av.AudioFrame:
    """Wrap a chunk as one mono frame of FFmpeg's."""
    samples = chunk.samples if sample_format == "flt" else to_int16(chunk.samples)
    frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format=sample_format, layout="mono")
    frame.sample_rate, frame.time_base = chunk.sample_rate, Fraction(1, chunk.sample_rate)
    return frame


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Round float samples (-1 to 1) to s16, without wrapping."""
    return np.clip(np.rint(samples * 32767), -32768, 32767).astype("<i2")


def choose_rate(fmt: Format, wanted: int | None, engine_rate: int) -> int:
    """Return the rate in Hz to answer with; raise InvalidRequest where the format does not have the one asked for."""
    if wanted is None:
        return engine_rate if engine_rate in fmt.rates else PCM_RATE
    if wanted not in fmt.rates:
        rates = ", ".join(map(str, fmt.rates))
        raise InvalidRequest(f"'sample_rate': this format has the rates {rates} Hz, not {wanted}.", "sample_rate")
    return wanted


class Sink(io.RawIOBase):
    """Where FFmpeg writes a container that nobody can seek back in; take() hands over what came since."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        """Tell FFmpeg that it may write; seekable() stays False."""
        return True

    def write(self, data: Any) -> int:
        """Keep the bytes."""
        self._parts.append(bytes(data))
        return len(self._parts[-1])

    def take(self) -> bytes:
        """Return the bytes since the last call."""
        taken, self._parts = b"".join(self._parts), []
        return taken


class Encoder:
    """Encodes chunks of one rate into a container's bytes as they come."""

    def __init__(self, fmt: Format, sample_rate: int):
        self._sink, self._primed, self._position = Sink(), fmt.primed, 0
        self._container = av.open(self._sink, "w", format=fmt.container, options={"flush_packets": "1", **fmt.muxing})
        self._stream = self._container.add_stream(fmt.codec, rate=sample_rate, layout="mono", options=fmt.coding)
        if fmt.bit_rate:
            self._stream.bit_rate = fmt.bit_rate

    def encode(self, chunk: AudioChunk) -> bytes:
        """Return the bytes that this chunk completes."""
        frame = audio_frame(chunk, "s16")
        frame.pts, self._position = self._position, self._position + frame.samples
        return self._mux(frame)

    def close(self) -> bytes:
        """Return the last bytes: what the codec still held, and the container's end."""
        tail = self._mux(None)
        self._container.close()
        return tail + self._sink.take()

    def _mux(self, frame: av.AudioFrame | None) -> bytes:
        for packet in self._stream.encode(frame):
            if not (self._primed and packet.pts + packet.duration <= 0):
                self._container.mux(packet)
        return self._sink.take()


def warm_encoders() -> None:
    """Encode a little silence in every format: the first of a process takes FFmpeg longer than the next."""
    for fmt in FORMATS.values():
        rate = fmt.rates[0]
        with contextlib.suppress(Exception):  # who asks for a format that this FFmpeg lacks is told then
            b"".join(encode_stream(iter([silence(0.1, rate)]), fmt, rate))


def encode_stream(chunks: Iterator[AudioChunk], fmt: Format, sample_rate: int) -> Iterator[bytes]:
    """Yield a format's bytes chunk by chunk."""
    encoder = Encoder(fmt, sample_rate)
    for chunk in chunks:
        if encoded := encoder.encode(chunk):
            yield encoded
    yield encoder.close()


def encode_whole(chunks: Iterator[AudioChunk], fmt: Format, sample_rate: int) -> Iterator[bytes]:
    """Yield one file with its true length in its header."""
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", sample_rate, 1, "PCM_16", format=fmt.container.upper()) as written:
        for chunk in chunks:
            written.write(to_int16(chunk.samples))
    yield file.getvalue()
