"""An OpenAI-compatible speech server for IndexTTS on vLLM; on a machine with no GPU an embedded voice speaks.

Run:    gunicorn -c gunicorn.conf.py 'app:create_app()'        (make run does it all)

POST /v1/audio/speech   OpenAI's createSpeech: wav, pcm, mp3, opus, aac or flac     (also /audio/speech)
GET  /v1/audio/voices   the voices                                                  (also /audio/voices)
GET  /v1/models         the model names, in OpenAI's shape; /v1/audio/models in Open WebUI's
POST /v1/audio/voices   makes a voice of a recording; DELETE /v1/audio/voices/ID forgets it
POST /tts_url           IndexTTS's native call, answers a WAV
POST /upload_audio      keeps a reference audio for POST /tts_url_with_cloning
GET  /metrics, /openapi.json   figures for Prometheus; the description of all this
GET  /health            200 when an utterance would be spoken, else 503 and why

One request's way: JSON -> SpeechRequest -> Voice -> utterances -> a slot of the engine for each -> audio -> bytes.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import re
import select
import socket
import threading
import time
import uuid
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol
from urllib.parse import quote

import av
import flask_cors
import numpy as np
import soundfile
import soxr
from flask import Blueprint, Flask, Response, current_app, g, jsonify, request
from gunicorn.http.errors import ParseException
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from werkzeug.datastructures import FileStorage
from werkzeug.exceptions import BadRequest, HTTPException, RequestEntityTooLarge, UnsupportedMediaType

from access import WRONG_KEYS_S, ForwardedAddress, Keys, WrongKeys
from metrics import Metrics
from openapi import describe
from reference_audio import BadReference, find_reference, load_reference
from reference_store import OwnVoice, OwnVoices, Uploads
from scheduling import Cancellation, Claim, Jobs, Slots
from vllm_engine import DeadlinePassed, Emotion, EngineDead, EngineLoop, GivenUp, Reference, Spoken, VoiceModel, gpus

HERE = Path(__file__).resolve().parent
MANIFEST = HERE / "release.sha256"  # the checksums of all files of a deployed release
RELEASE = hashlib.sha256((MANIFEST if MANIFEST.exists() else Path(__file__)).read_bytes()).hexdigest()[:12]
log = logging.getLogger("speech")


# === Settings ===


def split_list(value: object) -> object:
    """Turn the comma-separated text of a variable into a tuple; raise ValueError where nothing is in it."""
    if not isinstance(value, str):
        return value
    parts = tuple(part.strip() for part in value.split(",") if part.strip())
    if not parts or not value.isascii():
        raise ValueError("name at least one, in ASCII, or leave the variable out")
    return parts


def split_networks(value: object) -> object:
    """Turn comma-separated addresses and networks into a tuple; raise ValueError on what is neither."""
    networks = split_list(value)
    return tuple(str(ipaddress.ip_network(network)) for network in networks) if isinstance(value, str) else networks


def split_folders(value: object) -> object:
    """Turn a variable like PATH into a tuple of folders."""
    return tuple(filter(None, value.split(os.pathsep))) if isinstance(value, str) else value


@dataclass(frozen=True)
class Settings:
    """What an operator can set: each field is the variable TTS_<FIELD IN CAPITALS>."""

    engine: Literal["auto", "omni", "indextts", "embedded"] = "auto"  # auto takes the best one this machine can run
    model: str = ""  # omni: the folder or hub id of IndexTTS-2 or 2.5
    omni_deploy_config: Path | None = None  # omni: vLLM-Omni's deploy file, instead of the one made for the model
    indextts_dir: Path = HERE  # indextts: the index-tts-vllm checkout
    model_dir: Path = Path("checkpoints/IndexTTS-2-vLLM")  # indextts: its weights, below the checkout
    fp16: bool = False  # indextts: half precision where the checkout takes it
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.25  # share of the GPU for the speech model
    qwenemo_gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.10  # and for the emotion-text model
    voices_file: Path = HERE / "voices.json"
    reference_dirs: Annotated[tuple[Path, ...], BeforeValidator(split_folders)] = (HERE / "examples",)  # A:B:C
    max_reference_bytes: Annotated[int, Field(ge=1024)] = 32 << 20
    lexicon: Path | None = None  # pronunciations, word = reading, one a line
    cache_dir: Path | None = None  # where the embedded engine may keep files; none: it writes nothing
    api_keys: Annotated[tuple[str, ...], BeforeValidator(split_list)] = ()  # comma separated; empty: open
    api_keys_file: Path | None = None  # further keys, one a line; read again whenever it changes
    trusted_proxies: Annotated[tuple[str, ...], BeforeValidator(split_networks)] = ()  # whose X-Forwarded-For holds
    cors_origins: Annotated[tuple[str, ...], BeforeValidator(split_list)] = ()  # web pages that may ask; empty: none
    log_text_characters: Annotated[int, Field(ge=0)] = 0  # of a text to be spoken that its log line shows
    slots: Annotated[int, Field(ge=0, le=64)] = 0  # utterances made at once; 0: what the engine proposes
    threads: Annotated[int, Field(ge=0, le=256)] = 0  # cores of one embedded utterance; 0: all, 4 at the most
    queue_requests: Annotated[int, Field(ge=1, le=4096)] = 128  # requests under way or waiting, before 429
    queue_characters: Annotated[int, Field(ge=1)] = 300_000  # and their text in all: about 20 hours of speech
    cache_bytes: Annotated[int, Field(ge=0)] = 64 << 20  # finished utterances kept for who asks again; 0: none
    utterance_timeout_s: Annotated[float, Field(gt=0)] = 600.0  # patience for one utterance, its wait included
    drain_timeout_s: Annotated[int, Field(ge=0)] = 600  # how long TERM waits for running requests
    max_body_bytes: Annotated[int, Field(ge=1024)] = 1 << 20
    max_upload_bytes: Annotated[int, Field(ge=1024)] = 10 << 20  # of a recording; OpenAI's limit
    open_uploads: bool = False  # take /upload_audio without a key where keys are set: the dubbing worker sends none
    upload_dir: Path = HERE / "uploads"
    upload_dir_bytes: Annotated[int, Field(ge=1 << 20)] = 1 << 30  # in all; the longest unused are removed first
    upload_max_age_s: Annotated[float, Field(gt=0)] = 86_400.0  # since its last use
    own_voices_dir: Path = HERE / "own_voices"  # voices that clients made
    max_own_voices: Annotated[int, Field(ge=0, le=1000)] = 100

    @classmethod
    def from_env(cls, environ: dict[str, str] | None = None) -> Settings:
        """Read the TTS_* variables once; raise ValueError naming the variable that is wrong, log unknown ones."""
        environ = dict(os.environ) if environ is None else environ
        given = {name: value for name, value in environ.items() if name.startswith("TTS_") and value}
        known = {f"TTS_{f.name.upper()}": f.name for f in fields(cls)}
        for name in sorted(given.keys() - known.keys()):
            log.warning("unknown setting %s is ignored; the settings are %s", name, ", ".join(known))
        values = {known[name]: value for name, value in given.items() if name in known}
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"TTS_{str(first['loc'][0]).upper()}: {first['msg']}, not {first['input']!r}") from None


# === Constants ===

MAX_INPUT_CHARACTERS = 4096  # OpenAI's limit for `input`
MAX_NATIVE_CHARACTERS = 20_000  # /tts_url had none; this one keeps a request under an hour of speech
PCM_RATE = 24_000  # Hz; what OpenAI's clients assume of raw pcm
RESERVE_THREADS = 128  # threads beyond the admitted requests: /health, and clients slow to send their request
BODY_TIMEOUT_S = 30  # for the next bytes of a request's body
SEND_TIMEOUT_S = 600  # for a client to take the next bytes of the answer: a player may have paused
HEALTH_CHECK_S = 0.5  # how often the engine is asked whether it lives
CLIENT_CHECK_S = 0.2  # how often a waiting request looks whether its client is still there
RETRY_AFTER_S = 5
FULL = (errno.ENOSPC, errno.EDQUOT)  # what a full disk says
UPLOADS_AT_ONCE = 16  # more wait outside: each holds a thread
MULTIPART_BYTES = 64 << 10  # of a multipart body beside its file
NATIVE_PATHS = ("/tts_url", "/tts_url_with_cloning", "/upload_audio")  # their errors have IndexTTS's shape
SSE_FRAMES_PER_S = 50  # usage: input_tokens counts characters, output_tokens frames of 20 ms
OPENAI_MODELS = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts", "index-tts-v2")  # names clients ask for; any other works
OPEN_ENDPOINTS = {None, *(f"speech.{name}" for name in (
    "health", "list_voices", "list_models", "list_audio_models", "describe_api",
))}  # fmt: skip

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


# === Errors ===


class SpeechError(Exception):
    """Base of what a client is told; `status` is the HTTP status, the rest is OpenAI's envelope."""

    status = 500
    type = "server_error"
    code: str | None = None

    retry_after_s: int | None = None

    def __init__(self, message: str, param: str | None = None, code: str | None = None, quoted: str = ""):
        super().__init__(message)
        self.message, self.param, self.code = message, param, code or self.code
        self.quoted = quoted  # the client's text in the message, which no log line may show

    def headers(self) -> dict[str, str]:
        """Headers beside the envelope: when to come back, where that makes sense."""
        after_s = self.retry_after_s
        return {"Retry-After": str(after_s), "retry-after-ms": str(after_s * 1000)} if after_s else {}

    def logged(self) -> str:
        """The message without the client's text."""
        return self.message.replace(self.quoted, "...") if self.quoted else self.message


class InvalidRequest(SpeechError):
    """400: the request is wrong, and the message says how to put it right."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class UnknownVoice(SpeechError):
    """404: there is no such voice of a client's own."""

    status = 404
    type = "invalid_request_error"
    code = "voice_not_found"


class TooLarge(SpeechError):
    """413: a recording of more bytes than are taken."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"

    def __init__(self, limit: int):
        super().__init__(f"The recording is too large: this server takes TTS_MAX_UPLOAD_BYTES, {limit} bytes.")


class NoSpace(SpeechError):
    """507: a recording could not be written."""

    status = 507
    code = "insufficient_storage"


class InvalidKey(SpeechError):
    """401: no key, or not one of TTS_API_KEYS."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class Busy(SpeechError):
    """429: the queue is full."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"
    retry_after_s = RETRY_AFTER_S


class TooManyWrongKeys(SpeechError):
    """429: an address that goes on trying keys."""

    status = 429
    type = "rate_limit_error"
    code = "too_many_wrong_keys"
    retry_after_s = WRONG_KEYS_S


class Unavailable(SpeechError):
    """503: loading, unhealthy, or too late."""

    status = 503
    code = "unavailable"
    retry_after_s = RETRY_AFTER_S


class EngineFault(SpeechError):
    """500: the engine gave something that is not speech."""

    code = "engine_fault"


class ClientGone(ConnectionResetError):
    """The client left; gunicorn closes such a connection quietly and without ending the body."""

    def __init__(self) -> None:
        super().__init__(errno.ECONNRESET, "the client left")


# === Requests ===


def voice_name(value: object) -> object:
    """Take OpenAI's custom voice object {"id": NAME} for NAME."""
    named = isinstance(value, dict) and value.keys() == {"id"} and isinstance(value["id"], str)
    return value["id"] if named else value


def spoken_text(value: str) -> str:
    """Trim text to be spoken; raise ValueError where nothing is left or it holds what is no character."""
    if re.search("[\0\ud800-\udfff]", value):
        raise ValueError("must not contain NUL characters or lone surrogates")
    if not value.strip():
        raise ValueError("must not be empty: give the text to be spoken")
    return value.strip()


def emotion_sum(value: list[float]) -> list[float]:
    """Keep IndexTTS's bound on the eight emotions together."""
    if sum(value) > 1.5:
        raise ValueError(f"must sum to at most 1.5, not {sum(value):g}")
    return value


SPOKEN = BeforeValidator(lambda value: spoken_text(value) if isinstance(value, str) else value)
SPOKEN_PATTERN = {"pattern": r"\S"}  # what SPOKEN asks, for readers of /openapi.json
VOICE_OBJECT = {
    "anyOf": [
        {"type": "string"}, {"type": "null"},
        {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"], "additionalProperties": False},
    ]
}  # fmt: skip
EmotionVector = Annotated[
    list[Annotated[float, Field(ge=0, le=1.5)]], Field(min_length=8, max_length=8), AfterValidator(emotion_sum)
]


class JsonRequest(BaseModel):
    """A JSON body: strict types, null means not given, unknown fields are remembered and named to the client."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, data: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in data.items() if value is not None}

    def ignored(self, honoured: Iterable[str]) -> list[str]:
        """Names of fields that have no effect: the unknown ones, and engine options this engine does not honour."""
        without_effect = (self.model_fields_set & ENGINE_OPTIONS) - set(honoured)
        return sorted(without_effect | (self.model_extra or {}).keys())


ENGINE_OPTIONS = {
    "instructions", "seed", "emotion_vector", "emotion_audio", "emo_control_method", "emo_ref_path", "emo_weight",
    "emo_vec", "emo_text", "emo_random",
}  # fmt: skip


class SpeechRequest(JsonRequest):
    """OpenAI's createSpeech, and after `instructions` our extensions."""

    model: str
    input: Annotated[str, Field(max_length=MAX_INPUT_CHARACTERS, json_schema_extra=SPOKEN_PATTERN), SPOKEN]
    voice: Annotated[str | None, BeforeValidator(voice_name), Field(json_schema_extra=VOICE_OBJECT)] = None
    response_format: Literal["wav", "pcm", "mp3", "opus", "aac", "flac"] = "wav"
    speed: Annotated[float, Field(ge=0.25, le=4)] = 1.0
    stream_format: Literal["audio", "sse"] = "audio"
    instructions: str | None = None
    stream: bool = False
    sample_rate: int | None = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    emotion_vector: EmotionVector | None = None
    emotion_audio: str | None = None


class NativeRequest(JsonRequest):
    """IndexTTS's /tts_url."""

    text: Annotated[str, Field(max_length=MAX_NATIVE_CHARACTERS, json_schema_extra=SPOKEN_PATTERN), SPOKEN]
    spk_audio_path: Annotated[str, Field(min_length=1)]
    emo_control_method: Annotated[int, Field(ge=0, le=3)] = 0
    emo_ref_path: str | None = None
    emo_weight: Annotated[float, Field(ge=0, le=1.6)] = 1.0
    emo_vec: Annotated[EmotionVector, BeforeValidator(lambda v: [0.0] * 8 if v == [] else v)] = [0.0] * 8
    emo_text: str | None = None
    emo_random: bool = False
    max_text_tokens_per_sentence: Annotated[int, Field(ge=1)] = 120


class CloningRequest(JsonRequest):
    """IndexTTS's /tts_url_with_cloning; the paths are what /upload_audio answered."""

    text: Annotated[str, Field(max_length=MAX_NATIVE_CHARACTERS), SPOKEN]
    spk_audio_path: Annotated[str, Field(min_length=1)]
    emo_audio_path: str | None = None
    emo_alpha: Annotated[float, Field(ge=0, le=1.6)] = 1.0
    max_text_tokens_per_sentence: Annotated[int, Field(ge=1)] = 120


CODES = {
    "missing": "missing_required_parameter",
    "string_too_long": "string_above_max_length",
    "string_type": "invalid_type",
    "float_type": "invalid_type",
    "int_type": "invalid_type",
    "bool_type": "invalid_type",
}


def read_json() -> dict[str, Any]:
    """Return the body's JSON object; raise InvalidRequest, or let werkzeug raise 413 and 415."""
    if not request.is_json:
        raise UnsupportedMediaType("Send JSON with the header Content-Type: application/json.")
    try:
        body = json.loads(read_body())
    except (ValueError, RecursionError) as error:
        reason = printable(str(error), 200)
        raise InvalidRequest(f"The body is not valid JSON: {reason}.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json")
    return body


def read_body() -> bytes:
    """Return the body; raise InvalidRequest or a 413."""
    with reading():
        body = request.get_data()
        if request.content_length is None:
            request.stream.read(1)  # raises 413 where a chunked body was cut at the limit
    return body


@contextmanager
def reading() -> Iterator[None]:
    """Around reading the body: its next bytes come within BODY_TIMEOUT_S, else raise InvalidRequest."""
    client: socket.socket | None = request.environ.get("gunicorn.socket")
    try:
        yield
    except (ParseException, OSError, BadRequest) as error:
        if getattr(error, "errno", None) in FULL:
            raise NoSpace("The server has no room for this body.") from None
        raise InvalidRequest("The body did not arrive whole: send all of it.", code="incomplete_body") from None
    if client:
        client.settimeout(SEND_TIMEOUT_S)


@contextmanager
def received(param: str) -> Iterator[FileStorage]:
    """Give a multipart body's recording, to be kept; raise SpeechError where it cannot be taken or kept."""
    service = speech()
    if not service.receiving.acquire(blocking=False):
        raise Busy(f"{UPLOADS_AT_ONCE} recordings are being received; come back in {RETRY_AFTER_S} s.")
    try:
        yield recording(param)
    except BadReference as error:
        raise InvalidRequest(f"'{param}' {error}.", param, "bad_reference_audio") from None
    except OSError as error:
        log.error("%s a recording could not be written: %s", g.request_id, error)
        raise NoSpace(f"The recording could not be kept: {error.strerror}.") from None
    finally:
        service.receiving.release()


def recording(param: str) -> FileStorage:
    """Return the file in a multipart body; raise InvalidRequest or TooLarge."""
    engine, limit = speech().engine, speech().settings.max_upload_bytes
    request.max_content_length = limit + MULTIPART_BYTES
    try:
        with reading():
            file = request.files.get(param)
    except RequestEntityTooLarge:
        raise TooLarge(limit) from None
    if not engine.can_clone:  # told once the body is read: a client that still sends might not hear it
        told = f"'{param}': the {engine.name} engine cannot clone a voice; it speaks in those of GET /v1/audio/voices."
        raise InvalidRequest(told, param, "cannot_clone")
    if file is None:
        told = f"'{param}': send the recording as this field of a multipart/form-data body."
        raise InvalidRequest(told, param, "missing_required_parameter")
    if file.seek(0, io.SEEK_END) > limit:
        raise TooLarge(limit)
    file.seek(0)
    return file


def form_text(param: str) -> str:
    """Return a multipart body's text of 1 to 256 characters; raise InvalidRequest."""
    text = request.form.get(param, "").strip()
    if not (0 < len(text) <= 256 and text.isprintable()):
        raise InvalidRequest(f"'{param}': give 1 to 256 printable characters.", param)
    return text


def parse(model: type[JsonRequest], body: dict[str, Any]) -> Any:
    """Check a body's shape and ranges; raise InvalidRequest naming the first field that is wrong."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = str(first["loc"][0]) if first["loc"] else None
        message = printable(first["msg"].removeprefix("Value error, "), 300)
        raise InvalidRequest(f"'{param}': {message}." if param else message, param, CODES.get(first["type"])) from None


def printable(text: str, limit: int) -> str:
    """Text fit for a message or a log line: one line, no control characters, at most `limit` characters."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text[:limit])


# === Voices ===


Decibels = Annotated[float, Field(ge=-40, le=20)]


class Gains(BaseModel):
    """What brings each kind of text to the same loudness, in dB."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    en: Decibels
    zh: Decibels
    mixed: Decibels


class EmbeddedStyle(BaseModel):
    """How the embedded engine speaks a voice: a blend of its styles and a gain in dB for each kind of text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    en: str
    zh: str
    mixed: str  # Mandarin with Latin words in it
    gain_db: Gains


class Voice(BaseModel):
    """One entry of voices.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,64}$")]
    name: str
    language: str
    description: dict[Literal["zh", "en"], str]
    reference_audio: str
    embedded: EmbeddedStyle


class Voices(BaseModel):
    """voices.json: the voices in their order, the default, and other names for them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    default: str
    voices: Annotated[list[Voice], Field(min_length=1)]
    aliases: dict[str, str]

    @model_validator(mode="after")
    def check_names(self) -> Voices:
        ids = [voice.id for voice in self.voices]
        for voice_id in ids:
            if ids.count(voice_id) > 1:
                raise ValueError(f"two voices have the id {voice_id!r}")
        for alias, target in [*self.aliases.items(), ("default", self.default)]:
            if target not in ids:
                raise ValueError(f"{alias!r} means {target!r}, which is not the id of a voice")
            if alias in ids:
                raise ValueError(f"the alias {alias!r} is the id of a voice")
        return self

    @classmethod
    def load(cls, path: Path) -> Voices:
        """Read voices.json; raise ValueError naming the file, the line and what is wrong."""
        try:
            text = path.read_text(encoding="utf-8")
            return cls.model_validate(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: {error.msg}") from None
        except (OSError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path} (TTS_VOICES_FILE) cannot be read: {error}") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            told = first["msg"].removeprefix("Value error, ")
            line = line_of(text, first["loc"]) if first["loc"] else line_of_name(text, told)
            raise ValueError(f"{path}:{line}: {'.'.join(map(str, first['loc']))} {told}") from None

    def resolve(self, name: str | None) -> Voice:
        """Return the voice of an id or alias, the default for None; raise InvalidRequest listing the voices."""
        wanted = self.default if name is None else self.aliases.get(name, name)
        for voice in self.voices:
            if voice.id == wanted:
                return voice
        ids = ", ".join(voice.id for voice in self.voices)
        unknown = printable(wanted, 64)
        raise InvalidRequest(f"Unknown voice {unknown!r}. The voices are: {ids}.", "voice", "voice_not_found")

    def of_reference(self, path: str) -> Voice | None:
        """Return the voice whose reference audio has this path's base name, whatever its folder."""
        base = re.split(r"[/\\]", path)[-1]
        return next((voice for voice in self.voices if Path(voice.reference_audio).name == base), None)


def own_voice(made: OwnVoice, like: Voice) -> Voice:
    """Return a client's own voice as one of the voices."""
    told = {"id": made.id, "name": made.name, "description": {}, "reference_audio": str(made.audio)}
    return like.model_copy(update=told)


def line_of(text: str, location: tuple[int | str, ...]) -> int:
    """Line of voices.json that a validation error is about: its voice's `id`, else its first key."""
    if len(location) > 1 and location[0] == "voices":
        starts = [m.start() for m in re.finditer(r'"id"\s*:', text)]
        offset = starts[int(location[1])] if int(location[1]) < len(starts) else 0
    else:
        offset = max(0, text.find(f'"{location[0]}"')) if location else 0
    return text.count("\n", 0, offset) + 1


def line_of_name(text: str, told: str) -> int:
    """Line of voices.json where the name that a message quotes stands last: as a key, as an id, or anywhere."""
    quoted = re.search("'(.+?)'", told)
    name = f'"{re.escape(quoted[1])}"' if quoted else "$"
    for pattern in (rf"{name}\s*:", rf'"id"\s*:\s*{name}', name):
        if found := list(re.finditer(pattern, text)):
            return text.count("\n", 0, found[-1].start()) + 1
    return 1


# === Text to utterances ===

PARAGRAPH, SENTENCE, CLAUSE, QUOTED, JOINT, WORD = 5, 4, 3, 2, 1, 0  # how strong a break in the text is
# what is heard there, at speed 1
PAUSE_S = {PARAGRAPH: 0.55, SENTENCE: 0.32, CLAUSE: 0.16, QUOTED: 0.2, JOINT: 0.03, WORD: 0.03}
FIRST_SYLLABLES, FULL_SYLLABLES = 14, 56  # of the first utterance and of the longest: about 3 s and 13 s of speech
PAIRS = ("“”", "「」", "『』", "《》", "（）", r"\(\)", '""')
QUOTE = re.compile("|".join(f"{a}[^{a}{b}\n]{{1,200}}{b}" for a, b in (re.findall(r"\\?.", pair) for pair in PAIRS)))
ABBREVIATION = re.compile(
    r"\b(?:(?:Dr|Mr|Mrs|Ms|Prof|St|Jr|Sr|vs|etc|approx|Gen|Sen|Rep|Lt|Col|Capt|Inc|Ltd|Co|Corp|dept|est)\.(?!\s*$)"
    r"|(?:No|Nos|Fig|Figs|Vol|pp|p|Ch|Sec|Art)\.(?=\s*\d)|(?:[A-Za-z]\.)+(?!\s*$))\s*",
    re.IGNORECASE,
)
# Where a text without marks is cut with the least to hear: before these words, and after these particles.
JOINTS = (
    r"\s+(?=(?:and|but|or|so|which|who|that|because|when|while|where|if|after|before|until|although|though|since|than"
    r"|with|without|for|from|into|through|between|during|under|over|by|in|on|at)\b)"
    "|(?=而且|但是|因为|所以|然后|并且|如果|或者|以及|虽然|不过|于是|只要|只有|无论|同时|我们|你们|[他她它]们|大家|这[个些样]"
    "|那[个些样]|[今明昨]天|现在|已经|可以|可能|应该|没有|不是|就是|还是)"
    "|(?<=的)(?!时候|话|确|士)(?<!目的)|(?<=了)(?!解|不|得|[吗吧呢的])|(?<=着)(?![急火手想重名落陆眼迷凉的])"
    "|(?<=过)(?![去程来年分度于敏时期滤渡后了的])"
)
SPACE = r"[^\S\n]*"
AFTER = rf"[\"'”’）)」』》】\]]*(?=\s|$|[\u2e80-\U0003ffff]){SPACE}"  # closing quotes belong to the sentence they end
BREAK = re.compile(
    rf"(?P<paragraph>\s*\n\s*)|(?P<sentence>[。！？…；]+[”’）)」』》】]*{SPACE}|(?<![.!?;])[.!?;]++{AFTER})"
    rf"|(?P<clause>[，、：—]+{SPACE}|[,:]{AFTER}|\s[-–—]+\s)|(?P<joint>{JOINTS})|(?P<word>\s+)"
)
STRENGTH = {"paragraph": PARAGRAPH, "sentence": SENTENCE, "clause": CLAUSE, "joint": JOINT, "word": WORD}


class Utterance(NamedTuple):
    """One unit of text to speak, and the pause after it in seconds at speed 1."""

    text: str
    pause_s: float


def syllables(character: str) -> float:
    """Rough length of a character in syllables: CJK and digits one, a letter or a space a third."""
    return 1.0 if character >= "\u2e80" or character.isdigit() else 0.3


def find_breaks(text: str) -> list[tuple[int, int]]:
    """Return (position, strength) of each place where text may be cut; weaker in quotes and after abbreviations."""
    abbreviated = {m.end() for m in ABBREVIATION.finditer(text)}
    quoted = [False] * (len(text) + 1)
    for m in QUOTE.finditer(text):
        quoted[m.start() + 1 : m.end()] = [True] * (m.end() - m.start() - 1)
    found = []
    for m in BREAK.finditer(text):
        strength = STRENGTH[m.lastgroup or "word"]
        if strength in (SENTENCE, CLAUSE):
            strength = WORD if m.end() in abbreviated else QUOTED if quoted[m.end()] else strength
        found.append((m.end(), strength))
    return found


def split_utterances(text: str, first: float = FIRST_SYLLABLES, full: float = FULL_SYLLABLES) -> list[Utterance]:
    """Split text at its natural breaks: a short utterance first, then each up to twice as long as the one before."""
    reach = [0.0, *itertools.accumulate(map(syllables, text))]
    utterances, marks, start, limit = [], find_breaks(text), 0, min(first, full)
    while start < len(text):
        marks = [mark for mark in marks if mark[0] > start]
        sizes = (min(full, limit * times) for times in (1, 2, 2.5))
        near, far, awaited = (bisect_right(reach, reach[start] + size) - 1 for size in sizes)
        end, strength = choose_break(marks, near, far, awaited, len(text)) or (whole_words(text, start, far), WORD)
        if piece := " ".join(text[start:end].split()):
            utterances.append(Utterance(piece, PAUSE_S[strength]))
        start, limit = end, min(full, limit * 2)
    return utterances


def split_to_fit(text: str, fits: Callable[[str], bool], full: float = FULL_SYLLABLES) -> Iterator[Utterance]:
    """Split text into utterances, and those that do not fit the engine again at half the length.

    One by one, as asking takes a model time: it writes numbers out and counts tokens.
    """
    for utterance in split_utterances(text, full=full):
        if fits(utterance.text) or len(utterance.text) == 1:
            yield utterance
            continue
        *parts, last = split_to_fit(utterance.text, fits, min(full, sum(map(syllables, utterance.text))) / 2)
        yield from (*parts, Utterance(last.text, utterance.pause_s))


def split_sentences(text: str) -> list[str]:
    """Cut text after each sentence, inside quotes too."""
    ends = [m.end() for m in BREAK.finditer(text) if m.lastgroup in ("paragraph", "sentence")]
    return [text[start:end].strip() for start, end in itertools.pairwise([0, *ends, len(text)])]


def choose_break(
    marks: list[tuple[int, int]], near: int, far: int, awaited: int, length: int
) -> tuple[int, int] | None:
    """Return the strongest, then latest break up to `near`; else the first clause up to `awaited`, which leaves no
    short rest; else the strongest, then latest up to `far`, rather past `near` than before it."""
    paragraph = next((end for end, strength in marks if strength == PARAGRAPH), length)
    clauses = [(end, strength) for end, strength in marks if strength >= CLAUSE and end <= min(awaited, paragraph)]
    close = [mark for mark in clauses if mark[0] <= near]
    if paragraph <= near:
        return paragraph, PARAGRAPH
    if close:
        return max(close, key=lambda mark: (mark[1], mark[0]))
    if clauses or paragraph <= awaited:
        return clauses[0] if clauses else (paragraph, PARAGRAPH)
    within = (mark for mark in marks if mark[0] <= far)
    return max(within, key=lambda mark: (mark[0] > near, mark[1], mark[0]), default=None)


def whole_words(text: str, start: int, end: int) -> int:
    """Move `end` back so that it cuts no Latin word or number, unless that would leave nothing."""
    word = re.search(r"[A-Za-z0-9.,:'-]+\Z", text[start:end])
    inside = word and re.match(r"[A-Za-z0-9]", text[end : end + 1])
    return start + word.start() if word and inside and word.start() > 0 else max(end, start + 1)


# === Audio out ===

EDGE_S = 0.05  # of quiet kept at either end of an utterance: AAC's first frame rings over 43 ms
FADE_S = 0.005  # at a joint, so that it does not click
QUIET = 10 ** (-50 / 20)  # -50 dBFS: what counts as silence at an edge
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


def encode_stream(chunks: Iterator[AudioChunk], fmt: Format, sample_rate: int) -> Iterator[bytes]:
    """Yield a format's bytes chunk by chunk."""
    encoder = Encoder(fmt, sample_rate)
    for chunk in chunks:
        if encoded := encoder.encode(chunk):
            yield encoded
    yield encoder.close()


def encode_whole(chunks: Iterator[AudioChunk], fmt: Format, sample_rate: int) -> Iterator[bytes]:
    """Yield one file with its true length in its header."""
    samples = np.concatenate([chunk.samples for chunk in chunks])
    file = io.BytesIO()
    soundfile.write(file, to_int16(samples), sample_rate, format=fmt.container.upper(), subtype="PCM_16")
    yield file.getvalue()


# === Engines ===


@dataclass(frozen=True)
class SynthesisOptions:
    """What shapes an utterance beside its text and voice."""

    speed: float = 1.0
    seed: int | None = None
    emotion: Emotion = Emotion()
    reference: Reference | None = None  # speak like this, not like the voice
    cancellation: Cancellation = field(default_factory=Cancellation)


class Engine(Protocol):
    """What the pipeline needs of a speech engine; synthesize may be called from several threads at once."""

    name: str
    model: str
    sample_rate: int  # Hz
    max_utterance_tokens: int
    can_clone: bool
    can_emote: bool
    emotes_by_text: bool
    honours: frozenset[str]  # request fields that have an effect on this engine
    speed_range: tuple[float, float]  # speeds it speaks by itself, duration within a few per cent; beyond, stretch()
    slots: int  # utterances that it makes well at once

    def load(self) -> None:
        """Load the weights; raise with a message for the operator."""

    def check(self, voice: Voice) -> None:
        """Raise ValueError where the engine could not speak in a voice as voices.json describes it."""

    def unspoken(self, text: str) -> str:
        """Return the text's letters and digits that this engine does not read aloud."""

    def fits(self, utterance: str) -> bool:
        """Tell whether the engine takes an utterance of this length in one."""

    def sound_key(self, voice: Voice, options: SynthesisOptions) -> Hashable | None:
        """Return all that shapes the sound beside text and speed; None where it never sounds the same twice."""

    def report(self) -> dict[str, Any]:
        """Return what /health shows of this engine beside the rest."""

    def synthesize(self, utterance: str, voice: Voice, options: SynthesisOptions) -> AudioChunk:
        """Speak one utterance; raise EngineFault."""

    def healthy(self) -> str | None:
        """Return None, or why no utterance would be spoken."""

    def close(self) -> None:
        """Let go of everything."""


class EmbeddedEngine:
    """Kokoro-82M int8 on onnxruntime: any CPU."""

    name, model = "embedded", "kokoro-82m-int8"
    sample_rate = 24_000
    max_utterance_tokens = 508
    can_clone = can_emote = emotes_by_text = False
    honours: frozenset[str] = frozenset()
    speed_range = (1.0, 1.0)  # the network rounds each sound to frames: at 0.8 or 1.25 it is up to 15 % off
    slots = 1

    def __init__(self, settings: Settings):
        self._settings = settings

    def load(self) -> None:
        """Load the weights and the pronunciation data."""
        from embedded_voice import EmbeddedVoice  # the GPU box does without this file and its packages

        threads = self._settings.threads or min(4, os.cpu_count() or 1)
        self._voice = EmbeddedVoice(threads, self._settings.lexicon, self._settings.cache_dir)

    def check(self, voice: Voice) -> None:
        """Raise ValueError on a style that there is not."""
        for recipe in (voice.embedded.en, voice.embedded.zh, voice.embedded.mixed):
            self._voice.check_style(recipe)

    def unspoken(self, text: str) -> str:
        """Return what is neither Latin, nor a digit, nor a Han character with a reading."""
        return self._voice.unspoken(text)

    def fits(self, utterance: str) -> bool:
        """It cuts what is too long itself."""
        return True

    def sound_key(self, voice: Voice, options: SynthesisOptions) -> Hashable:
        """Its styles and gains: it does not sample."""
        return voice.embedded.model_dump_json()

    def report(self) -> dict[str, Any]:
        """Nothing more."""
        return {}

    def synthesize(self, utterance: str, voice: Voice, options: SynthesisOptions) -> AudioChunk:
        """Speak one utterance in the style that the voice has for its language."""
        language = self._voice.language(utterance)
        style = getattr(voice.embedded, language)
        samples = self._voice.speak(utterance, style, options.speed, options.cancellation.on_cancel)
        return level(AudioChunk(samples, self.sample_rate), getattr(voice.embedded.gain_db, language))

    def healthy(self) -> str | None:
        """There is no process of its own that could die."""
        return None

    def close(self) -> None:
        """Nothing outlives the worker."""


TAKES = 2  # of an utterance that came back wrong, before it is refused
LONGEST_S, LONGEST_S_PER_SYLLABLE = 3.0, 0.8  # a slow speaker takes 0.35 s; more than this is the model running away


class VllmEngine:
    """IndexTTS on vLLM, loaded once in this worker: what `omni` and `indextts` share."""

    sample_rate = 22_050
    can_clone = can_emote = True
    honours = frozenset(ENGINE_OPTIONS)

    def __init__(self, name: str, settings: Settings, model: str, create: Callable[[Settings], Any], slots: int = 8):
        self.name, self.model = name, model
        self.slots = slots  # enough to keep the first stage busy while the last one works
        self._settings, self._create = settings, create
        self._owner = EngineLoop()
        self._voice: VoiceModel | None = None
        self._gpus: list[dict[str, Any]] = []

    @property
    def speed_range(self) -> tuple[float, float]:
        """Speeds the model speaks by itself."""
        return self._voice.speed_range if self._voice else (1.0, 1.0)

    @property
    def emotes_by_text(self) -> bool:
        """Whether the model that reads an emotion out of words is there."""
        return bool(self._voice and self._voice.emotes_by_text)

    @property
    def max_utterance_tokens(self) -> int:
        """Text tokens of the longest utterance."""
        return self._voice.max_utterance_tokens if self._voice else 0

    def load(self) -> None:
        """Build the engine inside its owner's loop."""
        self._voice = self._owner.load(lambda: self._create(self._settings))
        self._gpus = gpus()

    def check(self, voice: Voice) -> None:
        """Raise ValueError where a voice's reference audio is missing or unfit."""
        load_reference(reference_file(voice))

    def unspoken(self, text: str) -> str:
        """The model tries whatever has letters."""
        return ""

    def fits(self, utterance: str) -> bool:
        """Count the utterance's tokens: too many kill the engine."""
        return self._voice.count_tokens(utterance) <= self._voice.max_utterance_tokens

    def synthesize(self, utterance: str, voice: Voice, options: SynthesisOptions) -> AudioChunk:
        """Speak one utterance; what comes back wrong is taken once more with another seed. Raises SpeechError."""
        reference = options.reference or voice_reference(voice)
        for take in range(TAKES):
            seed = None if options.seed is None else options.seed + take
            spoken = self._speak(utterance, reference, options, seed)
            if (fault := take_fault(spoken, self.sample_rate, utterance, options.speed)) is None:
                return level(AudioChunk(spoken.samples, self.sample_rate), 0)
            log.warning("take %d of an utterance of %d characters: %s", take + 1, len(utterance), fault)
        quoted = printable(utterance, 60)
        raise EngineFault(
            f"The engine could not speak {quoted!r}: {fault}, {TAKES} times. Reword or split it.",
            "input", "unspoken_sentence", quoted,
        )  # fmt: skip

    def _speak(self, utterance: str, reference: Reference, options: SynthesisOptions, seed: int | None) -> Spoken:
        work = self._voice.speak(utterance, reference, emotion=options.emotion, speed=options.speed, seed=seed)
        try:
            return self._owner.run(work, self._settings.utterance_timeout_s, options.cancellation.on_cancel)
        except EngineDead as error:
            raise Unavailable(f"The engine died: {error}. Another one is being started.", code="engine_died") from None
        except DeadlinePassed as error:
            raise Unavailable(f"Too late: {error}.", code="timeout") from None
        except GivenUp:
            raise ClientGone from None

    def sound_key(self, voice: Voice, options: SynthesisOptions) -> Hashable | None:
        """The seed, the reference audio and the emotion, where the model's sampling keeps to its seed."""
        seed, emotion = options.seed, options.emotion
        if seed is None or emotion.random or not self._voice.seeded:
            return None
        reference = options.reference or voice_reference(voice)
        audio = emotion.audio and emotion.audio.digest
        return seed, reference.digest, audio, emotion.weight, emotion.vector, emotion.text

    def healthy(self) -> str | None:
        """Return why the engine is dead, within a second of its death."""
        return self._owner.ailment()

    def report(self) -> dict[str, Any]:
        """What of the GPU may be used, what the GPU has, and what the model tells."""
        return {
            "gpus": self._gpus,
            "gpu_memory_utilization": self._settings.gpu_memory_utilization,
            "qwenemo_gpu_memory_utilization": self._settings.qwenemo_gpu_memory_utilization,
            "utterances": self._owner.in_flight,
            "emotes_by_text": self.emotes_by_text,
            **(self._voice.report() if self._voice else {}),
        }

    def close(self) -> None:
        """End the engine and its processes."""
        self._owner.close()


def reference_file(voice: Voice) -> Path:
    """Return where a voice's reference audio is: as voices.json says, from this file's folder."""
    return HERE / voice.reference_audio


def voice_reference(voice: Voice) -> Reference:
    """Return a voice's reference audio; raise Unavailable where it is gone, as a voice just deleted is."""
    try:
        return load_reference(reference_file(voice))
    except BadReference as error:
        raise Unavailable(f"The voice {voice.id} cannot be used now: {error}.") from None


def take_fault(spoken: Spoken, sample_rate: int, text: str, speed: float) -> str | None:
    """Return what is wrong with an utterance as the model made it, None where nothing is."""
    samples, seconds = spoken.samples, len(spoken.samples) / sample_rate
    longest = (LONGEST_S + LONGEST_S_PER_SYLLABLE * sum(map(syllables, text))) / speed
    faults = {
        "it came back empty": not samples.size,
        "it ran into the length limit": spoken.truncated,
        "it holds samples that are not numbers": not np.isfinite(samples).all(),
        "it came back silent": not np.abs(samples).max(initial=0) > QUIET,
        f"it lasts {seconds:.1f} s": seconds > longest,
    }
    return next((fault for fault, found in faults.items() if found), None)


async def create_omni(settings: Settings) -> VoiceModel:
    """Load IndexTTS-2 or 2.5 on vLLM-Omni."""
    from omni_voice import OmniVoice

    return await OmniVoice.create(
        model=settings.model,
        deploy_config=settings.omni_deploy_config,
        gpu_memory_utilization=settings.gpu_memory_utilization,
    )


async def create_indextts(settings: Settings) -> VoiceModel:
    """Load the IndexTTS2 class of an index-tts-vllm checkout."""
    from indextts_voice import IndexTTSVoice

    return await IndexTTSVoice.create(
        checkout=settings.indextts_dir,
        model_dir=settings.indextts_dir / settings.model_dir,
        fp16=settings.fp16,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        qwenemo_gpu_memory_utilization=settings.qwenemo_gpu_memory_utilization,
    )


ENGINES: dict[str, Callable[[Settings], Engine]] = {
    "omni": lambda s: VllmEngine("omni", s, Path(s.model).name, create_omni),
    "indextts": lambda s: VllmEngine("indextts", s, s.model_dir.name, create_indextts, slots=4),
    "embedded": EmbeddedEngine,
}
GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # the latter is WSL's


def choose_engine(settings: Settings) -> Engine:
    """Return the engine asked for, or for `auto` the best one that this machine can run."""
    name = find_engine(settings) if settings.engine == "auto" else settings.engine
    return ENGINES[name](settings)


def find_engine(settings: Settings) -> str:
    """Return omni or indextts where a GPU, the package and the weights are there, else embedded."""
    checkout = settings.indextts_dir
    if not any(device.exists() for device in GPU_DEVICES) or not importlib.util.find_spec("vllm"):
        return "embedded"
    if settings.model and importlib.util.find_spec("vllm_omni"):
        return "omni"
    needed = (checkout / "indextts" / "infer_vllm_v2.py", checkout / settings.model_dir / "config.yaml")
    return "indextts" if all(path.is_file() for path in needed) else "embedded"


# === The speech pipeline ===


@dataclass
class Order:
    """What to speak, and what is known of it so far."""

    text: str
    voice: Voice
    speed: float = 1.0
    sample_rate: int = PCM_RATE
    full_syllables: float = FULL_SYLLABLES
    seed: int | None = None
    emotion: Emotion = Emotion()
    reference: Reference | None = None  # speak like this, not like the voice
    is_gone: Callable[[], bool] = lambda: False  # tells whether the client left
    unspoken: str = ""  # its letters that the engine does not read
    patient: bool = False  # waits while the engine loads: the dubbing worker gives up after 6 s of refusals
    origins: list[str] = field(default_factory=list)  # how each utterance so far came: miss, shared or hit
    audio_s: float = 0.0  # made so far
    compute_s: float = 0.0  # the engine's time for it


class Speech:
    """The service: one engine, its slots, the voices and the requests under way."""

    def __init__(self, settings: Settings, engine: Engine):
        self.settings, self.engine = settings, engine
        self._voices = Voices.load(settings.voices_file)
        self.own_voices = OwnVoices(settings.own_voices_dir, settings.max_own_voices)
        self.uploads = Uploads(settings.upload_dir, settings.upload_max_age_s, settings.upload_dir_bytes)
        self.receiving = threading.BoundedSemaphore(UPLOADS_AT_ONCE)
        self.trouble: str | None = "loading"
        self.started = time.monotonic()
        self.slots = settings.slots or engine.slots
        self._jobs = Jobs(Slots(self.slots), settings.cache_bytes, lambda chunk: chunk.samples.nbytes)
        self._requests = self._characters = 0
        self._lock = threading.Lock()
        self.on_death: Callable[[], None] = lambda: None  # what to do once the engine died
        self.keys, self.wrong_keys = Keys(settings.api_keys, settings.api_keys_file), WrongKeys()
        self.metrics = Metrics()
        self.metrics.watch("speech_requests_under_way", "Requests admitted", lambda: self._requests)
        self.metrics.watch("speech_slots", "Utterances made at once", lambda: self.slots)
        self.metrics.watch("speech_cache_bytes", "Audio in the cache", lambda: self._jobs.cached_bytes)
        self.metrics.watch("speech_healthy", "1 when an utterance would be spoken", lambda: self.ailment() is None)

    @property
    def voices(self) -> Voices:
        """The voices of voices.json, and after them the clients' own where the engine can clone them."""
        made = self.own_voices.all() if self.engine.can_clone else []
        own = [own_voice(each, self._voices.resolve(None)) for each in made]
        return self._voices.model_copy(update={"voices": [*self._voices.voices, *own]})

    def start(self) -> None:
        """Load in the background; /health tells how that went."""
        if self.engine.can_clone:
            self.uploads.start()
            self.own_voices.start()
        threading.Thread(target=self._load, name="load", daemon=True).start()

    def load(self) -> None:
        """Load the engine; ready means that a warm-up utterance came back."""
        self.engine.load()
        self._check(self._voices)
        for text in ("Ready.", "好了。"):
            trim(self.engine.synthesize(text, self.voices.resolve(None), SynthesisOptions()))
        self.trouble = None

    def _load(self) -> None:
        try:
            self.load()
            log.info("ready: engine %s after %.1f s", self.engine.name, time.monotonic() - self.started)
        except Exception as error:
            self.trouble = f"engine {self.engine.name} did not load: {error}"
            log.exception("the engine did not load")
            return
        while (ailment := self.engine.healthy()) is None:
            time.sleep(HEALTH_CHECK_S)
        self.trouble = ailment
        log.error("the engine died: %s", ailment)
        self.on_death()

    def _check(self, voices: Voices) -> None:
        """Raise ValueError with the file, the line and the voice that the engine cannot speak in."""
        file = self.settings.voices_file
        for number, voice in enumerate(voices.voices):
            try:
                self.engine.check(voice)
            except ValueError as error:
                line = line_of(file.read_text(encoding="utf-8"), ("voices", number))
                raise ValueError(f"{file}:{line}: the voice {voice.id}: {error}") from None

    def reload_voices(self) -> None:
        """Read voices.json again; a broken file is refused and the running voices stay."""
        try:
            voices = Voices.load(self.settings.voices_file)
            self._check(voices)
            self._voices = voices
            log.info("voices reloaded: %d", len(voices.voices))
        except Exception as error:
            log.error("voices not reloaded, the running ones stay: %s", error)

    def ailment(self) -> str | None:
        """Return None when an utterance would be spoken, else why not."""
        return self.trouble or self.engine.healthy()

    @property
    def requests(self) -> int:
        """Requests admitted and not yet spoken to the end."""
        return self._requests

    def speak(self, order: Order) -> Iterator[AudioChunk]:
        """Yield an order's audio, utterance by utterance, at its rate; raise SpeechError or ClientGone."""
        with self._admitted(len(order.text)):
            self._await_loading(order)
            for utterance, chunk, last in self._synthesized(order):
                spoken = resample(chunk, order.sample_rate)
                pause = silence(0 if last else utterance.pause_s / order.speed, order.sample_rate)
                joined = AudioChunk(np.concatenate([spoken.samples, pause.samples]), order.sample_rate)
                order.audio_s += joined.seconds
                yield joined

    @contextmanager
    def _admitted(self, characters: int) -> Iterator[None]:
        with self._lock:
            full = self._requests >= self.settings.queue_requests
            too_much = self._requests and self._characters + characters > self.settings.queue_characters
            if full or too_much:
                raise Busy(f"{self._requests} requests are under way or waiting; come back in {RETRY_AFTER_S} s.")
            self._requests += 1
            self._characters += characters
        try:
            yield
        finally:
            with self._lock:
                self._requests -= 1
                self._characters -= characters

    def _await_loading(self, order: Order) -> None:
        """Wait while the engine loads, if the order is patient; raise Unavailable where it cannot be spoken."""
        deadline = time.monotonic() + self.settings.utterance_timeout_s
        while order.patient and self.trouble == "loading" and time.monotonic() < deadline:
            if order.is_gone():
                raise ClientGone
            time.sleep(CLIENT_CHECK_S)
        if reason := self.ailment():
            raise Unavailable(f"The service cannot speak now: {reason}.", code=reason if reason == "loading" else None)

    def _synthesized(self, order: Order) -> Iterator[tuple[Utterance, AudioChunk, bool]]:
        """Yield each utterance with its audio; the next ones are being made meanwhile."""
        waiting = self._speakable(order)
        line: deque = deque()
        pending: deque[tuple[Utterance, Claim]] = deque()
        try:
            while True:
                while len(pending) <= self.slots and (utterance := next(waiting, None)):
                    pending.append((utterance, self._claim(utterance, order, line)))
                if not pending:
                    return
                utterance, claim = pending[0]
                chunk = self._await(claim.future, order)
                pending.popleft()
                order.origins.append(claim.origin)
                self.metrics.utterances.labels(claim.origin).inc()
                yield utterance, chunk, not pending  # with one left to come, it would be pending by now
        finally:
            for _, claim in pending:
                claim.leave()

    def _claim(self, utterance: Utterance, order: Order, line: deque) -> Claim:
        sound = self.engine.sound_key(order.voice, self._options(order, Cancellation()))
        key = None if sound is None else (utterance, order.speed, sound)
        return self._jobs.claim(key, line, partial(self._synthesize, utterance, order, time.perf_counter()))

    def _speakable(self, order: Order) -> Iterator[Utterance]:
        """Yield the utterances; before the first, raise InvalidRequest where a part has letters and none is read."""
        utterances = split_utterances(order.text, full=order.full_syllables)
        for part in [*split_sentences(order.text), *(utterance.text for utterance in utterances)]:
            if (letters := set(filter(str.isalnum, part))) and letters <= set(self.engine.unspoken(part)):
                raise InvalidRequest(
                    f"The {self.engine.name} engine cannot read {printable(part, 40)!r}: "
                    "it speaks Mandarin and English.", "input", "unspeakable_text",
                )  # fmt: skip
        order.unspoken = self.engine.unspoken(order.text)
        if any(map(str.isalnum, order.text)):
            yield from split_to_fit(order.text, self.engine.fits, order.full_syllables)
        else:
            yield utterances[0]

    def _synthesize(
        self, utterance: Utterance, order: Order, asked: float, cancellation: Cancellation
    ) -> AudioChunk:
        """Make one utterance in a slot: the engine's own speed as far as it goes, stretching for the rest."""
        if not any(map(str.isalnum, utterance.text)):
            return silence(utterance.pause_s / order.speed, self.engine.sample_rate)
        began = time.perf_counter()
        self.metrics.slot_wait_s.observe(began - asked)
        options = self._options(order, cancellation)
        with self.metrics.busy_slots.track_inprogress():
            chunk = trim(self.engine.synthesize(utterance.text, order.voice, options))
        compute_s = time.perf_counter() - began
        order.compute_s += compute_s
        self.metrics.compute_s.inc(compute_s)
        self.metrics.rtf.observe(compute_s / chunk.seconds)
        return stretch(chunk, order.speed / options.speed)

    def _options(self, order: Order, cancellation: Cancellation) -> SynthesisOptions:
        slowest, fastest = self.engine.speed_range
        native = min(max(order.speed, slowest), fastest)
        return SynthesisOptions(native, order.seed, order.emotion, order.reference, cancellation)

    def _await(self, future: Future, order: Order) -> AudioChunk:
        """Wait for an utterance; raise ClientGone within CLIENT_CHECK_S of the client's leaving, or Unavailable."""
        deadline = time.monotonic() + self.settings.utterance_timeout_s
        while True:
            try:
                return future.result(timeout=CLIENT_CHECK_S)
            except FutureTimeout:
                if order.is_gone():
                    raise ClientGone from None
                if time.monotonic() > deadline:
                    raise Unavailable("The engine did not come to this text in time.", code="timeout") from None


# === App ===

api = Blueprint("speech", __name__)
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
EXPOSED_HEADERS = [
    "x-request-id", "X-Audio-Duration", "X-Sample-Rate", "X-Engine", "X-Voice", "X-Cache", "X-Ignored-Parameters",
    "Retry-After",
]  # fmt: skip


def create_app(settings: Settings | None = None, engine: Engine | None = None) -> Flask:
    """Build the WSGI application; nothing is loaded before speech_of(app).start()."""
    settings = settings or Settings.from_env()
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes
    app.json.ensure_ascii = app.json.sort_keys = False
    app.extensions["speech"] = Speech(settings, engine or choose_engine(settings))
    app.register_blueprint(api)
    app.register_error_handler(SpeechError, tell_speech_error)
    app.register_error_handler(HTTPException, tell_http_error)
    app.register_error_handler(ClientGone, lambda _: Response(status=499))
    app.register_error_handler(Exception, tell_fault)
    if settings.cors_origins:
        flask_cors.CORS(app, origins=list(settings.cors_origins), expose_headers=EXPOSED_HEADERS, max_age=600)
    app.wsgi_app = ForwardedAddress(SingleSlashes(app.wsgi_app), settings.trusted_proxies)
    return app


class SingleSlashes:
    """Serves //tts_url like /tts_url: what a base URL with a trailing slash gives."""

    def __init__(self, wsgi_app: Callable):
        self._wsgi_app = wsgi_app

    def __call__(self, environ: dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        environ["PATH_INFO"] = re.sub("/{2,}", "/", environ.get("PATH_INFO", ""))
        return self._wsgi_app(environ, start_response)


def speech() -> Speech:
    """Return the service behind the current request."""
    return current_app.extensions["speech"]


@api.before_app_request
def begin() -> None:
    """Name the request and check its key; the health and the voice list stay open."""
    given = request.headers.get("X-Request-Id", "")
    g.request_id = given if re.fullmatch(r"[\w.-]{1,128}", given, re.ASCII) else f"req_{uuid.uuid4().hex}"
    g.began = time.perf_counter()
    environ = request.environ
    if client := environ.get("gunicorn.socket"):
        client.settimeout(BODY_TIMEOUT_S)
    environ["speech.path"] = quote(request.path, safe="/")[:200]  # for the log: no query, no line breaks
    service = speech()
    if request.endpoint in OPEN_ENDPOINTS or request.method == "OPTIONS":
        return
    if request.endpoint == "speech.upload_audio" and service.settings.open_uploads:
        return
    if service.keys.needed and not service.keys.accept(sent_key()):
        if service.wrong_keys.count(request.remote_addr or "-"):
            raise TooManyWrongKeys(f"Too many wrong keys from your address; try again in {WRONG_KEYS_S} s.")
        raise InvalidKey("Give one of this server's API keys as 'Authorization: Bearer KEY'.")


def sent_key() -> str:
    """Return the key that came with the request, or ''."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else request.headers.get("X-Api-Key", "")


@api.after_app_request
def finish(response: Response) -> Response:
    """Put what every response carries on it."""
    response.headers.update(SECURITY_HEADERS)
    response.headers["x-request-id"] = g.request_id
    response.headers["openai-processing-ms"] = str(round((time.perf_counter() - g.began) * 1000))
    route = request.url_rule.rule if request.url_rule else "unknown"
    spoken = g.get("spoken", ("", ""))
    speech().metrics.requests.labels(route, response.status_code, *spoken).inc()
    return response


def tell_speech_error(error: SpeechError) -> Response:
    """Answer with OpenAI's envelope, or on the native routes in IndexTTS's shape."""
    if error.status >= 500:
        log.warning("%s %s: %s", g.request_id, error.status, error.logged())
    body = {"status": "error", "error": error.message} if request.path in NATIVE_PATHS else envelope(error)
    response = jsonify(body)
    response.status_code = error.status
    response.headers.update(error.headers())
    return response


def envelope(error: SpeechError) -> dict[str, Any]:
    """Return OpenAI's error body."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


HTTP_MESSAGES = {
    404: "There is no such route.", 405: "This route does not take that method.",
    413: "The body is too large: this server takes TTS_MAX_BODY_BYTES, {limit} bytes.",
}  # fmt: skip
HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large", 415: "unsupported_media_type"}


def tell_http_error(error: HTTPException) -> Response:
    """Give werkzeug's errors (404, 405, 413, 415 ...) the envelope."""
    status = error.code or 500
    message = HTTP_MESSAGES.get(status, error.description or error.name)
    limit = current_app.config["MAX_CONTENT_LENGTH"]
    told = SpeechError(message.replace("{limit}", str(limit)), None, HTTP_CODES.get(status))
    told.status = status
    told.type = "invalid_request_error" if status < 500 else "server_error"
    response = tell_speech_error(told)
    response.headers.extend((k, v) for k, v in error.get_headers() if k == "Allow")
    return response


def tell_fault(error: Exception) -> Response:
    """Answer 500 without internals; the log has them under the request id."""
    log.error("%s fault", g.request_id, exc_info=error)
    return tell_speech_error(SpeechError(f"The server made a mistake; its log names it under {g.request_id}."))


# === Routes ===


@api.post("/v1/audio/speech")
@api.post("/audio/speech")
def create_speech() -> Response:
    """OpenAI's createSpeech."""
    body: SpeechRequest = parse(SpeechRequest, read_json())
    voice = speech().voices.resolve(body.voice)
    rate = choose_rate(FORMATS[body.response_format], body.sample_rate, speech().engine.sample_rate)
    order = Order(
        body.input, voice, body.speed, rate, seed=body.seed, emotion=asked_emotion(body), is_gone=watch_client()
    )
    return answer(order, body.response_format, body.ignored(speech().engine.honours), body.stream, body.stream_format)


@api.post("/tts_url")
def create_native_speech() -> Response:
    """IndexTTS's native call."""
    body: NativeRequest = parse(NativeRequest, read_json())
    voice, reference = resolve_speaker(body.spk_audio_path)
    order = native_order(body, voice, asked_native_emotion(body), reference)
    return answer(order, "wav", body.ignored(speech().engine.honours))


@api.post("/tts_url_with_cloning")
def create_cloned_speech() -> Response:
    """IndexTTS's native call in the voice of an upload."""
    body: CloningRequest = parse(CloningRequest, read_json())
    if not speech().engine.can_clone:
        raise no_reference(body.spk_audio_path, "spk_audio_path")
    voice, reference = resolve_speaker(body.spk_audio_path)
    emotion = asked_cloned_emotion(body, reference or voice_reference(voice))
    return answer(native_order(body, voice, emotion, reference), "wav", body.ignored(speech().engine.honours))


@api.post("/upload_audio")
def upload_audio() -> Response:
    """Keep a recording for /tts_url_with_cloning; `server_path` only looks like a path."""
    with received("file") as file:
        token, size = speech().uploads.add(file.stream)
    return jsonify(server_path=token, filename=Path(token).name, size=size, status="success")


@api.post("/v1/audio/voices")
@api.post("/audio/voices")
def create_voice() -> Response:
    """OpenAI's custom voices: make one of a recording."""
    with received("audio_sample") as file:
        made = speech().own_voices.add(form_text("name"), form_text("consent"), file.stream)
    told = {"id": made.id, "name": made.name, "created_at": made.created_at}
    return jsonify(object="audio.voice", type="audio_sample", **told)


@api.delete("/v1/audio/voices/<voice_id>")
@api.delete("/audio/voices/<voice_id>")
def delete_voice(voice_id: str) -> Response:
    """Forget a voice that a client made."""
    if not speech().own_voices.remove(voice_id):
        raise UnknownVoice(f"There is no voice of your own with the id {printable(voice_id, 64)!r}.", "voice_id")
    return jsonify(id=voice_id, object="audio.voice.deleted", deleted=True)


@api.get("/v1/audio/voices")
@api.get("/audio/voices")
def list_voices() -> Response:
    """The voices, in their order."""
    shown = ("id", "name", "language", "description")
    return jsonify(voices=[voice.model_dump(include=set(shown)) for voice in speech().voices.voices])


@api.get("/v1/models")
@api.get("/models")
def list_models() -> Response:
    """The model names, in OpenAI's shape; the engine speaks whichever is asked for."""
    names = [*OPENAI_MODELS, speech().engine.model]
    model = {"object": "model", "created": 0, "owned_by": "indextts"}
    return jsonify(object="list", data=[{"id": name, **model} for name in names])


@api.get("/v1/audio/models")
@api.get("/audio/models")
def list_audio_models() -> Response:
    """The model names, in Open WebUI's shape."""
    return jsonify(models=[{"id": name, "name": name} for name in (*OPENAI_MODELS, speech().engine.model)])


@api.get("/openapi.json")
def describe_api() -> Response:
    """The OpenAPI description."""
    audio = [fmt.content_type for fmt in FORMATS.values()]
    return jsonify(describe("Speech server", RELEASE, [SpeechRequest, NativeRequest, CloningRequest], audio))


@api.get("/metrics")
def metrics() -> Response:
    """The figures, for Prometheus."""
    return Response(speech().metrics.text(), content_type="text/plain; version=0.0.4; charset=utf-8")


@api.get("/health")
def health() -> tuple[Response, int]:
    """200 when an utterance would be spoken, else 503 and why."""
    service = speech()
    ailment = service.ailment()
    status = "healthy" if ailment is None else "loading" if ailment == "loading" else "unhealthy"
    report = {
        "status": status,
        "message": ailment or "ready to speak",
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "engine": service.engine.name,
        "model": service.engine.model,
        "release": RELEASE,
        "sample_rate": service.engine.sample_rate,
        "voices": len(service.voices.voices),
        "requests": service.requests,
        "uptime_s": round(time.monotonic() - service.started, 1),
        **service.engine.report(),
    }
    return jsonify(report), 200 if ailment is None else 503


def native_order(
    body: NativeRequest | CloningRequest, voice: Voice, emotion: Emotion, reference: Reference | None
) -> Order:
    """Return what a native call asks for, at the engine's rate as every answer of its kind."""
    full = min(FULL_SYLLABLES, max(FIRST_SYLLABLES, body.max_text_tokens_per_sentence))
    rate = speech().engine.sample_rate
    return Order(
        body.text, voice, 1.0, rate, full,
        emotion=emotion, reference=reference, is_gone=watch_client(), patient=True,
    )  # fmt: skip


def resolve_speaker(path: str) -> tuple[Voice, Reference | None]:
    """Return the voice whose reference audio a path names, or the file to clone; raise InvalidRequest."""
    voice = speech().voices.of_reference(path)
    reference = read_reference(path, "spk_audio_path") if speech().engine.can_clone else None
    if voice and (reference is None or reference.digest == voice_reference(voice).digest):
        return voice, None
    if reference:
        return speech().voices.resolve(None), reference
    raise no_reference(path, "spk_audio_path")


def resolve_emotion_audio(path: str, param: str) -> Reference:
    """Return the reference audio that a path names, a voice's own included; raise InvalidRequest."""
    if reference := read_reference(path, param):
        return reference
    if voice := speech().voices.of_reference(path):
        return voice_reference(voice)
    raise no_reference(path, param)


def read_reference(path: str, param: str) -> Reference | None:
    """Return an upload, or a file below TTS_REFERENCE_DIRS; None for neither. Raises InvalidRequest for one unfit."""
    settings = speech().settings
    try:
        if uploaded := speech().uploads.find(path):
            return uploaded
        found = find_reference(path, settings.reference_dirs, settings.max_reference_bytes)
        return load_reference(found) if found else None
    except BadReference as error:
        raise InvalidRequest(f"'{param}': {error}.", param, "bad_reference_audio") from None


def no_reference(path: str, param: str) -> InvalidRequest:
    """Say that there is no such reference audio, and what there is."""
    known = ", ".join(Path(voice.reference_audio).name for voice in speech().voices.voices)
    engine, named = speech().engine, printable(path, 120)
    if engine.can_clone:
        told = f"'{param}': there is no {named!r} below this server's reference folders (TTS_REFERENCE_DIRS); "
        return InvalidRequest(f"{told}the voices are {known}.", param, "reference_not_found")
    told = f"'{param}': the {engine.name} engine cannot clone {named!r}; it speaks in the voices of {known}."
    return InvalidRequest(told, param, "cannot_clone")


def asked_emotion(body: SpeechRequest) -> Emotion:
    """Return the emotion that a speech request asks for in one of three ways; raise InvalidRequest for two at once."""
    if not speech().engine.can_emote:
        return Emotion()
    given = [name for name in ("emotion_vector", "emotion_audio", "instructions") if getattr(body, name)]
    if len(given) > 1:
        raise InvalidRequest(f"Give only one of {' and '.join(given)}.", given[1])
    if body.emotion_vector:
        return Emotion(vector=tuple(body.emotion_vector))
    if body.emotion_audio:
        return Emotion(audio=resolve_emotion_audio(body.emotion_audio, "emotion_audio"))
    return Emotion(text=emotion_text(body.instructions, "instructions") if body.instructions else None)


def asked_native_emotion(body: NativeRequest) -> Emotion:
    """Return the emotion of IndexTTS's four methods: the speaker's own, another audio's, a vector, a text."""
    if not speech().engine.can_emote or body.emo_control_method == 0:
        return Emotion()
    if body.emo_control_method == 2:
        return Emotion(vector=tuple(body.emo_vec), random=body.emo_random)
    if body.emo_control_method == 3:
        return Emotion(text=emotion_text(body.emo_text or body.text, "emo_text"), random=body.emo_random)
    if not body.emo_ref_path:
        raise InvalidRequest("'emo_ref_path': method 1 needs the path of an emotion's audio.", "emo_ref_path")
    return Emotion(resolve_emotion_audio(body.emo_ref_path, "emo_ref_path"), body.emo_weight)


def asked_cloned_emotion(body: CloningRequest, speaker: Reference) -> Emotion:
    """Return the emotion of another audio; the speaker's own is what the engine takes anyway, at any weight."""
    if not (body.emo_audio_path and speech().engine.can_emote):
        return Emotion()
    audio = resolve_emotion_audio(body.emo_audio_path, "emo_audio_path")
    return Emotion() if audio.digest == speaker.digest else Emotion(audio, body.emo_alpha)


def emotion_text(text: str, param: str) -> str:
    """Return the text; raise InvalidRequest where the model that reads emotions out of words is not there."""
    if speech().engine.emotes_by_text:
        return text
    raise InvalidRequest(
        f"'{param}': this server's model has no emotion-text model (qwen0.6bemo4-merge); "
        "give an emotion as a vector or as audio.", param, "no_emotion_text",
    )  # fmt: skip


def answer(
    order: Order, format_name: str, ignored: list[str], stream: bool = False, stream_format: str = "audio"
) -> Response:
    """Speak an order as an HTTP response; what fails before the first bytes still has a status of its own."""
    fmt = FORMATS[format_name]
    g.spoken = (order.voice.id, format_name)
    whole = stream_format == "audio" and fmt.whole and not stream
    in_one_piece = whole or request.environ.get("SERVER_PROTOCOL") == "HTTP/1.0"  # which cannot tell a cut from an end
    encode = encode_whole if whole else encode_stream
    parts = noted(encode(speech().speak(order), fmt, order.sample_rate), order, request.environ)
    first = next(parts)
    rest = itertools.chain([first], parts)
    if stream_format == "sse":
        response = Response(server_sent_events(rest, order), content_type="text/event-stream")
        response.headers["Cache-Control"] = "no-cache"
    elif in_one_piece:
        response = Response(b"".join(rest), content_type=fmt.content_type)
        response.headers["X-Audio-Duration"] = f"{order.audio_s:.3f}"
    else:
        response = Response(rest, content_type=fmt.content_type)
    response.call_on_close(parts.close)
    response.headers["X-Sample-Rate"] = str(order.sample_rate)
    response.headers["X-Engine"] = speech().engine.name
    response.headers["X-Cache"] = "hit" if set(order.origins) == {"hit"} else "miss"
    response.headers["X-Voice"] = "cloned" if order.reference else order.voice.id
    if order.unspoken:
        response.headers["X-Unspoken"] = quote("".join(dict.fromkeys(order.unspoken))[:32])
    if named := [name for name in ignored if re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII)]:
        response.headers["X-Ignored-Parameters"] = ", ".join(named[:32])
    return response


def noted(parts: Iterator[bytes], order: Order, environ: dict[str, Any]) -> Iterator[bytes]:
    """Pass the bytes on; leave the order's figures for the access log, and a fault in the error log."""
    request_id, metrics, began, speech_settings = g.request_id, speech().metrics, g.began, speech().settings
    told = False  # once the first bytes are sent, only the log can tell of a fault
    try:
        first = next(parts)
        metrics.first_audio_s.observe(time.perf_counter() - began)
        yield first
        told = True
        yield from parts
    except (ClientGone, GeneratorExit):
        raise
    except Exception as error:
        metrics.errors.labels(getattr(error, "code", None) or "fault").inc()
        if told and not isinstance(error, SpeechError):
            log.exception("%s failed after %.1f s of audio", request_id, order.audio_s)
        raise
    finally:
        metrics.audio_s.inc(order.audio_s)
        environ["speech.voice"] = order.voice.id
        environ["speech.characters"] = len(order.text)
        if shown := speech_settings.log_text_characters:
            environ["speech.text"] = printable(order.text, shown)
        environ["speech.audio_s"] = f"{order.audio_s:.2f}"
        environ["speech.rtf"] = f"{order.compute_s / order.audio_s:.3f}" if order.audio_s else "-"


def server_sent_events(parts: Iterator[bytes], order: Order) -> Iterator[str]:
    """Wrap encoded bytes as OpenAI's events; a failure becomes an `error` event, and no `done` follows."""
    try:
        for part in filter(None, parts):
            yield event("speech.audio.delta", audio=base64.b64encode(part).decode())
    except SpeechError as error:
        yield event("error", **envelope(error))
        return
    except Exception as error:
        if isinstance(error, ClientGone):
            raise
        yield event("error", **envelope(SpeechError("The server made a mistake.")))
        return
    read, spoken = len(order.text), round(order.audio_s * SSE_FRAMES_PER_S)
    usage = {"input_tokens": read, "output_tokens": spoken, "total_tokens": read + spoken}
    yield event("speech.audio.done", usage=usage)


def event(name: str, **content: Any) -> str:
    """Format one server-sent event."""
    return f"data: {json.dumps({'type': name, **content})}\n\n"


def watch_client() -> Callable[[], bool]:
    """Return a function that tells whether the current request's client has left."""
    client = request.environ.get("gunicorn.socket")
    return (lambda: has_left(client)) if client else (lambda: False)


def has_left(client: socket.socket) -> bool:
    """Peek without waiting: a socket that has nothing at all to say, for good, belongs to nobody."""
    try:
        poller = select.poll()  # a socket with a timeout would wait for it
        poller.register(client, select.POLLIN)
        return bool(poller.poll(0)) and client.recv(1, socket.MSG_PEEK) == b""
    except (OSError, ValueError):
        return True


if __name__ == "__main__":
    os.execvp("gunicorn", ["gunicorn", "-c", str(HERE / "gunicorn.conf.py"), "app:create_app()"])
