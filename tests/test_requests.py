"""Requests and errors: what is refused, with which status and envelope, and what is ignored aloud."""

import io
import json

import pytest

from app import create_app
from settings import Settings

SPEECH, NATIVE = "/v1/audio/speech", "/tts_url"
GOOD = {"model": "tts-1", "input": "Hello."}
GOOD_NATIVE = {"text": "Hello.", "spk_audio_path": "/any/where/voice_03.wav"}


def error_of(response):
    """The envelope's content; all four members are always there."""
    error = response.json["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert all(error[key] is None or isinstance(error[key], str) for key in error)
    return error


@pytest.mark.parametrize(("field", "value"), [
    ("model", None), ("model", 1), ("input", None), ("input", ""), ("input", " \n\t"), ("input", 5), ("input", ["a"]),
    ("input", "x" * 4097), ("input", "a\0b"), ("input", "a\ud800b"), ("voice", "nobody"), ("voice", 3),
    ("voice", {"name": "alloy"}), ("voice", {"id": "nobody"}), ("response_format", "wma"), ("response_format", "WAV"),
    ("response_format", 1), ("speed", 0.2), ("speed", 4.1), ("speed", "fast"), ("speed", True), ("speed", float("nan")),
    ("speed", float("inf")), ("stream_format", "json"), ("stream", "yes"), ("sample_rate", 1), ("sample_rate", 24000.5),
    ("seed", -1), ("emotion_vector", [0.1]), ("emotion_vector", [9] * 8), ("instructions", 7),
    ("instructions", "x" * 4097),
])  # fmt: skip
def test_a_wrong_field_is_named(client, field, value):
    response = client.post(SPEECH, data=json.dumps({**GOOD, field: value}), content_type="application/json")
    error = error_of(response)
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", field)
    assert "Traceback" not in response.text


@pytest.mark.parametrize(("field", "value"), [
    ("text", None), ("text", ""), ("text", "a\0"), ("spk_audio_path", None), ("spk_audio_path", ""),
    ("spk_audio_path", "/uploads/mine.wav"), ("emo_control_method", 4), ("emo_vec", [0.1] * 7), ("emo_vec", "x"),
    ("emo_weight", -1), ("max_text_tokens_per_sentence", 0),
])  # fmt: skip
def test_the_native_route_answers_in_its_own_shape(client, field, value):
    response = client.post(NATIVE, json={**GOOD_NATIVE, field: value})
    assert response.status_code == 400
    assert response.json["status"] == "error"
    assert field in response.json["error"]


def test_emotions_may_not_sum_over_one_and_a_half(client):
    response = client.post(NATIVE, json={**GOOD_NATIVE, "emo_vec": [0.2] * 8})
    assert (response.status_code, "1.5" in response.json["error"]) == (400, True)


@pytest.mark.parametrize("path", [SPEECH, "/audio/speech", NATIVE])
@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b"null", b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b"NaN"])
def test_what_is_no_json_object_is_refused(client, path, body):
    response = client.post(path, data=body, content_type="application/json")
    assert response.status_code == 400
    assert "JSON" in response.text


@pytest.mark.parametrize(("method", "path", "content", "status"), [
    ("GET", SPEECH, None, 405), ("DELETE", "/health", None, 405), ("GET", NATIVE, None, 405),
    ("GET", "/v1/nothing", None, 404), ("POST", "/synthesize", {"text": "a"}, 404), ("POST", "/api/tts", {}, 404),
])  # fmt: skip
def test_wrong_routes_and_methods_have_the_envelope(client, method, path, content, status):
    response = client.open(path, method=method, json=content)
    assert response.status_code == status
    if path != NATIVE:
        error_of(response)
    assert status != 405 or "Allow" in response.headers


def test_a_body_that_is_not_declared_json_is_415(client):
    response = client.post(SPEECH, data='{"model":"tts-1","input":"a"}', content_type="text/plain")
    assert (response.status_code, error_of(response)["code"]) == (415, "unsupported_media_type")


def test_a_body_over_the_limit_is_413(client):
    response = client.post(SPEECH, json={**GOOD, "input": "x" * (2 << 20)})
    assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")


def test_an_unknown_voice_is_told_the_voices(client):
    message = error_of(client.post(SPEECH, json={**GOOD, "voice": "nobody"}))["message"]
    assert "alloy, echo, fable, onyx, nova, shimmer, ash, ballad, coral, sage, verse" in message


def test_unknown_and_unhonoured_fields_are_named(client):
    fields = {"instructions": "sadly", "seed": 3, "foo": 1, "volume": None, "bad name\r\nX": 2}
    response = client.post(SPEECH, json={**GOOD, **fields})
    assert response.status_code == 200
    assert response.headers["X-Ignored-Parameters"] == "foo, instructions"


def test_null_means_not_given(client):
    nulls = dict.fromkeys(["voice", "speed", "response_format", "stream_format", "instructions", "seed"])
    assert client.post(SPEECH, json={**GOOD, **nulls}).status_code == 200


@pytest.mark.parametrize("voice", ["nova", {"id": "nova"}])
def test_a_voice_is_a_name_or_an_object_with_an_id(client, voice):
    assert client.post(SPEECH, json={**GOOD, "voice": voice}).headers["X-Voice"] == "nova"


@pytest.mark.parametrize("path", ["//v1/audio/speech", "//tts_url", "/audio/speech"])
def test_doubled_slashes_and_the_short_path_are_served(client, path):
    sent = client.post("/", json={**GOOD, **GOOD_NATIVE}, environ_overrides={"PATH_INFO": path})
    assert sent.status_code == 200


def test_text_in_a_script_that_the_engine_cannot_read_is_refused(client, engine):
    response = client.post(SPEECH, json={**GOOD, "input": "Hello there. こんにちは。"})
    assert (response.status_code, error_of(response)["code"]) == (400, "unspeakable_text")
    assert engine.spoken == []


def test_one_unreadable_sentence_among_others_is_refused_and_quoted(client):
    response = client.post(SPEECH, json={**GOOD, "input": "OK. Fine. ありがとう。 Bye."})
    assert (response.status_code, error_of(response)["code"]) == (400, "unspeakable_text")
    assert "'ありがとう。'" in error_of(response)["message"]


@pytest.mark.parametrize(("route", "field", "limit"), [(SPEECH, "input", 4096), (NATIVE, "text", 20_000)])
def test_a_text_that_is_too_long_is_told_its_limit_after_trimming(client, route, field, limit):
    good = GOOD if route == SPEECH else GOOD_NATIVE
    assert client.post(route, json={**good, field: f" {'a' * limit} \n"}).status_code == 200
    refused = client.post(route, json={**good, field: "a" * (limit + 1)})
    assert refused.status_code == 400
    assert f"at most {limit} characters" in refused.text


@pytest.mark.parametrize(("route", "field"), [(SPEECH, "emotion_vector"), (NATIVE, "emo_vec")])
def test_emotions_that_sum_to_too_much_are_refused_by_name(client, route, field):
    good = GOOD if route == SPEECH else GOOD_NATIVE
    refused = client.post(route, json={**good, field: [1, 1, 0, 0, 0, 0, 0, 0]})
    assert refused.status_code == 400
    assert f"'{field}': must sum to at most 1.5" in refused.text


def test_a_voice_object_without_a_name_is_refused(client):
    assert client.post(SPEECH, json={**GOOD, "voice": {"id": None}}).status_code == 400


@pytest.mark.parametrize("padding", [b" ", b"\n"])
def test_a_chunked_body_over_the_limit_is_413(client, padding):
    body = io.BytesIO(json.dumps(GOOD).encode() + padding * 2_000_000)
    sent = {"wsgi.input": body, "wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"}
    response = client.post(SPEECH, content_type="application/json", environ_overrides=sent)
    assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")


def test_over_http_1_0_an_answer_comes_in_one_piece(client):
    response = client.post(
        SPEECH, json={**GOOD, "response_format": "mp3"}, environ_overrides={"SERVER_PROTOCOL": "HTTP/1.0"}
    )
    assert int(response.headers["Content-Length"]) == len(response.data) > 1000


def test_a_text_of_punctuation_alone_is_a_short_silence(client, engine):
    response = client.post(SPEECH, json={**GOOD, "input": "."})
    assert response.status_code == 200
    assert 0.1 < float(response.headers["X-Audio-Duration"]) < 1
    assert engine.spoken == []


def test_every_response_is_named_and_timed(client):
    for response in (client.get("/health"), client.post(SPEECH, json=GOOD), client.get("/nowhere")):
        assert response.headers["x-request-id"].startswith("req_")
        assert int(response.headers["openai-processing-ms"]) >= 0


def test_a_request_id_is_kept_when_it_is_harmless(client):
    assert client.get("/health", headers={"X-Request-Id": "abc-1.2"}).headers["x-request-id"] == "abc-1.2"
    assert client.get("/health", headers={"X-Request-Id": "a b;c"}).headers["x-request-id"].startswith("req_")


def test_loading_is_503_with_the_reason(app, client):
    app.extensions["speech"].trouble = "loading"
    assert (client.get("/health").status_code, client.get("/health").json["status"]) == (503, "loading")
    response = client.post(SPEECH, json=GOOD)
    assert (response.status_code, error_of(response)["code"]) == (503, "loading")
    assert (response.headers["Retry-After"], response.headers["retry-after-ms"]) == ("5", "5000")


def test_an_engine_that_failed_says_why(app, client, engine):
    engine.ailment = "stage 0 died"
    assert client.get("/health").json | {"status": "unhealthy", "message": "stage 0 died"} == client.get("/health").json
    assert client.post(SPEECH, json=GOOD).status_code == 503


def test_a_fault_is_500_without_internals(client, engine):
    engine.script = lambda text, options: 1 / 0
    response = client.post(SPEECH, json=GOOD)
    assert response.status_code == 500
    assert "division" not in response.text and response.headers["x-request-id"] in error_of(response)["message"]
    assert client.post(NATIVE, json=GOOD_NATIVE).json["status"] == "error"


def test_the_models_come_in_both_shapes(client):
    assert {"id": "tts-1", "object": "model"}.items() <= client.get("/v1/models").json["data"][0].items()
    assert client.get("/v1/audio/models").json["models"][0] == {"id": "tts-1", "name": "tts-1"}


class TestKeys:
    """TTS_API_KEYS."""

    @pytest.fixture
    def guarded(self, engine):
        app = create_app(Settings(api_keys=("sesame", "öffne")), engine)
        app.extensions["speech"].trouble = None
        return app.test_client()

    @pytest.mark.parametrize("headers", [
        {}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sesame"}, {"X-Api-Key": ""}, {"X-Api-Key": "é"},
    ])  # fmt: skip
    def test_without_a_key_nothing_is_spoken(self, guarded, headers):
        response = guarded.post(SPEECH, json=GOOD, headers=headers)
        assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
        assert guarded.post(NATIVE, json=GOOD_NATIVE, headers=headers).status_code == 401

    @pytest.mark.parametrize("headers", [{"Authorization": "Bearer sesame"}, {"X-Api-Key": "sesame"}])
    def test_either_header_lets_in(self, guarded, headers):
        assert guarded.post(SPEECH, json=GOOD, headers=headers).status_code == 200

    def test_probes_for_routes_that_are_not_here_get_their_404(self, guarded):
        assert guarded.post("/synthesize", json={}).status_code == 404

    @pytest.mark.parametrize("path", ["/health", "/v1/audio/voices", "/audio/voices"])
    def test_health_and_voices_stay_open(self, guarded, path):
        assert guarded.get(path).status_code == 200


@pytest.mark.parametrize("text", ["こんにちは", "Hello. こんにちは。 Bye.", "Hello, " + "あ" * 200])
def test_a_part_of_which_nothing_is_read_is_refused_before_a_byte_is_sent(client, engine, text):
    response = client.post(SPEECH, json={"model": "m", "input": text, "response_format": "pcm"})
    assert (response.status_code, response.json["error"]["code"]) == (400, "unspeakable_text")
    assert engine.spoken == []


def test_letters_that_are_not_read_are_named(client):
    response = client.post(SPEECH, json={"model": "m", "input": "Hello こんに my friend."})
    assert (response.status_code, response.headers["X-Unspoken"]) == (200, "%E3%81%93%E3%82%93%E3%81%AB")
    assert "X-Unspoken" not in client.post(SPEECH, json={"model": "m", "input": "Hello."}).headers


def test_many_emoji_are_one_short_silence(client):
    response = client.post(SPEECH, json={"model": "m", "input": "🙂" * 4096})
    assert float(response.headers["X-Audio-Duration"]) < 1


def test_no_event_is_empty(client):
    asked = {"model": "m", "input": "Hello there.", "stream_format": "sse", "response_format": "wav"}
    assert '"audio": ""' not in client.post(SPEECH, json=asked).text


def test_a_body_that_is_too_large_is_told_the_setting(engine):
    client = create_app(Settings(max_body_bytes=2000), engine).test_client()
    response = client.post(SPEECH, json={"model": "m", "input": "x" * 3000})
    assert response.status_code == 413
    assert "TTS_MAX_BODY_BYTES, 2000" in response.json["error"]["message"]


def test_an_emotion_vector_that_is_no_list_is_refused(client):
    asked = {"text": "Hi.", "spk_audio_path": "voice_01.wav"}
    assert client.post("/tts_url", json={**asked, "emo_vec": []}).status_code == 200
    assert client.post("/tts_url", json={**asked, "emo_vec": {}}).status_code == 400
