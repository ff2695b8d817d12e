"""GET /metrics, the cache and the sharing of requests as a client sees them."""

import json
import re
import threading
import time

import pytest

from app import create_app
from settings import HERE, Settings

SPEECH = "/v1/audio/speech"


def say(client, text="Hello there.", **fields):
    """Ask the OpenAI route."""
    return client.post(SPEECH, json={"model": "m", "input": text, **fields})


def figure(client, name, **labels):
    """Return one figure of /metrics; 0 where there is none yet."""
    inside = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    wanted = re.escape(name + (f"{{{inside}}}" if inside else ""))
    found = re.search(rf"^{wanted} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_requests_are_counted_by_route_status_voice_and_format(client):
    say(client, voice="nova", response_format="mp3")
    say(client, voice="nobody")
    told = {"format": "mp3", "route": SPEECH, "status": "200", "voice": "nova"}
    assert figure(client, "speech_requests_total", **told) == 1
    assert figure(client, "speech_requests_total", **{**told, "status": "400", "voice": "", "format": ""}) == 1


def test_audio_first_audio_and_rtf_are_told(client):
    seconds = float(say(client).headers["X-Audio-Duration"])
    assert figure(client, "speech_audio_seconds_total") == pytest.approx(seconds, abs=0.001)
    assert figure(client, "speech_first_audio_seconds_count", answer="whole") == 1
    assert figure(client, "speech_rtf_count") == figure(client, "speech_slot_wait_seconds_count") == 1
    assert figure(client, "speech_slots") == 1 and figure(client, "speech_slots_busy") == 0
    assert figure(client, "process_resident_memory_bytes") > 1e6


@pytest.mark.parametrize("error", [ValueError("no"), TimeoutError("the engine's own")])
def test_an_engines_failure_is_counted(client, engine, error):
    def fail(text, options):
        raise error

    engine.script = fail
    assert say(client).status_code == 500
    assert figure(client, "speech_errors_total", code="fault") == 1
    assert figure(client, "speech_slot_wait_seconds_count") == 1


def test_a_repeated_request_comes_from_the_cache_and_says_so(client, engine):
    first, second = (say(client, seed=7) for _ in range(2))
    assert (first.headers["X-Cache"], second.headers["X-Cache"]) == ("miss", "hit")
    assert first.data == second.data and len(engine.spoken) == 1
    assert figure(client, "speech_utterances_total", origin="hit") == 1
    assert figure(client, "speech_cache_bytes") > 0


def test_a_stream_is_a_hit_where_all_of_it_was_made_before(client, engine):
    first, both = "The first sentence is long enough.", "The first sentence is long enough. The second is not there."
    for text, told, made in [(first, "miss", 1), (both, "miss", 2), (first, "hit", 2), (both, "hit", 2)]:
        response = say(client, text, seed=7, response_format="pcm")
        assert (response.headers["X-Cache"], bool(response.data), len(engine.spoken)) == (told, True, made)


@pytest.mark.parametrize("other", [{"voice": "nova"}, {"seed": 8}, {"speed": 1.5}, {"text": "Hello here."}])
def test_what_would_sound_different_is_made(client, engine, other):
    say(client, seed=7)
    assert say(client, **{"seed": 7, **other}).headers["X-Cache"] == "miss"
    assert len(engine.spoken) == 2


def test_a_seedless_request_to_an_engine_that_samples_is_never_from_the_cache(client, engine):
    for _ in range(2):
        assert say(client).headers["X-Cache"] == "miss"
    assert len(engine.spoken) == 2


def test_the_cache_can_be_turned_off(engine):
    app = create_app(Settings(cache_bytes=0), engine)
    app.extensions["speech"].trouble = None
    for _ in range(2):
        assert say(app.test_client(), seed=7).headers["X-Cache"] == "miss"
    assert len(engine.spoken) == 2


def test_identical_requests_that_arrive_together_are_made_once(app, engine):
    gate, answers = threading.Event(), []
    engine.script = lambda text, options: gate.wait(5) and None
    running = [threading.Thread(target=lambda: answers.append(say(app.test_client(), seed=7).data)) for _ in range(4)]
    for thread in running:
        thread.start()
    while app.extensions["speech"].requests < 4:
        pass
    gate.set()
    for thread in running:
        thread.join(5)
    assert len(engine.spoken) == 1 and len(set(answers)) == 1 and len(answers) == 4


def test_what_waits_for_a_slot_is_told(app, client, engine):
    gate = threading.Event()
    engine.script = lambda text, options: gate.wait(5) and None
    text = "The first sentence is long enough. The second sentence is long enough, too. And so is the third one."
    asking = threading.Thread(target=say, args=(app.test_client(), text))
    asking.start()
    while not figure(client, "speech_utterances_waiting"):
        pass
    assert figure(client, "speech_slots_busy") == figure(client, "speech_slots") == 1
    gate.set()
    asking.join(5)
    assert figure(client, "speech_utterances_waiting") == figure(client, "speech_slots_busy") == 0


def test_an_utterance_that_waits_in_the_engine_for_its_turn_is_not_being_made(client, engine):
    def wait(text, options):
        began = time.perf_counter()
        time.sleep(0.5)
        options.ticket.waited_s += time.perf_counter() - began

    engine.script = wait
    say(client)
    assert figure(client, "speech_slot_wait_seconds_sum") >= 0.5
    assert 0 < figure(client, "speech_compute_seconds_total") < 0.5


def test_metrics_need_a_key_where_keys_are_set(engine):
    client = create_app(Settings(api_keys=("secret",)), engine).test_client()
    assert client.get("/metrics").status_code == 401
    assert client.get("/metrics", headers={"Authorization": "Bearer secret"}).status_code == 200


@pytest.mark.parametrize("route", [SPEECH, "/audio/speech", "/tts_url", "/tts_url_with_cloning"])
def test_the_dashboard_counts_every_route_that_speaks(app, route):
    assert route in {rule.rule for rule in app.url_map.iter_rules()}
    [routes] = re.findall(r'route=~\\"(.+?)\\"', (HERE / "dashboards" / "grafana.json").read_text())
    assert re.fullmatch(routes, route)


def test_the_dashboard_shows_only_figures_that_there_are(client):
    say(client, seed=7)
    told = client.get("/metrics").text
    board = json.loads((HERE / "dashboards" / "grafana.json").read_text())
    asked = {name for panel in board["panels"] for target in panel["targets"]
             for name in re.findall(r"(?:speech|process)_\w+", target["expr"])}  # fmt: skip
    assert len(asked) > 10
    for name in asked - {"speech_errors_total"}:
        assert re.search(rf"^{name}[ {{]", told, re.MULTILINE), name
