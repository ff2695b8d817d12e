"""Audio made to harm whoever decodes it: each is refused or cut short, in little memory and within the CPU limit."""

import io
import json
import re
import struct
import subprocess
import sys

import av
import numpy as np
import pytest
from test_reference_audio import encoded, speech_like

from audio_decoder import CPU_S
from settings import HERE

HOURS_S = 10 * 3600
DECODE = """
import json, resource, sys
from pathlib import Path
from reference_audio import BadReference, load_reference

def resident_mb():
    return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024

load_reference(Path(sys.argv[2]))  # so that what starting takes is there before
before, told = resident_mb(), None
try:
    seconds = len((found := load_reference(Path(sys.argv[1]))).samples) / found.sample_rate
except BadReference as error:
    told, seconds = str(error), 0
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([told, seconds, used.ru_maxrss / 1024, resident_mb() - before, used.ru_utime + used.ru_stime]))
"""


def wav_header(rate=24_000, channels=1, bits=16, data=0xFFFFFFFF, riff=0xFFFFFFFF, fmt=16):
    """A WAV's first 44 bytes, as truthful as asked."""
    width = channels * bits // 8 % 65536
    told = struct.pack("<IHHIIHH", fmt, 1, channels, rate, rate * width & 0xFFFFFFFF, width, bits)
    return b"RIFF" + struct.pack("<I", riff) + b"WAVEfmt " + told + b"data" + struct.pack("<I", data)


def pcm(seconds=3):
    """Seconds of s16 speech-like noise."""
    return (speech_like(seconds) * 32767).astype("<i2").tobytes()


def crc(data, polynomial, bits):
    """FLAC's checksums."""
    value, top = 0, 1 << bits - 1
    for byte in data:
        value ^= byte << bits - 8
        for _ in range(8):
            value = (value << 1 ^ (polynomial if value & top else 0)) & (1 << bits) - 1
    return value


def flac(rate=8_000, channels=1, frames=0):
    """A FLAC whose frames hold 65,535 equal samples in a dozen bytes each: what a zip bomb is to sound."""
    told = struct.pack(">HH", 65535, 65535) + bytes(6) + struct.pack(">Q", rate << 44 | channels - 1 << 41 | 15 << 36)
    out = [b"fLaC\x80\0\0\x22", told, bytes(16)]
    for number in range(frames):
        head = bytes([0xFF, 0xF8, 0x70, channels - 1 << 4]) + chr(number).encode("utf-8", "surrogatepass") + b"\xff\xfe"
        frame = head + bytes([crc(head, 0x07, 8)]) + b"\0\0\x01" * channels
        out.append(frame + struct.pack(">H", crc(frame, 0x8005, 16)))
    return b"".join(out)


def repeated(container, codec, rate, seconds, **options):
    """Seconds of silence, of which the codec encodes one packet that is then repeated."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout="mono", options=options)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2 * rate), np.float32), format="flt", layout="mono")
        frame.sample_rate = rate
        packet = stream.encode(frame)[4]
        for number in range(int(seconds / (packet.duration * packet.time_base))):
            packet.pts = packet.dts = number * packet.duration
            output.mux(packet)
    return file.getvalue()


CRAFTED = {
    "a FLAC of 10 hours in 66 kB": (lambda: flac(frames=HOURS_S * 8_000 // 65535), "over 30 s"),
    "10 minutes of FLAC in eight channels at 192 kHz": (lambda: flac(192_000, 8, 1_758), "over 30 s"),
    "10 hours of silence as opus": (lambda: repeated("ogg", "libopus", 48_000, HOURS_S, frame_duration="60"), "over"),
    "10 hours of silence as mp3": (lambda: repeated("mp3", "libmp3lame", 8_000, HOURS_S), "over 30 s"),
    "a FLAC at 0 Hz": (lambda: flac(rate=0, frames=9), "not audio|Hz"),
    "a WAV at 0 Hz": (lambda: wav_header(rate=0) + pcm(), "not audio|Hz"),
    "a WAV at 4 GHz": (lambda: wav_header(rate=0xFFFFFFFF) + pcm(), "not audio|Hz"),
    "a WAV of 64 channels": (lambda: wav_header(channels=64) + pcm(), "64 channels"),
    "a WAV of 65,535 channels": (lambda: wav_header(channels=65535) + pcm(), "not audio|channels"),
    "a WAV of no channels": (lambda: wav_header(channels=0) + pcm(), "not audio|channels"),
    "a WAV of no bits": (lambda: wav_header(bits=0) + pcm(), "not audio|lasts"),
    "a WAV whose format lasts for ever": (lambda: wav_header(fmt=0xFFFFFFF0) + pcm(), "not audio"),
    "a WAV that claims 4 GB and holds nothing": (wav_header, "not audio|0.00 s"),
    "a WAV of 30 MB": (lambda: wav_header() + bytes(30 << 20), "over 30 s"),
    "an MP3 behind a tag of 256 MB": (
        lambda: b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + encoded("mp3", "libmp3lame"), "not audio",
    ),
    "a FLAC with a picture of 16 MB": (lambda: b"fLaC\x06\xff\xff\xff" + b"\xff" * (1 << 20), "not audio"),
    "an MP4 of a billion samples": (
        lambda: re.sub(b"(?s)(stsz.{8})....", rb"\1????", encoded("mp4", "aac")),
        "not audio|lasts",
    ),
    "a picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(100), "not audio"),
}  # fmt: skip


def load(path):
    """Load a file in a process of its own; return the refusal, the seconds, the memory of both in MB, the CPU time."""
    example = HERE / "examples" / "voice_01.wav"
    command = [sys.executable, "-c", DECODE, str(path), str(example)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, timeout=60, check=True)
    told, seconds, decoder_mb, grown_mb, cpu_s = json.loads(done.stdout)
    print(f"decoder {decoder_mb:.0f} MB, this side {grown_mb:.0f} MB more, {cpu_s:.2f} s of CPU for both: {told}")
    return told, seconds, decoder_mb + grown_mb, cpu_s


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_audio_is_refused_in_little_memory_and_time(tmp_path, name):
    make, expected = CRAFTED[name]
    (tmp_path / "a").write_bytes(make())
    told, _, memory_mb, cpu_s = load(tmp_path / "a")
    assert told and any(part in told for part in expected.split("|")), told
    assert memory_mb < 200
    assert cpu_s < 2 * (CPU_S + 1)  # what audio_decoder.set_limits allows, for this file and the example before


@pytest.mark.parametrize("data", [0, 0xFFFFFFFF, 1 << 31])
def test_of_a_wav_whose_sizes_lie_what_is_there_is_taken(tmp_path, data):
    (tmp_path / "a").write_bytes(wav_header(data=data, riff=data) + pcm(3))
    told, seconds, memory_mb, _ = load(tmp_path / "a")
    assert told is None and seconds == pytest.approx(3, abs=0.1) and memory_mb < 200
