"""Reference audio: which files a name may mean, and what of them can be cloned."""

import errno
import io
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

import reference_audio
from reference_audio import BadReference, decode, find_reference, load_reference
from settings import HERE

LIMIT = 1 << 20


@pytest.fixture
def folder(tmp_path):
    """A reference folder with one good file in it, and a secret beside the folder."""
    folder = tmp_path / "refs"
    folder.mkdir()
    write(folder / "me.wav", speech_like(3))
    write(tmp_path / "secret.wav", speech_like(3))
    return folder


def speech_like(seconds, rate=24_000):
    """Noise at speech level."""
    return np.random.default_rng(1).uniform(-0.3, 0.3, round(seconds * rate)).astype(np.float32)


def write(path, samples, rate=24_000):
    """Write a WAV and return its path."""
    soundfile.write(path, samples, rate)
    return path


@pytest.mark.parametrize("name", ["me.wav", "./me.wav", "sub/../me.wav"])
def test_a_name_below_the_folder_is_found(folder, name):
    assert find_reference(name, (folder,), LIMIT) == folder / "me.wav"


def test_an_absolute_path_into_the_folder_is_found(folder):
    assert find_reference(str(folder / "me.wav"), (folder,), LIMIT) == folder / "me.wav"


@pytest.mark.parametrize(
    "name",
    ["../secret.wav", "/etc/passwd", "", ".", "nothing.wav", "me.wav\0", "a" * 5000, "/" * 5000, "~/me.wav", "me.wav/"],
)
def test_other_names_are_not_found(folder, name):
    assert find_reference(name, (folder,), LIMIT) in (None, folder / "me.wav" if name == "me.wav/" else None)


def test_a_link_is_refused_wherever_it_stands(folder, tmp_path):
    (folder / "link.wav").symlink_to(tmp_path / "secret.wav")
    (folder / "up").symlink_to(tmp_path)
    for name in ("link.wav", "up/secret.wav"):
        with pytest.raises(BadReference, match="links"):
            find_reference(name, (folder,), LIMIT)


def test_a_link_to_itself_is_not_found(folder):
    (folder / "loop.wav").symlink_to(folder / "loop.wav")
    assert find_reference("loop.wav", (folder,), LIMIT) is None


def test_a_file_that_cannot_be_read_is_refused(folder, monkeypatch):
    def closed(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", closed)
    with pytest.raises(BadReference, match="me.wav cannot be read: Permission denied"):
        load_reference(folder / "me.wav")


def test_no_more_than_two_files_are_decoded_at_once(folder, monkeypatch):
    running, most, run = [], [], subprocess.run

    def counted(*command, **options):
        running.append(1)
        most.append(len(running))
        try:
            return run(*command, **options)
        finally:
            running.pop()

    monkeypatch.setattr("reference_audio.subprocess.run", counted)
    files = [write(folder / f"{number}.wav", speech_like(2 + number / 10)) for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert len(list(pool.map(load_reference, files))) == 6
    assert max(most) == 2


def test_folders_fifos_and_devices_are_refused(folder):
    (folder / "sub").mkdir()
    os.mkfifo(folder / "fifo.wav")
    for name in ("sub", "fifo.wav"):
        with pytest.raises(BadReference, match="plain file"):
            find_reference(name, (folder,), LIMIT)
    with pytest.raises(BadReference, match="plain file"):
        find_reference("zero", (Path("/dev"),), LIMIT)


def test_a_file_over_the_limit_is_refused_with_the_settings_name(folder):
    with pytest.raises(BadReference, match="TTS_MAX_REFERENCE_BYTES"):
        find_reference("me.wav", (folder,), 1024)


@pytest.mark.parametrize("number", range(1, 12))
def test_each_voices_reference_audio_can_be_cloned(number):
    reference = load_reference(HERE / "examples" / f"voice_{number:02}.wav")
    assert reference.sample_rate == 24_000 and 6 <= len(reference.samples) / 24_000 <= 9


def test_stereo_becomes_mono_at_its_own_rate(tmp_path):
    left = speech_like(2, 44_100)
    reference = load_reference(write(tmp_path / "stereo.flac", np.stack([left, left], axis=1), 44_100))
    assert reference.sample_rate == 44_100
    assert np.abs(reference.samples - left).max() < 0.01


def test_the_digest_follows_the_sound_and_not_the_name(tmp_path):
    one, same = (load_reference(write(tmp_path / name, speech_like(2))) for name in ("a.wav", "b.wav"))
    other = load_reference(write(tmp_path / "c.wav", speech_like(2.1)))
    assert one.digest == same.digest != other.digest


@pytest.mark.parametrize(
    ("samples", "told"),
    [
        (speech_like(0.5), "0.50 s"),
        (speech_like(31), "over 30 s"),
        (np.zeros(48_000, np.float32), "silent"),
        (np.append(np.zeros(16 * 24_000, np.float32), speech_like(8)), "silent in the first 15 s"),
        (speech_like(2)[:0], "0.00 s"),
        (np.stack([speech_like(2)] * 12, axis=1), "12 channels"),
    ],
)
def test_what_cannot_be_cloned_is_refused_with_the_reason(tmp_path, samples, told):
    with pytest.raises(BadReference, match=told):
        load_reference(write(tmp_path / "a.wav", samples))


@pytest.mark.parametrize("data", [b"", b"<html></html>", b"PK\3\4" * 100, b"RIFF\xff\xff\xff\xffWAVEfmt "])
def test_what_is_no_audio_is_refused(tmp_path, data):
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(BadReference, match="not audio"):
        load_reference(tmp_path / "a.wav")


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "a.wav", speech_like(2))
    first = load_reference(path)
    write(path, speech_like(3))
    assert load_reference(path).digest != first.digest


def encoded(container, codec, seconds=2, rate=48_000, layout="mono"):
    """A tone in one of the formats a client sends."""
    file = io.BytesIO()
    tone = 0.3 * np.sin(np.arange(seconds * rate, dtype=np.float32) * 2 * np.pi * 300 / rate)
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(tone.reshape(1, -1), format="flt", layout="mono")
        frame.sample_rate = rate
        output.mux([*stream.encode(frame), *stream.encode(None)])
    return file.getvalue()


@pytest.mark.parametrize(
    ("container", "codec"),
    [("wav", "pcm_s16le"), ("wav", "pcm_f32le"), ("mp3", "libmp3lame"), ("ipod", "aac"), ("mp4", "aac"),
     ("adts", "aac"), ("flac", "flac"), ("ogg", "libopus"), ("webm", "libopus")],
)  # fmt: skip
def test_the_formats_that_clients_send_are_decoded(container, codec):
    samples, rate = decode(encoded(container, codec), 30)
    assert rate == 48_000 and len(samples) / rate == pytest.approx(2, abs=0.06)
    assert np.abs(samples).max() == pytest.approx(0.3, abs=0.05)


def test_ogg_vorbis_is_decoded():
    file = io.BytesIO()
    soundfile.write(file, speech_like(2), 24_000, format="OGG", subtype="VORBIS")
    samples, rate = decode(file.getvalue(), 30)
    assert rate == 24_000 and len(samples) / rate == pytest.approx(2, abs=0.06)


def test_a_high_rate_is_brought_down_and_a_long_file_is_not_read_to_its_end():
    samples, rate = decode(encoded("flac", "flac", seconds=120, rate=96_000), 15)
    assert rate == 48_000 and 15 <= len(samples) / rate < 16


@pytest.mark.parametrize("playlist", ["#EXTM3U\n#EXTINF:9,\nfile://{}\n", "ffconcat version 1.0\nfile '{}'\n"])
def test_a_playlist_reaches_no_other_file(folder, playlist):
    with pytest.raises(BadReference, match="not audio"):
        decode(playlist.format(folder / "me.wav").encode(), 30)


@pytest.mark.parametrize(
    "fault",
    ["import os; os.kill(os.getpid(), 11)", "while True: pass", "bytes(300 << 20)", "print(8000, 1, flush=True); 1/0"],
)
def test_a_decoder_that_crashes_hangs_or_grows_is_a_refusal(tmp_path, monkeypatch, fault):
    broken = tmp_path / "broken.py"
    broken.write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\nimport audio_decoder\n"
                      f"audio_decoder.set_limits()\n{fault}\n")  # fmt: skip
    monkeypatch.setattr(reference_audio, "DECODER", broken)
    with pytest.raises(BadReference, match="not audio that FFmpeg can decode"):
        decode(b"", 30)


def test_a_decoder_that_waits_for_ever_is_a_refusal(tmp_path, monkeypatch):
    broken = tmp_path / "broken.py"
    broken.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(reference_audio, "DECODER", broken)
    monkeypatch.setattr(reference_audio, "DECODE_TIMEOUT_S", 0.5)
    with pytest.raises(BadReference, match="in reasonable time"):
        decode(b"", 30)


def test_the_decoder_stays_below_200_megabytes(tmp_path, monkeypatch):
    watched, peak = tmp_path / "watched.py", tmp_path / "peak"
    watched.write_text(f"import runpy; runpy.run_path({str(reference_audio.DECODER)!r}, run_name='__main__')\n"
                       "kib = open('/proc/self/status').read().split('VmHWM:')[1].split()[0]\n"
                       f"open({str(peak)!r}, 'w').write(kib)\n")  # fmt: skip
    monkeypatch.setattr(reference_audio, "DECODER", watched)
    decode(encoded("wav", "pcm_f32le", seconds=31, rate=96_000), 30)
    assert 10 << 10 < int(peak.read_text()) < 200 << 10
