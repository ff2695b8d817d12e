"""Decodes a client's audio in a process of its own: what crashes, hangs or eats memory there is not the service.

    python -I audio_decoder.py SECONDS < FILE        writes "RATE CHANNELS\\n", then packed float32 samples

It stops a little after SECONDS of audio. The status is 0, or 2 with the reason on stderr for sound of a kind that is
not taken; any other status means that FFmpeg could not decode the file, or ran into a limit.
"""

from __future__ import annotations

import io
import resource
import sys
import time

import av

FORMATS = "wav,mp3,flac,ogg,mov,aac,matroska"  # no playlists: those name other files and addresses
MIN_RATE, MAX_RATE, KEPT_RATE = 8_000, 192_000, 48_000  # Hz; higher ones are brought down to the last
MAX_CHANNELS = 8
CPU_S, MEMORY_BYTES = 1, 160 << 20  # beyond what starting took; both processes together stay below 200 MB


def set_limits() -> None:
    """From now on a second of CPU and 160 MB are enough for any honest file."""
    cpu_s = int(time.process_time()) + CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def decode(file: io.BytesIO, seconds: float, out: io.BufferedWriter) -> None:
    """Write the first audio stream's rate, channels and samples; exit with 2 where it is of a kind not taken."""
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
    with av.open(file, options=options) as container:
        stream = container.streams.audio[0]
        rate, channels = stream.rate, stream.channels
        if not (MIN_RATE <= rate <= MAX_RATE and 1 <= channels <= MAX_CHANNELS):
            print(f"has {channels} channels at {rate} Hz; give mono or stereo speech", file=sys.stderr)
            raise SystemExit(2)
        stream.thread_count = 1
        resampler = av.AudioResampler(format="flt", rate=min(rate, KEPT_RATE))
        out.write(f"{min(rate, KEPT_RATE)} {channels}\n".encode())
        left = int(seconds * rate)
        for frame in container.decode(stream):
            write(out, resampler.resample(frame), channels)
            left -= frame.samples
            if left < 0:
                return
        write(out, resampler.resample(None), channels)


def write(out: io.BufferedWriter, frames: list[av.AudioFrame], channels: int) -> None:
    """Write frames' samples without the padding behind them."""
    for frame in frames:
        out.write(bytes(frame.planes[0])[: frame.samples * channels * 4])


if __name__ == "__main__":
    given = io.BytesIO(sys.stdin.buffer.read())
    set_limits()
    decode(given, float(sys.argv[1]), sys.stdout.buffer)
