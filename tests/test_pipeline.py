"""The speech pipeline: order, fairness, the queue's bound, cancelling, faults in the middle."""

import base64
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

import audio
from app import Order, Speech
from errors import Busy, ClientGone, EngineFault, Unavailable
from settings import Settings
from utterances import count_syllables, split_utterances

SENTENCES = "The first sentence is here. Then comes the second one. And a third one ends it all now. A fourth follows."
BEGINNING = "Once upon a time, a keeper lived here, and all was well. "  # a break for each first length
SPEECH = "/v1/audio/speech"


@pytest.fixture
def speech(app):
    """The service on the scripted engine."""
    return app.extensions["speech"]


def order(speech, text=SENTENCES, **fields):
    """An order for the default voice."""
    return Order(text, speech.voices.resolve(None), **fields)


def until(condition, deadline_s=5.0):
    """Wait for a condition to hold."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


def test_the_codecs_are_warm_before_it_is_ready(speech, monkeypatch):
    encoded = []

    class Watched(audio.Encoder):
        def close(self):
            encoded.append((self._stream.codec_context.name, self._position > 0, speech.trouble))
            return super().close()

    monkeypatch.setattr(audio, "Encoder", Watched)
    speech.trouble = "loading"
    speech.load()
    assert speech.trouble is None
    assert encoded == [(fmt.codec, True, "loading") for fmt in audio.FORMATS.values()]


def test_a_codec_that_is_not_there_keeps_it_from_no_other_format(client, speech, monkeypatch):
    monkeypatch.setitem(audio.FORMATS, "mp3", replace(audio.FORMATS["mp3"], codec="nothing"))
    speech.load()
    told = [client.post(SPEECH, json={"model": "m", "input": "Hi.", "response_format": name}).status_code
            for name in ("mp3", "opus")]  # fmt: skip
    assert told == [500, 200]


def test_audio_comes_in_the_order_of_the_text(speech, engine):
    numbers = iter(range(100))
    engine.script = lambda text, options: np.full(12_000, next(numbers) / 100 + 0.05, np.float32)
    levels = [float(np.median(chunk.samples[2000:10_000])) for chunk in speech.speak(order(speech))]
    assert levels == sorted(levels) and len(levels) == len(split_utterances(SENTENCES)) > 1


def first_spoken(client, speech, engine, pace_s, **fields):
    """Return the first utterance of a long text on an engine that takes so long for a syllable."""
    engine.spoken.clear()
    speech._pace_s = pace_s
    client.post(SPEECH, json={"model": "m", "input": BEGINNING + SENTENCES * 8, "response_format": "pcm"} | fields)
    return engine.spoken[0]


def test_a_stream_begins_with_less_on_a_slow_or_busy_engine_and_with_more_on_a_fast_one(client, speech, engine):
    slow, usual, fast = (len(first_spoken(client, speech, engine, pace_s)) for pace_s in (1, 0.04, 0.001))
    assert slow < usual < fast


@pytest.mark.parametrize(
    "one, other", [({"seed": 1}, {"seed": 2}), ({"response_format": "wav"},) * 2, ({"input": SENTENCES},) * 2]
)
def test_what_is_seeded_sent_whole_or_short_is_cut_the_same_at_any_pace(client, speech, engine, one, other):
    assert first_spoken(client, speech, engine, 1, **one) == first_spoken(client, speech, engine, 0.001, **other)


def test_the_pace_follows_the_engine(speech, engine):
    engine.script = lambda text, options: time.sleep(0.02 * len(text))
    long = order(speech, SENTENCES * 8)
    before = speech.first_syllables(long)
    for _ in speech.speak(order(speech)):
        pass
    assert speech.first_syllables(long) < before


def test_utterances_are_as_long_as_the_engine_likes_them(speech, engine):
    def longest():
        engine.spoken.clear()
        for _ in speech.speak(order(speech, SENTENCES * 8)):
            pass
        return max(map(count_syllables, engine.spoken))

    usual = longest()
    engine.usual_syllables = usual / 2
    assert longest() <= usual / 2


def test_the_next_utterance_is_made_while_one_is_sent(speech, engine):
    audio = speech.speak(order(speech))
    next(audio)
    until(lambda: len(engine.spoken) == 2)
    audio.close()


@pytest.mark.parametrize("first_alone, begun", [(True, 1), (False, 2)])
def test_a_first_utterance_is_made_alone_where_the_engine_is_faster_so(engine, first_alone, begun):
    gate, engine.slots, engine.first_alone = threading.Event(), 2, first_alone
    engine.script = lambda text, options: gate.wait(5) and None
    speech = Speech(Settings(), engine)
    speech.trouble = None
    audio = speech.speak(order(speech))
    with ThreadPoolExecutor(1) as reader:
        first = reader.submit(next, audio)
        until(lambda: len(engine.spoken) == begun)
        time.sleep(0.1)
        assert len(engine.spoken) == begun
        gate.set()
        first.result(5)
        until(lambda: len(engine.spoken) >= 3)
    audio.close()


def test_a_reader_that_stops_reading_stops_the_engine(speech, engine):
    audio = speech.speak(order(speech, SENTENCES * 10))
    next(audio)
    until(lambda: len(engine.spoken) == 2)
    time.sleep(0.1)
    assert len(engine.spoken) == 2
    audio.close()


def test_there_is_a_pause_between_sentences_and_none_at_the_end(speech):
    *middle, last = list(speech.speak(order(speech)))
    assert all(not chunk.samples[-2400:].any() for chunk in middle)
    assert last.samples[-2400:].any()


def test_pauses_shrink_with_speed(speech, engine):
    first = [next(speech.speak(order(speech, speed=speed))).seconds for speed in (1.0, 2.0)]
    assert first[1] == pytest.approx(first[0] / 2, rel=0.05)


def test_the_queue_is_bounded(app, speech, engine):
    gate = threading.Event()
    engine.script = lambda text, options: gate.wait(5) and None
    running = [threading.Thread(target=lambda: list(speech.speak(order(speech)))) for _ in range(8)]
    for thread in running:
        thread.start()
    until(lambda: speech.requests == 8)
    refused = app.test_client().post(SPEECH, json={"model": "m", "input": "Hello."})
    assert (refused.status_code, refused.json["error"]["code"], refused.headers["Retry-After"]) == (
        429,
        "queue_full",
        "5",
    )
    gate.set()
    for thread in running:
        thread.join(5)
    assert speech.requests == 0


def test_a_client_that_left_is_noticed_while_waiting(speech, engine):
    stopped = threading.Event()

    def until_cancelled(text, options):
        options.ticket.on_cancel(stopped.set)
        stopped.wait(5)

    engine.script = until_cancelled
    left_at = time.monotonic() + 0.1
    with pytest.raises(ClientGone):
        list(speech.speak(order(speech, is_gone=lambda: time.monotonic() > left_at)))
    assert stopped.is_set() and time.monotonic() < left_at + 1
    assert speech.requests == 0
    until(lambda: len(engine.spoken) == 1)


def test_waiting_utterances_of_a_client_that_left_are_not_made(speech, engine):
    audio = speech.speak(order(speech, SENTENCES * 3))
    next(audio)
    audio.close()
    made = len(engine.spoken)
    time.sleep(0.1)
    assert len(engine.spoken) <= made + 1


def test_an_utterance_past_its_deadline_is_503(engine):
    speech = Speech(Settings(utterance_timeout_s=0.3), engine)
    speech.trouble = None
    gate = threading.Event()
    engine.script = lambda text, options: gate.wait(5) and None
    with pytest.raises(Unavailable, match="in time"):
        list(speech.speak(order(speech)))
    gate.set()


@pytest.mark.parametrize("made", [np.zeros(0), np.zeros(12_000), np.full(12_000, np.nan), np.full(12_000, np.inf)])
def test_what_is_not_speech_never_leaves(app, engine, made):
    engine.script = lambda text, options: made.astype(np.float32)
    response = app.test_client().post(SPEECH, json={"model": "m", "input": "Hello.", "response_format": "pcm"})
    assert (response.status_code, response.json["error"]["code"]) == (500, "engine_fault")


def failing_second(engine):
    """Make the engine fail at its second utterance."""

    def script(text, options):
        if len(engine.spoken) > 1:
            raise EngineFault("The engine fell over.")

    engine.script = script


def test_a_failure_before_the_first_byte_has_its_own_status(app, engine):
    failing_second(engine)
    response = app.test_client().post(SPEECH, json={"model": "m", "input": SENTENCES})
    assert response.status_code == 500


def test_a_failure_after_the_first_byte_breaks_the_body(app, engine):
    failing_second(engine)
    response = app.test_client().post(SPEECH, json={"model": "m", "input": SENTENCES, "response_format": "pcm"})
    with pytest.raises(EngineFault):
        response.get_data()


def events(response):
    """The server-sent events' contents."""
    return [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if line]


def test_sse_sends_the_formats_bytes_and_its_usage(app):
    asked = {"model": "m", "input": SENTENCES, "response_format": "pcm"}
    plain = app.test_client().post(SPEECH, json=asked)
    sent = app.test_client().post(SPEECH, json={**asked, "stream_format": "sse"})
    *deltas, done = events(sent)
    assert sent.content_type.startswith("text/event-stream")
    assert {delta["type"] for delta in deltas} == {"speech.audio.delta"} and len(deltas) > 1
    assert b"".join(base64.b64decode(delta["audio"]) for delta in deltas) == plain.data
    frames = round(len(plain.data) / 48_000 * 50)
    usage = {"input_tokens": len(SENTENCES), "output_tokens": frames, "total_tokens": len(SENTENCES) + frames}
    assert done == {"type": "speech.audio.done", "usage": usage}


def test_sse_tells_of_a_failure_and_never_says_done(app, engine):
    failing_second(engine)
    asked = {"model": "m", "input": SENTENCES, "response_format": "pcm", "stream_format": "sse"}
    *_, last = events(app.test_client().post(SPEECH, json=asked))
    assert last["type"] == "error"
    assert last["error"]["code"] == "engine_fault"


def test_busy_is_not_left_behind_by_a_refusal(speech):
    speech.settings = Settings(queue_requests=1)
    first = speech.speak(order(speech))
    next(first)
    with pytest.raises(Busy):
        next(speech.speak(order(speech)))
    first.close()
    assert speech.requests == 0
