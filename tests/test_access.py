"""Keys, addresses, browsers of other origins, and what the log must not show."""

import json
import os
import time

import pytest
from serving import Server

from access import ADDRESSES, WRONG_KEYS, ForwardedAddress, Keys, WrongKeys
from app import create_app
from settings import Settings

SPEECH = "/v1/audio/speech"
ASKED = {"model": "m", "input": "Hello there."}
OPEN = ["/health", "/v1/audio/voices", "/audio/voices", "/v1/models", "/v1/audio/models"]
CLOSED = [("POST", SPEECH), ("POST", "/audio/speech"), ("POST", "/tts_url"), ("GET", "/metrics")]


def client_of(engine, **settings):
    """A client of the real app with these settings, ready."""
    app = create_app(Settings(**settings), engine)
    app.extensions["speech"].trouble = None
    return app.test_client()


@pytest.fixture
def guarded(engine):
    """A client of an app with a key."""
    return client_of(engine, api_keys=("right",))


@pytest.mark.parametrize("path", OPEN)
def test_health_and_the_lists_are_open(guarded, path):
    assert guarded.get(path).status_code == 200


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_the_rest_needs_a_key(guarded, method, path):
    response = guarded.open(path, method=method, json=ASKED)
    assert response.status_code == 401
    error = response.json["error"]
    assert error == "Give one of this server's API keys as 'Authorization: Bearer KEY'." or (
        error["code"] == "invalid_api_key" and error["param"] is None and error["type"] == "invalid_request_error"
    )


@pytest.mark.parametrize(
    "headers", [{"Authorization": "Bearer right"}, {"X-Api-Key": "right"}, {"authorization": "bearer  right"}]
)
def test_a_key_opens_either_way(guarded, headers):
    assert guarded.post(SPEECH, json=ASKED, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer wrong"}, {"Authorization": "right"}, {"Authorization": "Basic right"},
        {"X-Api-Key": ""}, {"X-Api-Key": "right\u00e9"}, {"X-Api-Key": "righ"}, {"X-Api-Key": "rightt"},
        {"Authorization": "Bearer wrong", "X-Api-Key": "right"},
    ],
)  # fmt: skip
def test_a_wrong_key_does_not(guarded, headers):
    assert guarded.post(SPEECH, json=ASKED, headers=headers).status_code == 401


def test_an_address_that_guesses_is_told_to_wait_and_a_right_key_still_passes(guarded):
    statuses = [guarded.post(SPEECH, json=ASKED).status_code for _ in range(WRONG_KEYS + 1)]
    assert statuses == [401] * WRONG_KEYS + [429]
    other = guarded.post(SPEECH, json=ASKED, environ_base={"REMOTE_ADDR": "127.0.0.9"})
    assert other.status_code == 401
    assert guarded.post(SPEECH, json=ASKED, headers={"X-Api-Key": "right"}).status_code == 200
    refused = guarded.post(SPEECH, json=ASKED)
    assert refused.headers["Retry-After"] == "60" and refused.json["error"]["code"] == "too_many_wrong_keys"


def test_all_addresses_of_one_ipv6_client_count_as_one():
    counts = WrongKeys()
    assert [counts.count(f"2001:db8::{number}") for number in range(WRONG_KEYS + 1)] == [False] * WRONG_KEYS + [True]
    assert not counts.count("2001:db8:0:1::1")


def test_the_memory_of_wrong_keys_is_bounded():
    counts = WrongKeys()
    for number in range(ADDRESSES + 100):
        counts.count(str(number))
    assert len(counts._counts) == ADDRESSES


def test_every_key_is_compared_whatever_came_first(monkeypatch):
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append(a) or a == b)
    assert Keys(("one", "two", "three"), None).accept("one")
    assert compared == [b"one", b"two", b"three"]


def test_the_keys_file_is_read_again_when_it_changes(engine, tmp_path):
    file = tmp_path / "keys"
    file.write_text("old # the first one\n\n")
    client = client_of(engine, api_keys_file=file)

    def status(key):
        return client.post(SPEECH, json=ASKED, headers={"X-Api-Key": key}).status_code

    assert (status("old"), status("new"), status("# the first one")) == (200, 401, 401)
    file.write_text("new\n")
    os.utime(file, ns=(1, 1))
    assert (status("old"), status("new")) == (401, 200)
    file.unlink()
    assert status("new") == 200
    file.write_text("")
    assert status("new") == status("") == 401


def test_a_keys_file_that_is_no_utf8_changes_nothing_and_is_told_once(engine, tmp_path, caplog):
    file = tmp_path / "keys"
    file.write_text("good\n")
    client = client_of(engine, api_keys_file=file)
    file.write_bytes("good\n# schön\n".encode("latin-1"))
    os.utime(file, ns=(1, 1))
    for key, status in (("good", 200), ("bad", 401), ("good", 200)):
        assert client.post(SPEECH, json=ASKED, headers={"X-Api-Key": key}).status_code == status
    assert caplog.text.count("the keys file was not read") == 1


def test_a_keys_file_may_have_a_byte_order_mark_and_any_letters(engine, tmp_path):
    file = tmp_path / "keys"
    file.write_text("schön\n", encoding="utf-8-sig")
    client, sent = client_of(engine, api_keys_file=file), "schön".encode().decode("latin-1")  # the bytes are UTF-8
    assert client.post(SPEECH, json=ASKED, headers={"X-Api-Key": sent}).status_code == 200


def test_a_missing_keys_file_keeps_the_server_from_starting(engine, tmp_path):
    with pytest.raises(OSError, match="no-such-file"):
        client_of(engine, api_keys_file=tmp_path / "no-such-file")


@pytest.mark.parametrize(
    ("remote", "forwarded", "seen"),
    [
        ("203.0.113.9", "198.51.100.1", "203.0.113.9"),
        ("127.0.0.1", "198.51.100.1", "198.51.100.1"),
        ("127.0.0.1", "203.0.113.66, 198.51.100.1", "198.51.100.1"),
        ("127.0.0.1", "203.0.113.66, 198.51.100.1, 10.1.2.3", "198.51.100.1"),
        ("127.0.0.1", "203.0.113.66, nonsense", "127.0.0.1"),
        ("127.0.0.1", "", "127.0.0.1"),
        ("127.0.0.1", "10.1.1.1, 10.2.2.2", "10.1.1.1"),
        ("::1", "2001:db8::1", "::1"),
        ("", "198.51.100.1", "-"),
    ],
)
def test_a_forwarded_address_counts_only_from_a_named_proxy(remote, forwarded, seen):
    environ = {"REMOTE_ADDR": remote, "HTTP_X_FORWARDED_FOR": forwarded}
    ForwardedAddress(lambda environ, _: [], ("127.0.0.1", "10.0.0.0/8"))(environ, None)
    assert environ["REMOTE_ADDR"] == seen


def test_a_setting_that_is_no_network_is_refused():
    with pytest.raises(ValueError, match="TTS_TRUSTED_PROXIES"):
        Settings.from_env({"TTS_TRUSTED_PROXIES": "localhost"})


def test_other_origins_are_not_let_in_by_default(client):
    asked = client.options(SPEECH, headers={"Origin": "https://example.com", "Access-Control-Request-Method": "POST"})
    answered = client.post(SPEECH, json=ASKED, headers={"Origin": "https://example.com"})
    for response in (asked, answered):
        assert not [name for name in dict(response.headers) if name.lower().startswith("access-control")]


def test_a_named_origin_is_let_in_and_no_other(engine):
    client = client_of(engine, cors_origins=("https://example.com",), api_keys=("right",))
    asking = {"Origin": "https://example.com", "Access-Control-Request-Method": "POST"}
    preflight = client.options(SPEECH, headers=asking)
    assert preflight.status_code == 200
    assert preflight.headers["Access-Control-Allow-Origin"] == "https://example.com"
    other = client.options(SPEECH, headers={**asking, "Origin": "https://example.org"})
    assert "Access-Control-Allow-Origin" not in other.headers
    assert client.post(SPEECH, json=ASKED, headers=asking).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/nowhere"])
def test_every_answer_carries_the_security_headers(client, path):
    headers = client.get(path).headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'none'" in headers["Content-Security-Policy"]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A real server with a key, whose log shows five characters of a text."""
    log = tmp_path_factory.mktemp("access") / "log"
    with Server(log, TTS_API_KEYS="k3y-right", TTS_LOG_TEXT_CHARACTERS="5") as running:
        running.wait_until_ready()
        yield running


class TestLog:
    """The log of a real server."""

    def line(self, own, request_id):
        """The access log's line of one request."""
        end = time.monotonic() + 5
        while not (found := [x for x in own.log.read_text().splitlines() if f"id={request_id}" in x]):
            assert time.monotonic() < end
            time.sleep(0.05)
        return found[-1]

    def test_no_key_query_or_forged_line_is_in_it(self, own):
        headers = {"X-Api-Key": "k3y-right", "X-Request-Id": "r1"}
        own.post(f"{SPEECH}%0aforged?api_key=k3y-right", {"model": "m"}, **headers)
        line = self.line(own, "r1")
        assert "POST /v1/audio/speech%0Aforged" in line and "404" in line
        assert "k3y-right" not in own.log.read_text()

    def test_text_is_shown_as_far_as_the_setting_goes_and_in_one_line(self, own):
        headers = {"X-Api-Key": "k3y-right", "X-Request-Id": "r2"}
        own.post(SPEECH, {"model": "m", "input": "ab\n\rcd and the rest", "voice": "nova"}, **headers)
        line = self.line(own, "r2")
        assert line.endswith("text=ab\ufffd\ufffdc") and "voice=nova" in line and "characters=19" in line

    def test_a_stranger_leaves_one_quiet_line(self, own):
        status, headers, body = own.post("/tts_url", {}, **{"X-Request-Id": "r3"})
        assert status == 401 and json.loads(body)["status"] == "error"
        assert " 401 " in self.line(own, "r3") and "Traceback" not in own.log.read_text()
