"""Anything at all as a request: no 500, no hang, no traceback. FUZZ_EXAMPLES sets how many of each kind (make fuzz)."""

import json
import logging
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app import create_app
from embedded_g2p import G2P, speakable
from embedded_voice import EmbeddedVoice
from settings import Settings
from utterances import find_breaks, split_sentences, split_utterances

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 150))
SPEECH = "/v1/audio/speech"
fuzzed = settings(
    max_examples=EXAMPLES, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip

controls = st.sampled_from("\0\r\n\t\u202e\u200b\ufeff")
characters = st.one_of(st.characters(), st.characters(min_codepoint=0x10000), controls)
texts = st.one_of(
    st.text(characters, max_size=60),
    st.text(st.sampled_from("你好世界。，！？3.14:%$¥-/@#A a1'\"“”（）\n🙂é"), max_size=120),
    st.builds(lambda c, n: c * n, characters, st.sampled_from([1, 100, 4096, 4097])),
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4))
FIELDS = [
    "model", "input", "voice", "response_format", "speed", "stream_format", "instructions", "stream", "sample_rate",
    "seed", "emotion_vector", "emotion_audio", "text", "spk_audio_path", "emo_control_method", "emo_vec", "emo_weight",
    "emo_ref_path", "emo_text", "emo_random", "max_text_tokens_per_sentence",
]  # fmt: skip
likely = {
    "model": st.just("tts-1"), "input": texts, "text": texts,
    "voice": st.sampled_from(["alloy", "default", "nobody", {"id": "nova"}]),
    "spk_audio_path": st.one_of(st.just("voice_03.wav"), texts),
    "response_format": st.sampled_from(["wav", "pcm", "mp3", "opus", "aac", "flac", "ogg"]),
    "speed": st.floats(0.2, 4.2), "stream_format": st.sampled_from(["audio", "sse", "x"]), "stream": st.booleans(),
    "sample_rate": st.sampled_from([8000, 16000, 22050, 44100, 48000, 1]),
}  # fmt: skip
fields = st.one_of(*(st.tuples(st.just(name), st.one_of(likely.get(name, values), values)) for name in FIELDS))
bodies = st.builds(
    lambda base, more: {**base, **dict(more)},
    st.fixed_dictionaries({name: likely[name] for name in ("model", "input", "text", "voice", "spk_audio_path")}),
    st.lists(fields, max_size=4),
)
known_paths = st.sampled_from([SPEECH, "/tts_url", "//tts_url", "/health"])
paths = st.one_of(known_paths, st.text(characters, max_size=40).map("/".__add__))
NAMES = ["Authorization", "X-Api-Key", "X-Request-Id", "Content-Type", "Origin", "X-Forwarded-For", "Accept"]
METHODS = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE"]
header_values = st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=50)
HARD = ["🙂" * 4096, "\u202e" * 4096, "\u0301" * 4096, "ﷺ" * 4096, "1" * 4096, "。" * 4096, "a." * 2048]


@pytest.fixture(scope="module")
def faults():
    """What is logged as a warning or an error, by whomever: strangers must not be able to flood the log."""
    found = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    yield found
    logging.getLogger().removeHandler(handler)


def check(response, faults):
    """No answer is a fault of ours, and each error has its shape."""
    data = response.get_data()
    assert response.status_code < 500 and not faults, (response.status_code, data[:300], faults)
    if response.status_code >= 400 and response.request.method != "HEAD":
        told = json.loads(data)
        assert told.get("status") == "error" or {"message", "type", "param", "code"} == told["error"].keys()


@fuzzed
@given(path=st.sampled_from([SPEECH, "/tts_url"]), body=bodies)
def test_any_fields(client, faults, path, body):
    data = json.dumps(body).encode("utf-8", "surrogatepass")
    check(client.post(path, data=data, content_type="application/json"), faults)


@fuzzed
@given(
    path=st.sampled_from([SPEECH, "/tts_url"]),
    data=st.one_of(st.binary(max_size=300), values.map(json.dumps).map(str.encode)),
)
def test_any_bytes(client, faults, path, data):
    check(client.post(path, data=data, content_type="application/json"), faults)


@fuzzed
@given(path=paths, method=st.sampled_from(METHODS), headers=st.dictionaries(st.sampled_from(NAMES), header_values))
def test_any_path_method_and_headers(client, faults, path, method, headers):
    raw = path.encode("utf-8", "surrogatepass").decode("latin-1")  # as WSGI has it
    check(client.open("/", method=method, headers=headers, environ_overrides={"PATH_INFO": raw}), faults)


@pytest.fixture(scope="module")
def g2p():
    """The real pronunciation."""
    return G2P()


@fuzzed
@given(text=texts)
def test_any_text_is_split_with_nothing_lost_and_read_without_a_fault(g2p, text):
    kept = "".join(text.split())
    assert "".join("".join(part.text.split()) for part in split_utterances(text)) == kept
    assert all(0 <= end <= len(text) for end, _ in find_breaks(text))
    for sentence in split_sentences(text):
        EmbeddedVoice.unspoken(sentence)
    short = text[:200]
    assert isinstance(speakable(short), str) and isinstance(g2p(short), str)


@pytest.mark.parametrize("text", HARD)
def test_4096_of_one_kind_are_answered_at_once(client, faults, text):
    check(client.post(SPEECH, json={"model": "m", "input": text, "response_format": "pcm"}), faults)


def test_a_deep_or_endless_json_is_refused(engine):
    client = create_app(Settings(), engine).test_client()
    for data in (b"[" * 100_000, b'{"a":' * 50_000, b"1" * 100_000, b'{"input":"' + b"\\u0000" * 1000 + b'"}'):
        assert client.post(SPEECH, data=data, content_type="application/json").status_code == 400
