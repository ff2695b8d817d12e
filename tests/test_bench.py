"""The load generator: what it counts and when, against a server that answers by a script."""

import http.client
import io
import json
import os
import socket
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench
from bench import CASE_HEADER, Case, Result, case_row, growth, run_case
from client import (
    Run,
    Sample,
    Target,
    closed_loop,
    connect,
    measured,
    open_loop,
    percentile,
    race,
    speak,
    starve,
    timeline,
)
from cost import REQUEST, Answer
from figures import long_request, memory_figures
from peers import OURS, RATIOS, least_lead
from quiet import both_rows, slowest_core_s, take
from servers import cpu_s
from tables import save
from texts import LANGUAGES, LINES, SHORT_LINES, Texts

from audio import FORMATS, AudioChunk, Encoder

SECOND = b"\1\0" * 24_000  # of pcm


def pause(seconds):
    """What a scripted server does when it waits."""
    return lambda: time.sleep(seconds)


@contextmanager
def scripted_server(*parts, status=200, hold=lambda: None, heads=None):
    """Answer every request, after `hold`, with parts of a body: bytes, or what to do meanwhile.

    heads: a list for each request's path and key.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def do_POST(self):
            if heads is not None:
                heads.append((self.path, self.headers["Authorization"]))
            asked.append((time.perf_counter(), self.rfile.read(int(self.headers["Content-Length"]))))
            hold()
            self.send_response(status)
            self.end_headers()
            for part in parts:
                part() if callable(part) else self.wfile.write(part)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads, request_queue_size = True, 64

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield Target("scripted", f"http://127.0.0.1:{server.server_port}"), asked
    finally:
        server.shutdown()
        server.server_close()


def encoded(name, seconds):
    """Noise in a format, as this server sends it when it streams."""
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, round(seconds * 24_000)).astype(np.float32)
    encoder = Encoder(FORMATS[name], 24_000)
    return encoder.encode(AudioChunk(noise, 24_000)) + encoder.close()


def whole_wav(seconds):
    """A wav with its true length."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(round(seconds * 24_000)), 24_000, format="WAV", subtype="PCM_16")
    return file.getvalue()


# --- Underruns


@pytest.mark.parametrize(
    ("heard", "underruns", "starved_s"),
    [
        ([], 0, 0),
        ([(3.0, 9.0)], 0, 0),  # the wait for the first audio is no underrun
        ([(1.0, 0.5), (2.0, 1.4), (3.0, 2.3)], 0, 0),  # each second comes before the last one ended
        ([(1.0, 0.5), (2.0, 2.0)], 1, 0.5),  # dry at 1.5, fed at 2.0
        ([(1.0, 0.5), (2.0, 2.0), (3.0, 3.5)], 2, 1.0),  # fed at 2.0, dry again at 3.0
        ([(1.0, 0.5), (2.0, 2.0), (3.0, 2.9)], 1, 0.5),  # what was late once moves the rest
        ([(5.0, 0.5), (6.0, 4.0), (7.0, 6.0)], 0, 0),  # a lead is kept
        ([(1.0, 0.5), (2.0, 1.51)], 0, 0),  # the sound card bridges 10 ms
        ([(0.0, 0.1), (1.0, 0.5), (2.0, 1.4)], 0, 0),  # a header is no audio
        ([(1.0, 0.5), (1.0, 9.0)], 0, 0),  # an end without audio starves nobody
    ],
)
def test_a_player_starves_when_it_has_played_all_that_came(heard, underruns, starved_s):
    assert starve(heard) == (underruns, pytest.approx(starved_s))


def test_an_answer_that_stops_in_between_is_an_underrun():
    with scripted_server(SECOND[:4_800], pause(1.0), SECOND) as (target, _):
        assert speak(target, "text").underruns == 1


def test_an_answer_that_keeps_ahead_is_none():
    with scripted_server(SECOND * 3, pause(0.2), SECOND, pause(0.2), SECOND) as (target, _):
        assert speak(target, "text").underruns == 0


# --- One request's figures


def figures(*arrivals):
    """Return the sample of a pcm answer that came like this: bytes so far, and when."""
    return measured(Target("none", ""), "text", list(arrivals), bytes(arrivals[-1][0]))


def test_the_first_audio_is_there_once_200_ms_have_come():
    sample = figures((9_598, 0.1), (9_600, 0.4), (57_600, 0.7))
    assert (sample.first_byte_s, sample.first_audio_s, sample.total_s) == (0.1, 0.4, 0.7)
    assert (sample.audio_s, sample.bytes, sample.characters) == (1.2, 57_600, 4)


def test_the_first_audio_of_a_shorter_answer_is_all_of_it():
    assert figures((4_800, 0.1), (4_802, 0.2)).first_audio_s == 0.2


def test_the_times_of_an_answer_are_those_at_which_it_came():
    with scripted_server(SECOND[:9_598], pause(0.2), SECOND[:2], pause(0.2), SECOND) as (target, _):
        sample = speak(target, "text")
    assert 0 < sample.first_byte_s < sample.first_audio_s < sample.total_s


@pytest.mark.parametrize("data, name", [(SECOND * 2, "pcm"), (whole_wav(2), "wav"), (encoded("wav", 2), "wav")])
def test_a_second_of_pcm_is_48000_bytes_after_the_header(data, name):
    sizes, seconds = timeline(data, name)
    header = len(data) - 2 * len(SECOND)
    assert seconds[-1] == pytest.approx(2, abs=1e-3)
    assert np.interp(header + len(SECOND), sizes, seconds) == pytest.approx(1, abs=0.01)
    assert np.interp(header, sizes, seconds) == pytest.approx(0, abs=1e-3)


def test_the_seconds_of_an_mp3_are_those_of_its_frames():
    data = encoded("mp3", 2)
    sizes, seconds = timeline(data, "mp3")
    assert seconds[-1] == pytest.approx(2, abs=0.1) and sizes[-1] == len(data)
    assert np.interp(len(data) / 2, sizes, seconds) == pytest.approx(1, abs=0.1)


def test_any_status_but_200_is_told_with_what_the_server_said():
    with scripted_server(b"full", status=429) as (target, _), pytest.raises(RuntimeError, match="429.*full"):
        speak(target, "text")


# --- Loops


@pytest.mark.parametrize(
    ("base", "path"),
    [("", "/v1/audio/speech"), ("/v1/", "/v1/audio/speech"), ("/speech/v1", "/speech/v1/audio/speech")],
)
@pytest.mark.parametrize(("key", "sent"), [("", None), ("k-1", "Bearer k-1")])
def test_any_servers_url_will_do_and_its_key_is_sent(base, path, key, sent):
    heads = []
    with scripted_server(SECOND, heads=heads) as (target, _):
        speak(replace(target, url=target.url + base, key=key), "text")
    assert heads == [(path, sent)]


def test_the_key_of_a_servers_url_is_the_environments(monkeypatch, tmp_path):
    heads = []
    monkeypatch.setattr("tables.RESULTS", tmp_path)
    monkeypatch.setattr(bench, "leave_on_term", lambda: None)  # what ends the tests is not the bench's
    monkeypatch.setenv("API_KEY", "k-1")
    with scripted_server(SECOND, heads=heads) as (target, _):
        monkeypatch.setattr(sys, "argv", ["bench.py", "--url", target.url, "--concurrency", "1", "--requests", "2"])
        bench.main()
    assert heads == [("/v1/audio/speech", "Bearer k-1")] * 3


def test_https_is_spoken_where_the_url_says_so():
    assert isinstance(connect(Target("remote", "https://example.com")), http.client.HTTPSConnection)


def test_a_closed_loop_sends_the_next_request_when_the_last_one_is_answered():
    with scripted_server(SECOND, hold=pause(0.1)) as (target, asked):
        run = closed_loop(target, list("abcdef"), 2)
    times = sorted(at for at, _ in asked)
    assert len(run.samples) == 6 and not run.failures
    assert times[2] - times[0] >= 0.1 and times[4] - times[2] >= 0.1
    assert run.audio_s == 6 and run.speed == pytest.approx(6 / run.wall_s)


def test_an_open_loop_sends_whether_others_are_answered_or_not():
    all_are_here = threading.Barrier(8)
    with scripted_server(SECOND, hold=lambda: all_are_here.wait(30)) as (target, _):
        assert len(open_loop(target, list("abcdefgh"), rate=40).samples) == 8


def test_an_open_loop_counts_from_when_a_request_was_due():
    with scripted_server(SECOND) as (target, _):
        assert speak(target, "text", due=time.perf_counter() - 5).first_byte_s >= 5


def test_what_fails_in_a_loop_is_noted_and_the_rest_goes_on():
    with scripted_server(b"no", status=503) as (target, asked):
        run = closed_loop(target, list("abc"), 1)
    assert len(asked) == 3 and not run.samples and len(run.failures) == 3 and "503" in run.failures[0]


def test_a_race_asks_each_in_turn_for_the_same_texts():
    with scripted_server(SECOND) as (one, first), scripted_server(SECOND) as (other, second):
        target = Target("other", other.url)
        runs = race([one, target], [["a", "b"], ["c", "d"]], clients=1)
    texts = [[json.loads(body)["input"] for _, body in asked] for asked in (first, second)]
    assert texts == [["a", "b", "c", "d"]] * 2
    order = [who for _, who in sorted((at, who) for who, asked in enumerate([first, second]) for at, _ in asked)]
    assert order == [0, 0, 1, 1, 0, 0, 1, 1]
    assert {name: len(each) for name, each in runs.items()} == {"scripted": 2, "other": 2}


def test_no_two_requests_are_alike_so_that_none_is_shared():
    with scripted_server(SECOND) as (target, asked):
        closed_loop(target, ["a", "a", "a", "a"], clients=2)
    speeds = [json.loads(body)["speed"] for _, body in asked]
    assert len(set(speeds)) == 4 and all(1 < speed < 1.001 for speed in speeds)


def test_a_race_with_a_failure_is_no_race():
    with scripted_server(b"no", status=500) as (target, _), pytest.raises(RuntimeError, match="500"):
        race([target], [["a"]], clients=1)


def test_memory_is_watched_over_requests_of_all_lengths_and_languages():
    with scripted_server(SECOND) as (target, asked):
        resident = growth(replace(target, pid=os.getpid()), 60, Texts())
    sent = [json.loads(body)["input"] for _, body in asked]
    assert list(resident) == [50, 60] and all(mb > 1 for mb in resident.values())
    assert len(sent) == len(set(sent)) == 60 and len(sent[0]) > 150 and min(map(len, sent)) < 25
    assert [text.isascii() for text in sent[:6]] == [False, True, False] * 2


def test_memory_is_compared_once_most_lengths_were_met():
    assert memory_figures({50: 1000.0, 500: 1060.0, 1000: 1065.0, 2000: 1081.2})[-1][:2] == [
        "memory, request 2000 against 500",
        "+2.0%",
    ]
    assert memory_figures({50: 1000.0, 100: 1100.0})[-1][1] == "+10.0%"


def test_a_long_request_is_hung_up_on_when_the_short_ones_are_done():
    ended = threading.Event()
    with scripted_server(SECOND, pause(2), SECOND, ended.set) as (target, asked), long_request(target, "long"):
        assert len(asked) == 1
    assert not ended.is_set()


def test_a_long_request_that_ends_too_early_is_told():
    with scripted_server(SECOND) as (target, _):
        long = long_request(target, "long")
        long.__enter__()
        time.sleep(0.5)
        with pytest.raises(RuntimeError, match="ended before"):
            long.__exit__(None, None, None)


# --- Tables


def test_a_percentile_is_taken_of_all_values():
    values = [float(n) for n in range(101)]
    assert [percentile(reversed(values), share) for share in (0, 50, 95, 100)] == [0, 50, 95, 100]
    assert np.isnan(percentile([], 50))


def test_what_was_measured_while_a_core_was_slow_is_told_apart():
    taken = [(0.0180, 2.0), (0.0170, 3.0), (0.0310, 9.0), (0.0186, 4.0), (0.0188, 8.0)]
    assert both_rows("first sound, s", taken, lambda seconds: seconds / 10, "under 0.3", digits=1) == [
        ["first sound, s", "0.4 (0.2 to 0.9)", "under 0.3"],
        ["first sound, s: the 3 of 5 on quiet cores, loop 17.0 ms", "0.3 (0.2 to 0.4)", "under 0.3"],
    ]


def test_a_loop_before_and_after_tells_how_quiet_it_was():
    loops, numbers = iter([1.0, 1.0, 9.0, 1.1, 1.0]), iter(range(4))
    assert take(lambda: next(numbers), 4, lambda: next(loops)) == [(1.0, 0), (9.0, 1), (9.0, 2), (1.1, 3)]


def test_the_loop_is_run_on_every_core_and_the_slowest_counts(monkeypatch):
    cores, pinned = {1, 7}, []
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: cores)
    monkeypatch.setattr("os.sched_setaffinity", lambda pid, to: pinned.append(set(to)))
    clock = iter([0.0, 0.2, 1.0, 1.3])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert slowest_core_s() == pytest.approx(0.3)
    assert sorted(pinned[:2], key=min) == [{1}, {7}] and pinned[2:] == [cores]


def test_the_loop_takes_a_while_and_leaves_the_cores_as_they_were():
    before = os.sched_getaffinity(0)
    assert slowest_core_s() > 0.001
    assert os.sched_getaffinity(0) == before


def test_a_row_has_a_figure_for_every_column():
    with scripted_server(SECOND[:9_600], pause(0.5), SECOND) as (target, _):
        result = run_case(target, Case("zh", 10, "pcm", clients=2), Texts(), requests=2)
    row = dict(zip(CASE_HEADER, case_row(result), strict=True))
    assert row["text"] == "zh 10" and row["load"] == "2 at once" and row["requests"] == "2" and row["failed"] == "0"
    assert row["underruns"].startswith("2 (") and row["CPU s per audio min"] == row["resident MB"] == "-"


def test_cpu_seconds_are_told_a_minute_of_audio():
    with scripted_server(SECOND * 6) as (target, _):
        run = closed_loop(target, ["a"] * 5, 1)
    row = dict(zip(CASE_HEADER, case_row(Result(Case(), replace(run, cpu_s=2.0), resident_mb=512.4)), strict=True))
    assert row["CPU s per audio min"] == "4.0" and row["resident MB"] == "512"


def test_the_cpu_seconds_of_a_run_are_those_of_the_process_it_names():
    with scripted_server(SECOND, hold=lambda: sum(range(3_000_000))) as (target, _):
        known, unknown = (closed_loop(replace(target, pid=pid), ["a"], 1) for pid in (os.getpid(), None))
    assert known.cpu_s_per_minute > 0 and np.isnan(unknown.cpu_s_per_minute)


def test_a_row_of_failures_alone_is_shown_all_the_same():
    row = dict(zip(CASE_HEADER, case_row(Result(Case(clients=1), Run([], 1.0, ["no"], 1.0), 1.0)), strict=True))
    assert row["failed"] == "1" and row["requests"] == "0"


def test_the_cpu_seconds_of_a_process_are_those_of_all_its_threads():
    before, process_s = cpu_s(os.getpid()), time.process_time()
    thread = threading.Thread(target=lambda: [sum(range(10_000)) for _ in range(1_000)])
    thread.start()
    thread.join()
    assert cpu_s(os.getpid()) - before == pytest.approx(time.process_time() - process_s, abs=0.03)


def test_what_is_not_known_is_null_in_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr("tables.RESULTS", tmp_path)
    path = save("bench", [Result(Case(clients=2), Run([], 1.5, ["no"]))])
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == [
        {
            "case": {"language": "en", "characters": 100, "response_format": "pcm", "clients": 2, "rate": 0.0},
            "run": {"samples": [], "wall_s": 1.5, "failures": ["no"], "cpu_s": None},
            "resident_mb": None,
        }
    ]


# --- The load on the server's own cost


@pytest.fixture
def connected():
    """A client of the cost bench, and the server's end of its connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        answer = Answer(listener.getsockname()[1])
        server, _ = listener.accept()
    yield answer, server
    server.close()
    answer.socket.close()


def test_a_chunked_answer_is_whole_with_its_last_chunk_however_it_is_cut(connected):
    answer, server = connected
    for _ in range(2):  # over one connection
        answer.ask()
        assert server.recv(65536) == REQUEST
        whole = []
        for part in (b"HTTP/1.1 200 OK\r\n\r\n2\r\nab\r", b"\n0\r", b"\n\r\n"):
            server.sendall(part)
            whole.append(answer.read())
        assert whole == [False, False, True]


@pytest.mark.parametrize("said", [b"HTTP/1.1 500 NO\r\n\r\n0\r\n\r\n", b""])
def test_a_server_that_fails_ends_the_cost_bench(connected, said):
    answer, server = connected
    answer.ask()
    server.sendall(said)
    server.shutdown(socket.SHUT_WR)
    with pytest.raises(RuntimeError, match="answered"):
        answer.read()


# --- Texts


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(("characters", "off"), [(10, 5), (100, 40), (1000, 40), (4000, 60)])
def test_a_text_has_about_the_length_asked_for(language, characters, off):
    for text in Texts().take_many(language, characters, 50):
        assert abs(len(text) - characters) <= off and len(text) <= 4096


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("characters", [10, 100, 1000])
def test_no_text_is_given_twice(language, characters):
    given = Texts().take_many(language, characters, 64)
    assert len(set(given)) == len(given)


def test_what_runs_out_is_told():
    with pytest.raises(RuntimeError, match="no further zh text of 1 "):
        Texts().take_many("zh", 1, 10_000)


def test_the_same_seed_gives_the_same_texts():
    assert Texts(7).take_many("en", 100, 5) == Texts(7).take_many("en", 100, 5) != Texts(8).take_many("en", 100, 5)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_line_has_a_name_in_it_and_ends_a_sentence(language):
    for line in LINES[language] + SHORT_LINES[language]:
        assert "{" in line and line[-1] in ".?!。？！"


def test_the_lead_is_over_the_peer_that_is_best_in_that_figure():
    def runs(audio_s, *totals):
        return [Run([Sample("", 1, 1, total / audio_s, total, audio_s, 1, 0, 0)], total) for total in totals]

    raced = {OURS: runs(4, 1, 1, 1), "fast": runs(4, 2, 3, 9), "soon": runs(40, 80, 80, 80)}
    assert least_lead(raced, RATIOS["audio per second"]) == (3, "fast")
    assert least_lead(raced, RATIOS["first 200 ms sooner"]) == (3, "fast")
    raced["soon"] = runs(400, 200, 200, 200)
    assert least_lead(raced, RATIOS["audio per second"]) == (2, "soon")
