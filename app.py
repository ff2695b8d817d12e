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
What knows nothing of Flask has a file of its own: settings, errors, voices, utterances, scheduling, audio, engines.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import itertools
import json
import logging
import os
import re
import select
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

import flask_cors
import numpy as np
from flask import Blueprint, Flask, Response, current_app, g, jsonify, request
from gunicorn.http.errors import ParseException
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from werkzeug.datastructures import FileStorage
from werkzeug.exceptions import BadRequest, HTTPException, RequestEntityTooLarge, UnsupportedMediaType

from access import WRONG_KEYS_S, ForwardedAddress, Keys, WrongKeys
from audio import (
    FORMATS,
    PCM_RATE,
    AudioChunk,
    choose_rate,
    encode_stream,
    encode_whole,
    resample,
    silence,
    stretch,
    trim,
    warm_encoders,
)
from engines import ENGINE_OPTIONS, Engine, SynthesisOptions, choose_engine, voice_reference
from errors import (
    RETRY_AFTER_S,
    Busy,
    ClientGone,
    EngineFault,
    InvalidKey,
    InvalidRequest,
    NoSpace,
    SpeechError,
    TooLarge,
    TooManyWrongKeys,
    Unavailable,
    UnknownVoice,
    printable,
)
from metrics import Metrics
from openapi import describe
from reference_audio import BadReference, find_reference, load_reference
from reference_store import OwnVoices, Uploads
from scheduling import Claim, Jobs, Line, Slots, Ticket
from settings import HERE, Settings
from utterances import (
    FIRST_AUDIO_S,
    FIRST_SYLLABLES,
    FULL_SYLLABLES,
    PAUSE_S,
    SENTENCE,
    Utterance,
    count_syllables,
    first_length,
    split_sentences,
    split_to_fit,
    split_utterances,
)
from vllm_engine import Emotion, Reference
from voices import Voice, Voices, line_of, own_voice

MANIFEST = HERE / "release.sha256"  # the checksums of all files of a deployed release
RELEASE = hashlib.sha256((MANIFEST if MANIFEST.exists() else Path(__file__)).read_bytes()).hexdigest()[:12]
log = logging.getLogger("speech")


# === Constants ===

MAX_INPUT_CHARACTERS = 4096  # OpenAI's limit for `input`
MAX_EMOTION_CHARACTERS = 400  # the model that reads an emotion takes 2,048 tokens, up to four a character
MAX_NATIVE_CHARACTERS = 20_000  # /tts_url had none; this one keeps a request under an hour of speech
BODY_TIMEOUT_S = 30  # for the next bytes of a request's body
SEND_TIMEOUT_S = 600  # for a client to take the next bytes of the answer: a player may have paused
PIECE_BYTES = 256 << 10  # of an answer that is sent whole
HEALTH_CHECK_S = 0.5  # how often the engine is asked whether it lives
CLIENT_CHECK_S = 0.2  # how often a waiting request looks whether its client is still there
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # what a full or closed disk says
NATIVE_PLACES = 16  # beyond the queue's, for native calls alone: the dubbing worker gives up after 6 s of refusals
UPLOADS_AT_ONCE = 16  # more wait outside: each holds a thread
MULTIPART_BYTES = 64 << 10  # of a multipart body beside its file
NATIVE_PATHS = ("/tts_url", "/tts_url_with_cloning", "/upload_audio")  # their errors have IndexTTS's shape
REST_S = 0.05  # of silence at either end of an answer: a word cut too close is misheard (你好 as 您好)
FIRST_WORDS, WARM_UPS = ("Ready.", "好了。"), 3  # what is spoken before it is ready, and how often it may be tried
PACE_WEIGHT = 0.2  # of an utterance in the engine's pace: about the last ten count
LONG_SYLLABLES = 4 * FULL_SYLLABLES  # a text of about a minute
SSE_FRAMES_PER_S = 50  # usage: input_tokens counts characters, output_tokens frames of 20 ms
OPENAI_MODELS = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts", "index-tts-v2")  # names clients ask for; any other works
OPEN_ENDPOINTS = {None, *(f"speech.{name}" for name in (
    "health", "list_voices", "list_models", "list_audio_models", "describe_api",
))}  # fmt: skip


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
RATES = sorted({rate for fmt in FORMATS.values() for rate in fmt.rates})
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


class SpeechRequest(JsonRequest):
    """OpenAI's createSpeech, and after `instructions` our extensions."""

    model: str
    input: Annotated[str, Field(max_length=MAX_INPUT_CHARACTERS, json_schema_extra=SPOKEN_PATTERN), SPOKEN]
    voice: Annotated[str | None, BeforeValidator(voice_name), Field(json_schema_extra=VOICE_OBJECT)] = None
    response_format: Literal["wav", "pcm", "mp3", "opus", "aac", "flac"] = "wav"
    speed: Annotated[float, Field(ge=0.25, le=4)] = 1.0
    stream_format: Literal["audio", "sse"] = "audio"
    instructions: Annotated[str | None, Field(max_length=MAX_INPUT_CHARACTERS)] = None
    stream: bool = False
    sample_rate: Annotated[int | None, Field(json_schema_extra={"enum": [*RATES, None]})] = None
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
    emo_text: Annotated[str | None, Field(max_length=MAX_INPUT_CHARACTERS)] = None
    emo_random: bool = False
    max_text_tokens_per_sentence: Annotated[int, Field(ge=1)] = 120


class CloningRequest(JsonRequest):
    """IndexTTS's /tts_url_with_cloning; the paths are what /upload_audio answered."""

    text: Annotated[str, Field(max_length=MAX_NATIVE_CHARACTERS, json_schema_extra=SPOKEN_PATTERN), SPOKEN]
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


# === The speech pipeline ===


@dataclass
class Order:
    """What to speak, and what is known of it so far."""

    text: str
    voice: Voice
    speed: float = 1.0
    sample_rate: int = PCM_RATE
    full_syllables: float = FULL_SYLLABLES
    first_syllables: float = FIRST_SYLLABLES
    seed: int | None = None
    emotion: Emotion = Emotion()
    reference: Reference | None = None  # speak like this, not like the voice
    is_gone: Callable[[], bool] = lambda: False  # tells whether the client left
    unspoken: str = ""  # its letters that the engine does not read
    patient: bool = False  # waits while the engine loads: the dubbing worker gives up after 6 s of refusals
    cached: bool = False  # all of it was made before
    audio_s: float = 0.0  # made so far
    compute_s: float = 0.0  # the engine's time for it

    @property
    def public_voice(self) -> str:
        """What a client and the log are told: the voice's id, or cloned."""
        return "cloned" if self.reference else self.voice.id


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
        self._slots = Slots(self.slots)
        self._jobs = Jobs(self._slots, settings.cache_bytes, lambda chunk: chunk.samples.nbytes)
        self.requests = self._characters = 0  # admitted and not yet spoken to the end
        self._pace_s = FIRST_AUDIO_S / FIRST_SYLLABLES  # the engine's time for a syllable, lately
        self._lock, self._reloading = threading.Lock(), threading.Lock()
        self.on_death: Callable[[], None] = lambda: None  # what to do once the engine died
        self.retry_load_s: float | None = None  # after which one that did not load counts as dead; None: never
        self.keys, self.wrong_keys = Keys(settings.api_keys, settings.api_keys_file), WrongKeys()
        self.metrics = Metrics()
        self.metrics.watch("speech_requests_under_way", "Requests admitted", lambda: self.requests)
        self.metrics.watch("speech_utterances_waiting", "Utterances that wait for a slot", self._slots.waiting)
        self.metrics.watch("speech_slots", "Utterances made at once", lambda: self.slots)
        self.metrics.watch("speech_cache_bytes", "Audio in the cache", lambda: self._jobs.cached_bytes)
        self.metrics.watch("speech_healthy", "1 when an utterance would be spoken", lambda: self.ailment() is None)

    @property
    def voices(self) -> Voices:
        """The voices of voices.json, and after them the clients' own where the engine can clone them."""
        made = self.own_voices.all() if self.engine.can_clone else []
        own = [own_voice(each, self._voices.resolve(None)) for each in made]
        return self._voices.model_copy(update={"voices": [*self._voices.voices, *own]})

    def voice_label(self, order: Order) -> str:
        """Return what the metrics call an order's voice: those that clients make, ever new ones, are one label."""
        return order.public_voice if order.reference or order.voice in self._voices.voices else "own"

    def start(self) -> None:
        """Load in the background; /health tells how that went."""
        if self.engine.can_clone:
            self.uploads.start()
            self.own_voices.start()
        threading.Thread(target=self._load, name="load", daemon=True).start()

    def load(self) -> None:
        """Load the engine; ready means that its first words came back."""
        self.engine.load()
        self._fit_slots()
        self._check(self._voices)
        warm_encoders()
        try:
            for text in FIRST_WORDS:
                self._warm_up(text)
        except Unavailable as error:
            raise RuntimeError(f"at its first words: {error.__cause__ or error}. The log above says why") from error
        self.trouble = None

    def _fit_slots(self) -> None:
        """Have the engine's slots: they are more once it had to take its other runtime."""
        slots, self.slots = self.slots, self.settings.slots or self.engine.slots
        self._slots.add(self.slots - slots)

    def _warm_up(self, text: str) -> None:
        """Have it speak; a few times, as an engine that samples may miss so short a text. Raises SpeechError."""
        for misses in range(WARM_UPS):
            try:
                trim(self.engine.synthesize(text, self.voices.resolve(None), SynthesisOptions()))
                return
            except EngineFault:
                if misses + 1 == WARM_UPS:
                    raise

    def _load(self) -> None:
        try:
            self.load()
            log.info("ready: engine %s after %.1f s", self.engine.name, time.monotonic() - self.started)
        except Exception as error:
            self.trouble = f"engine {self.engine.name} did not load: {error}"
            log.exception("the engine did not load")
            self.engine.close()
            if self.retry_load_s is None:
                return
            log.info("the next try is in %g s", self.retry_load_s)
            time.sleep(self.retry_load_s)
        else:
            while (ailment := self.engine.healthy()) is None:
                self._fit_slots()
                time.sleep(HEALTH_CHECK_S)
            if self.trouble:  # it was closed
                return
            self.trouble = ailment
            log.error("the engine died: %s", ailment)
        self.on_death()

    def close(self) -> None:
        """Let go of the engine, whose end is then not taken for its death."""
        self.trouble = "shutting down"
        self.engine.close()

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
        """Read voices.json again, once the engine is loaded; a broken file is refused and the running voices stay."""
        while self.trouble == "loading":
            time.sleep(CLIENT_CHECK_S)
        with self._reloading:  # so that what was read first is not put in last
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

    def first_syllables(self, order: Order) -> float:
        """Return how long a stream's first utterance may be now: in a long text, longer where the engine is fast.

        A text with a seed, and a shorter one, is cut the same way every time: it is the same sound in every format.
        """
        long = order.seed is None and count_syllables(order.text) > LONG_SYLLABLES
        return first_length(self._pace_s) if long else FIRST_SYLLABLES

    def speak(self, order: Order) -> Iterator[AudioChunk]:
        """Yield an order's audio, utterance by utterance, at its rate; raise SpeechError or ClientGone."""
        slowness = 1 / min(order.speed, 1)  # there is so much more audio of a text
        with self._admitted(len(order.text) * slowness, NATIVE_PLACES if order.patient else 0):
            self._await_loading(order)
            self._check_emotion(order)
            for utterance, chunk, last in self._synthesized(order):
                spoken = resample(chunk, order.sample_rate)
                before = silence(0 if order.audio_s else REST_S / order.speed, order.sample_rate)
                after = silence((REST_S if last else utterance.pause_s) / order.speed, order.sample_rate)
                samples = np.concatenate([before.samples, spoken.samples, after.samples])
                joined = AudioChunk(samples, order.sample_rate)
                order.audio_s += joined.seconds
                yield joined

    @contextmanager
    def _admitted(self, characters: float, more: int) -> Iterator[None]:
        """Hold a place in the queue, or in one of so many more; raise Busy."""
        places = self.settings.queue_requests + more
        limit = self.settings.queue_characters + more * MAX_NATIVE_CHARACTERS
        with self._lock:
            full = self.requests >= places
            too_much = self.requests and self._characters + characters > limit
            if full or too_much:
                raise Busy(f"{self.requests} requests are under way or waiting; come back in {RETRY_AFTER_S} s.")
            self.requests += 1
            self._characters += characters
        try:
            yield
        finally:
            with self._lock:
                self.requests -= 1
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

    def _check_emotion(self, order: Order) -> None:
        """Raise InvalidRequest for an emotion in words where the model reads none, which it tells once it is loaded."""
        if order.emotion.text and not self.engine.emotes_by_text:
            param = "emo_text" if order.patient else "instructions"
            raise InvalidRequest(
                f"'{param}': this server's model has no emotion-text model (qwen0.6bemo4-merge); "
                "give an emotion as a vector or as audio.", param, "no_emotion_text",
            )  # fmt: skip

    def _synthesized(self, order: Order) -> Iterator[tuple[Utterance, AudioChunk, bool]]:
        """Yield each utterance with its audio; the next ones are being made meanwhile."""
        waiting, known = itertools.tee(self._speakable(order))
        order.cached = all(self._jobs.holds(self._key(utterance, order)) for utterance in known)  # as far as it is
        line = Line()
        pending: deque[tuple[Utterance, Claim]] = deque()

        def claim_up_to(most: int) -> None:
            while len(pending) < most and (utterance := next(waiting, None)):
                pending.append((utterance, self._claim(utterance, order, line)))

        try:
            claim_up_to(1 if self.engine.first_alone else self.slots + 1)
            while pending:
                utterance, claim = pending[0]
                chunk = self._await(claim.future, order)
                pending.popleft()
                claim_up_to(self.slots)
                self.metrics.utterances.labels(claim.origin).inc()
                yield utterance, chunk, not pending  # with one left to come, it would be pending by now
                claim_up_to(self.slots + 1)
        finally:
            for _, claim in pending:
                claim.leave()

    def _claim(self, utterance: Utterance, order: Order, line: Line) -> Claim:
        make = partial(self._synthesize, utterance.text, order, time.perf_counter())
        return self._jobs.claim(self._key(utterance, order), line, count_syllables(utterance.text), make)

    def _key(self, utterance: Utterance, order: Order) -> Hashable | None:
        """Return all that shapes an utterance's sound; None where it never sounds the same twice."""
        sound = self.engine.sound_key(order.voice, self._options(order, Ticket()))
        return None if sound is None else (utterance.text, order.speed, sound)

    def _speakable(self, order: Order) -> Iterator[Utterance]:
        """Yield the utterances; before the first, raise InvalidRequest where a part has letters and none is read."""
        utterances = split_utterances(
            order.text, order.first_syllables, order.full_syllables, self.engine.usual_syllables
        )
        for part in [*split_sentences(order.text), *(utterance.text for utterance in utterances)]:
            if (letters := set(filter(str.isalnum, part))) and letters <= set(self.engine.unspoken(part)):
                raise InvalidRequest(
                    f"The {self.engine.name} engine cannot read {printable(part, 40)!r}: "
                    "it speaks Mandarin and English.", "input", "unspeakable_text",
                )  # fmt: skip
        order.unspoken = self.engine.unspoken(order.text)
        spoken = any(map(str.isalnum, order.text))
        yield from split_to_fit(utterances, self.engine.fits) if spoken else utterances[:1]

    def _synthesize(self, text: str, order: Order, asked: float, ticket: Ticket) -> AudioChunk:
        """Make one utterance in a slot: the engine's own speed as far as it goes, stretching for the rest."""
        if not any(map(str.isalnum, text)):
            return silence(PAUSE_S[SENTENCE] / order.speed, self.engine.sample_rate)
        began = time.perf_counter()
        options = self._options(order, ticket)
        try:
            with self.metrics.busy_slots.track_inprogress():
                chunk = trim(self.engine.synthesize(text, order.voice, options))
        finally:
            self.metrics.slot_wait_s.observe(began - asked + ticket.waited_s)
        slot_s = time.perf_counter() - began
        self._pace_s += PACE_WEIGHT * (slot_s / count_syllables(text) - self._pace_s)
        compute_s = slot_s - ticket.waited_s
        order.compute_s += compute_s
        self.metrics.compute_s.inc(compute_s)
        self.metrics.rtf.observe(compute_s / chunk.seconds)
        return stretch(chunk, order.speed / options.speed)

    def _options(self, order: Order, ticket: Ticket) -> SynthesisOptions:
        slowest, fastest = self.engine.speed_range
        native = min(max(order.speed, slowest), fastest)
        return SynthesisOptions(native, order.seed, order.emotion, order.reference, ticket)

    def _await(self, future: Future, order: Order) -> AudioChunk:
        """Wait for an utterance; raise ClientGone within CLIENT_CHECK_S of the client's leaving, or Unavailable."""
        deadline = time.monotonic() + self.settings.utterance_timeout_s
        while True:
            try:
                return future.result(timeout=CLIENT_CHECK_S)
            except FutureTimeout:
                if future.done():  # just now; or the TimeoutError is the engine's own
                    return future.result()
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
    "X-Unspoken", "Retry-After",
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
        log.warning("%s %s: %s", g.request_id, error.status, error)
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
    try:
        known = speech().own_voices.remove(voice_id)
    except OSError as error:
        raise NoSpace(f"The voice could not be removed: {error.strerror}.") from None
    if not known:
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
    return Emotion(text=(body.instructions or "")[:MAX_EMOTION_CHARACTERS] or None)


def asked_native_emotion(body: NativeRequest) -> Emotion:
    """Return the emotion of IndexTTS's four methods: the speaker's own, another audio's, a vector, a text."""
    if not speech().engine.can_emote or body.emo_control_method == 0:
        return Emotion()
    if body.emo_control_method == 2:
        return Emotion(vector=tuple(body.emo_vec), random=body.emo_random)
    if body.emo_control_method == 3:
        return Emotion(text=(body.emo_text or body.text)[:MAX_EMOTION_CHARACTERS], random=body.emo_random)
    if not body.emo_ref_path:
        raise InvalidRequest("'emo_ref_path': method 1 needs the path of an emotion's audio.", "emo_ref_path")
    return Emotion(resolve_emotion_audio(body.emo_ref_path, "emo_ref_path"), body.emo_weight)


def asked_cloned_emotion(body: CloningRequest, speaker: Reference) -> Emotion:
    """Return the emotion of another audio; the speaker's own is what the engine takes anyway, at any weight."""
    if not (body.emo_audio_path and speech().engine.can_emote):
        return Emotion()
    audio = resolve_emotion_audio(body.emo_audio_path, "emo_audio_path")
    return Emotion() if audio.digest == speaker.digest else Emotion(audio, body.emo_alpha)


def answer(
    order: Order, format_name: str, ignored: list[str], stream: bool = False, stream_format: str = "audio"
) -> Response:
    """Speak an order as an HTTP response; what fails before the first bytes still has a status of its own."""
    fmt = FORMATS[format_name]
    g.spoken = (speech().voice_label(order), format_name)
    whole = stream_format == "audio" and fmt.whole and not stream
    in_one_piece = whole or request.environ.get("SERVER_PROTOCOL") == "HTTP/1.0"  # which cannot tell a cut from an end
    if not in_one_piece:
        order.first_syllables = speech().first_syllables(order)
    encode = encode_whole if whole else encode_stream
    kind = "whole" if in_one_piece else "streamed"
    parts = noted(encode(speech().speak(order), fmt, order.sample_rate), order, kind, request.environ)
    first = next(parts)
    rest = itertools.chain([first], parts)
    if stream_format == "sse":
        response = Response(server_sent_events(rest, order), content_type="text/event-stream")
        response.headers["Cache-Control"] = "no-cache"
    elif in_one_piece:
        response = whole_response(b"".join(rest), fmt.content_type)
        response.headers["X-Audio-Duration"] = f"{order.audio_s:.3f}"
    else:
        response = Response(rest, content_type=fmt.content_type)
    response.call_on_close(parts.close)
    response.headers["X-Sample-Rate"] = str(order.sample_rate)
    response.headers["X-Engine"] = speech().engine.name
    response.headers["X-Cache"] = "hit" if order.cached else "miss"
    response.headers["X-Voice"] = order.public_voice
    if order.unspoken:
        response.headers["X-Unspoken"] = quote("".join(dict.fromkeys(order.unspoken))[:32])
    if named := [name for name in ignored if re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII)]:
        response.headers["X-Ignored-Parameters"] = ", ".join(named[:32])
    return response


def whole_response(body: bytes, content_type: str) -> Response:
    """Answer with all at once, a long one cut up: a client has SEND_TIMEOUT_S for each piece, not for all of it."""
    if len(body) <= PIECE_BYTES:
        return Response(body, content_type=content_type)
    pieces = (body[start : start + PIECE_BYTES] for start in range(0, len(body), PIECE_BYTES))
    return Response(pieces, content_type=content_type, headers={"Content-Length": str(len(body))})


def noted(parts: Iterator[bytes], order: Order, kind: str, environ: dict[str, Any]) -> Iterator[bytes]:
    """Pass the bytes on; leave the order's figures for the access log, and a fault in the error log."""
    request_id, metrics, began, speech_settings = g.request_id, speech().metrics, g.began, speech().settings
    told = False  # once the first bytes are sent, only the log can tell of a fault
    try:
        first = next(parts)
        metrics.first_audio_s.labels(kind).observe(time.perf_counter() - began)
        yield first
        told = True
        yield from parts
    except ClientGone:
        raise
    except Exception as error:
        metrics.errors.labels(getattr(error, "code", None) or "fault").inc()
        if told and not isinstance(error, SpeechError):
            log.exception("%s failed after %.1f s of audio", request_id, order.audio_s)
        raise
    finally:
        metrics.audio_s.inc(order.audio_s)
        environ["speech.voice"] = order.public_voice
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
    except ClientGone:
        raise
    except Exception as error:
        told = error if isinstance(error, SpeechError) else SpeechError("The server made a mistake.")
        yield event("error", **envelope(told))
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
    """Look without waiting: a socket that will say no more belongs to nobody, whatever it said before and is unread."""
    try:
        poller = select.poll()
        poller.register(client, select.POLLRDHUP)
        return bool(poller.poll(0))
    except (OSError, ValueError):
        return True


if __name__ == "__main__":
    os.execvp("gunicorn", ["gunicorn", "-c", str(HERE / "gunicorn.conf.py"), "app:create_app()"])
