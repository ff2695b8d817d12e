"""What clients bring to be cloned: uploaded reference audio, and voices of their own; neither keeps a client's name.

Everything is decoded, checked and written anew as a mono WAV, under a name made here, by way of a temporary file, so
that what is there is whole. Writing raises OSError where the disk is full or closed, and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import secrets
import threading
import time
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import soundfile
import soxr

from files import remove, remove_unfinished, write_whole
from reference_audio import HEARD_S, BadReference, check_speech, decode
from vllm_engine import Reference

KEPT_RATE = 24_000  # Hz; IndexTTS works at 22 050 and 16 000
TOKEN = re.compile(r"uploads/([0-9a-f]{64})\.wav")  # looks like a path, as the worker wants; is never used as one
VOICE_ID = re.compile(r"voice_[0-9a-f]{24}")
EXPIRE_EVERY_S = 600
CACHED = 64  # uploads kept decoded: 15 s are 1.4 MB

log = logging.getLogger("speech.references")


def to_wav(file: IO[bytes]) -> bytes:
    """Return a client's file as a mono s16 WAV of at most HEARD_S; raise BadReference where it is no usable speech."""
    samples, rate = decode(file.read(), HEARD_S)
    check_speech(samples, rate)
    kept = soxr.resample(samples[: HEARD_S * rate], rate, KEPT_RATE)
    out = io.BytesIO()
    soundfile.write(out, np.clip(kept, -1, 1), KEPT_RATE, format="WAV", subtype="PCM_16")
    return out.getvalue()


class Uploads:
    """Uploaded reference audio in a folder, each sound once; expired by age and by total size, the oldest first."""

    def __init__(self, folder: Path, max_age_s: float, max_bytes: int):
        self._folder, self._max_age_s, self._max_bytes = folder, max_age_s, max_bytes
        self._lock = threading.Lock()
        self._used: dict[Path, float] = {}  # when, by a clock that does not step; a restarted server asks the files

    def start(self) -> None:
        """Tidy up, now and every EXPIRE_EVERY_S."""
        remove_unfinished(self._folder)
        threading.Thread(target=self._keep_tidy, name="uploads", daemon=True).start()

    def add(self, file: IO[bytes]) -> tuple[str, int]:
        """Keep a client's file; return the token that means it and its bytes. Raises BadReference and OSError."""
        wav = to_wav(file)
        digest = hashlib.sha256(wav).hexdigest()
        path = self._path(digest)
        with self._lock:
            if not path.exists() or path.stat().st_size != len(wav):
                write_whole(path, wav)
            self._use(path)
        self.expire()
        return f"uploads/{digest}.wav", len(wav)

    def find(self, token: str) -> Reference | None:
        """Return the audio that a token means, None for what is no token; raise BadReference for one that expired."""
        if not (named := TOKEN.fullmatch(token)):
            return None
        path = self._path(named[1])
        try:
            with self._lock:
                if self._age_s(path, path.stat()) >= self._max_age_s:
                    raise gone(path)
                self._use(path)
            return read_upload(path)
        except (OSError, soundfile.LibsndfileError) as error:
            if not isinstance(error, FileNotFoundError):
                log.error("the upload %s cannot be read: %s", path, error)
            raise gone(path) from None

    def expire(self) -> None:
        """Remove what is too old, then the longest unused until the rest fits."""
        with self._lock:
            files = [(self._age_s(path, status), status.st_size, path) for path, status in self._files()]
            total = sum(size for _, size, _ in files)
            for age_s, size, path in sorted(files, reverse=True):
                if (age_s >= self._max_age_s or total > self._max_bytes) and remove(path):
                    self._used.pop(path, None)
                    total -= size

    def _use(self, path: Path) -> None:
        """Note that an upload is used now."""
        self._used[path] = time.monotonic()
        with contextlib.suppress(OSError):  # a disk that went read-only
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))

    def _age_s(self, path: Path, status: os.stat_result) -> float:
        """Seconds since an upload's last use; one of before the start is told by its file, once."""
        now = time.monotonic()
        return now - self._used.setdefault(path, now - max(0.0, time.time() - status.st_atime))

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        try:
            return [(Path(entry.path), entry.stat()) for entry in os.scandir(self._folder) if entry.name[-4:] == ".wav"]
        except OSError:  # not there yet, or closed
            return []

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}.wav"

    def _keep_tidy(self) -> None:
        while True:
            self.expire()
            time.sleep(EXPIRE_EVERY_S)


def gone(path: Path) -> BadReference:
    """Say that an upload is not kept any more."""
    return BadReference(f"the upload {path.stem[:12]}... is not kept any more; upload it again")


@lru_cache(CACHED)
def read_upload(path: Path) -> Reference:
    """Read an upload, whose name tells its content; raise FileNotFoundError."""
    with path.open("rb") as file:
        samples, rate = soundfile.read(file, dtype="float32")
    return Reference(samples, rate, path.stem)


class OwnVoice(NamedTuple):
    """A voice that a client made: when, in seconds since 1970, and its reference audio."""

    id: str
    name: str
    consent: str
    created_at: int
    audio: Path


class OwnVoices:
    """Voices that clients made, in a folder: `<id>.wav`, and `<id>.json`, which comes last and goes first."""

    def __init__(self, folder: Path, limit: int):
        self._folder, self._limit = folder, limit
        self._lock = threading.Lock()
        self._voices = {voice.id: voice for path in sorted(folder.glob("voice_*.json")) if (voice := read_voice(path))}

    def start(self) -> None:
        """Tidy up."""
        remove_unfinished(self._folder)
        for path in self._folder.glob("voice_*.wav"):
            if not path.with_suffix(".json").exists():
                remove(path)

    def all(self) -> list[OwnVoice]:
        """Return the voices, the oldest first."""
        return sorted(self._voices.values(), key=lambda voice: (voice.created_at, voice.id))

    def add(self, name: str, consent: str, file: IO[bytes]) -> OwnVoice:
        """Make a voice of a client's recording; raise BadReference and OSError."""
        wav = to_wav(file)
        with self._lock:
            if len(self._voices) >= self._limit:
                raise BadReference(f"cannot become a voice: there are {self._limit} already; delete one first")
            audio = self._folder / f"voice_{secrets.token_hex(12)}.wav"
            voice = OwnVoice(audio.stem, name, consent, int(time.time()), audio)
            try:
                write_whole(audio, wav)
                told = {"name": name, "consent": consent, "created_at": voice.created_at}
                write_whole(audio.with_suffix(".json"), json.dumps(told, ensure_ascii=False).encode())
            except OSError:
                remove(audio)
                raise
            self._voices[voice.id] = voice
        return voice

    def remove(self, voice_id: str) -> bool:
        """Forget a voice and its audio; False where there is none. Raises OSError."""
        with self._lock:
            if (voice := self._voices.get(voice_id)) is None:
                return False
            voice.audio.with_suffix(".json").unlink(missing_ok=True)
            voice.audio.unlink(missing_ok=True)
            del self._voices[voice_id]
        return True


def read_voice(path: Path) -> OwnVoice | None:
    """Read a voice's file; None, and a line in the log, for one that is broken."""
    try:
        told, audio = json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".wav")
        if not (VOICE_ID.fullmatch(path.stem) and audio.is_file()):
            raise ValueError("it has no audio beside it, or another name than ours")
        return OwnVoice(path.stem, str(told["name"]), str(told["consent"]), int(told["created_at"]), audio)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.error("the voice in %s is left out: %s", path, error)
        return None
