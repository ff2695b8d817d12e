"""Load, leaving and slow clients, faults: the real gunicorn around an engine of scripted speed."""

import http.client
import json
import multiprocessing
import os
import signal
import socket
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
from scripted import number_of
from serving import REPOSITORY, Server, decode, watch_health

SPEECH, NATIVE = "/v1/audio/speech", "/tts_url"
PATHS = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
REFUSALS = {429: "queue_full", 503: "timeout"}


def scripted_server(log, delay_s, **environment):
    """A real server whose engine takes `delay_s` for an utterance."""
    return Server(log, "scripted:create_app()", PYTHONPATH=PATHS, SCRIPT_DELAY_S=str(delay_s), **environment)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server that makes eight utterances in 50 ms."""
    with scripted_server(tmp_path_factory.mktemp("trust") / "log", 0.05) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def slow_server(tmp_path):
    """A server that takes a second for an utterance and makes one at once."""
    with scripted_server(tmp_path / "log", 1, TTS_SLOTS="1") as running:
        running.wait_until_ready()
        yield running


def report_of(server):
    """What /health tells."""
    return json.loads(server.get("/health")[2])


def wait_for_requests(server, count, deadline_s=5):
    """Wait until so many requests are under way; return the seconds that took."""
    began = time.monotonic()
    while (found := report_of(server)["requests"]) != count:
        assert time.monotonic() - began < deadline_s, f"{found} requests are under way"
        time.sleep(0.02)
    return time.monotonic() - began


def worker_of(server):
    """The worker's process id."""
    with open(f"/proc/{server.process.pid}/task/{server.process.pid}/children") as children:
        return int(children.read().split()[0])


def descriptors(server):
    """How many files the worker has open."""
    return len(os.listdir(f"/proc/{worker_of(server)}/fd"))


def resident_mb(server):
    """The worker's resident memory."""
    with open(f"/proc/{worker_of(server)}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1000


def connect(server, data=b""):
    """A bare connection with some bytes sent."""
    client = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    client.sendall(data)
    return client


def raw_speech(spoken="Hello.", path=SPEECH, **fields):
    """A speech request's bytes."""
    body = json.dumps({"model": "m", "input": spoken, **fields}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class TestLoad:
    """Two hundred clients at once."""

    SECONDS = float(os.environ.get("LOAD_S", 8))
    CLIENTS = 200

    def ask(self, server, body, until, answers, is_right):
        """One client: ask the same again and again; note the status and whether the sound is one's own."""
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        while time.monotonic() < until:
            connection.request("POST", SPEECH, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = response.read()
            if response.status == 200:
                answers["right" if is_right(*decode(data)) else "wrong"] += 1
            else:
                known = json.loads(data)["error"]["code"] == REFUSALS.get(response.status)
                answers["refused" if known and response.headers["Retry-After"] else f"odd {response.status}"] += 1
                time.sleep(0.2)
        connection.close()

    def crowd(self, server, asked):
        """Let clients ask all at once, each (body, what tells whether the sound is right); return what they got."""
        before, answers = (descriptors(server), resident_mb(server)), Counter()
        apart = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, apart) as watch, ThreadPoolExecutor(len(asked)) as pool:
            watching = watch.submit(watch_health, server.url, self.SECONDS)
            until = time.monotonic() + self.SECONDS
            for client in [pool.submit(self.ask, server, body, until, answers, is_right) for body, is_right in asked]:
                client.result()
            health_s = watching.result()
        print(answers, f"health: median {sorted(health_s)[len(health_s) // 2]:.3f} s, most {max(health_s):.3f} s")
        wait_for_requests(server, 0)
        assert descriptors(server) <= before[0] + 2
        print(f"memory {before[1]:.0f} -> {resident_mb(server):.0f} MB")
        assert "Traceback" not in server.log.read_text()
        return answers

    def test_everyone_gets_their_own_audio_or_a_documented_refusal(self, server):
        def asked(number):
            text = f"Number {number}." * (1 + number % 3)
            body = {"model": "m", "input": text, "response_format": "wav" if number % 2 else "flac"}
            return body, lambda samples, rate: number_of(samples) == number and len(samples) > 0.4 * rate

        answers = self.crowd(server, [asked(number) for number in range(self.CLIENTS)])
        assert set(answers) <= {"right", "refused"} and answers["right"] > 100

    def test_so_does_everyone_who_asks_the_embedded_engine(self, tmp_path):
        with Server(tmp_path / "log", TTS_CACHE_BYTES="0", TTS_QUEUE_REQUESTS="32") as own:
            own.wait_until_ready()
            texts = [f"Number {number}. {'And so on. ' * (number % 2)}" for number in range(16)]
            alone = [own.speak(text)[0] for text in texts]
            assert len({samples.tobytes() for samples in alone}) == len(texts)

            def asked(number):
                expected = alone[number % len(texts)]
                body = {"model": "m", "input": texts[number % len(texts)]}
                return body, lambda samples, rate: np.array_equal(samples, expected)

            answers = self.crowd(own, [asked(number) for number in range(self.CLIENTS)])
        assert set(answers) == {"right", "refused"} and answers["right"] > 10

    def test_health_answers_while_the_queue_is_full_and_a_hundred_bodies_are_still_coming(self, tmp_path):
        with scripted_server(tmp_path / "log", 20, TTS_SLOTS="1") as own:
            own.wait_until_ready()
            clients = [connect(own, raw_speech(f"Number {n}.")) for n in range(128)]
            wait_for_requests(own, 128, 20)
            clients += [connect(own, raw_speech()[:-5]) for _ in range(100)]
            assert own.post(SPEECH, {"model": "m", "input": "Hi."})[0] == 429
            assert report_of(own)["requests"] == 128  # so nobody had to leave first
            for client in clients:
                client.close()

    def test_the_dubbing_worker_is_never_refused_beside_a_crowd(self, tmp_path):
        with scripted_server(tmp_path / "log", 20, TTS_SLOTS="1") as own:
            own.wait_until_ready()
            clients = [connect(own, raw_speech(f"Number {n}.")) for n in range(200)]
            wait_for_requests(own, 128, 20)
            native = {"text": "Hello.", "spk_audio_path": "voice_01.wav"}
            clients += [connect(own, raw_speech(path=NATIVE, **native)) for _ in range(4)]
            wait_for_requests(own, 132)
            for client in clients:
                client.close()


class TestQueue:
    """The queue's bounds and its fairness."""

    def test_it_is_bounded_in_requests(self, tmp_path):
        with scripted_server(tmp_path / "log", 2, TTS_QUEUE_REQUESTS="3") as own:
            own.wait_until_ready()
            waiting = [connect(own, raw_speech()) for _ in range(3)]
            wait_for_requests(own, 3)
            status, headers, body = own.post(SPEECH, {"model": "m", "input": "Hi."})
            assert (status, json.loads(body)["error"]["code"]) == (429, "queue_full") and headers["retry-after"]
            for client in waiting:
                client.close()

    def test_it_is_bounded_in_characters_but_one_request_always_fits(self, tmp_path):
        with scripted_server(tmp_path / "log", 1, TTS_QUEUE_CHARACTERS="50") as own:
            own.wait_until_ready()
            waiting = connect(own, raw_speech("Number 7 is a text of over fifty characters, all by itself."))
            wait_for_requests(own, 1)
            assert own.post(SPEECH, {"model": "m", "input": "Hi."})[0] == 429
            waiting.close()

    def test_slow_speech_takes_as_much_of_it_as_there_is_audio(self, tmp_path):
        with scripted_server(tmp_path / "log", 1, TTS_QUEUE_CHARACTERS="50") as own:
            own.wait_until_ready()
            waiting = connect(own, raw_speech("Number 7, slow.", speed=0.25))
            wait_for_requests(own, 1)
            assert own.post(SPEECH, {"model": "m", "input": "Hi."})[0] == 429
            waiting.close()

    def test_a_waiter_past_its_deadline_is_503(self, tmp_path):
        with scripted_server(tmp_path / "log", 2, TTS_SLOTS="1", TTS_UTTERANCE_TIMEOUT_S="3") as own:
            own.wait_until_ready()
            with ThreadPoolExecutor(3) as clients:
                asked = [clients.submit(own.post, SPEECH, {"model": "m", "input": "Hi."}) for _ in range(3)]
                statuses = sorted(future.result()[0] for future in asked)
        assert statuses == [200, 503, 503] or statuses == [200, 200, 503]

    def test_a_short_text_does_not_wait_for_a_long_one(self, tmp_path):
        with scripted_server(tmp_path / "log", 0.5, TTS_SLOTS="1") as own:
            own.wait_until_ready()
            long = connect(own, raw_speech("This sentence is number 8. " * 40))
            wait_for_requests(own, 1)
            began = time.monotonic()
            assert own.post(SPEECH, {"model": "m", "input": "Hi."})[0] == 200
            assert time.monotonic() - began < 3 * 0.5 + 1
            long.close()


class TestLeaving:
    """Connections cut at each moment."""

    @pytest.fixture
    def slow_server(self, tmp_path):
        """A server that takes four seconds for an utterance: nobody is freed because one is done."""
        with scripted_server(tmp_path / "log", 4, TTS_SLOTS="1") as running:
            running.wait_until_ready()
            yield running

    @pytest.mark.parametrize("moment", ["headers", "body", "queue", "first byte", "middle", "after more"])
    def test_a_cut_connection_frees_its_place_within_a_second_and_is_no_error(self, slow_server, moment):
        speech = raw_speech("This sentence is number 8. " * 9, response_format="pcm")
        if moment == "headers":
            client = connect(slow_server, speech[:40])
        elif moment == "body":
            client = connect(slow_server, speech[:-10])
        else:
            first = connect(slow_server, raw_speech()) if moment == "queue" else None
            client = connect(slow_server, speech)
            wait_for_requests(slow_server, 2 if first else 1)
            if moment == "middle":
                client.recv(1000)
            if moment == "after more":
                client.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            if first:
                first.close()
        time.sleep(0.3)
        client.close()
        assert wait_for_requests(slow_server, 0) < 1.2
        time.sleep(0.3)
        log = slow_server.log.read_text()
        assert "Traceback" not in log and "ERROR" not in log


class TestSlowClients:
    """A hundred of each kind beside one quick client."""

    def quick(self, server):
        """How long a quick client waits for a short text, in seconds."""
        began = time.monotonic()
        assert server.post(SPEECH, {"model": "m", "input": "Hi."})[0] == 200
        return time.monotonic() - began

    @pytest.mark.parametrize("kind", ["headers", "body", "reader"])
    def test_a_hundred_slow_clients_stop_nobody(self, server, kind):
        text = "This sentence is number 8. " * 150
        whole = raw_speech(text, response_format="pcm")
        sent = {"headers": whole[:30], "body": whole[:-5], "reader": whole}[kind]
        slow = [connect(server, sent) for _ in range(100)]
        try:
            time.sleep(1)
            assert self.quick(server) < 5
            began = time.monotonic()
            assert server.get("/health")[0] == 200
            assert time.monotonic() - began < 1
        finally:
            for client in slow:
                client.close()
        wait_for_requests(server, 0, 20)
        assert "Traceback" not in server.log.read_text()

    def test_a_reader_that_never_pauses_gets_all_however_long_it_takes(self, tmp_path):
        with scripted_server(tmp_path / "log", 0, SCRIPT_SEND_TIMEOUT_S="1.5") as own:
            own.wait_until_ready()
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
            client.connect(("127.0.0.1", own.port))
            client.sendall(raw_speech("This is number 8.\n\n" * 60, speed=0.25, sample_rate=48000))
            response = http.client.HTTPResponse(client)
            response.begin()
            length, came, began = int(response.headers["Content-Length"]), 0, time.monotonic()
            while part := response.read(128 << 10):
                came += len(part)
                time.sleep(0.03)
            assert came == length and time.monotonic() - began > 3 * 1.5

    def test_bodies_that_nobody_reads_stop_nobody(self, server):
        """gunicorn lingers on such a connection; in its main loop, two seconds each, that would stop everything."""
        head = b"POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 50000\r\n\r\nabc"
        slow = [connect(server, head) for _ in range(60)]
        try:
            assert all(client.recv(12) == b"HTTP/1.1 404" for client in slow)
            for client in slow:
                client.sendall(b"d")
            waits = []
            for _ in range(25):  # gunicorn first waits five seconds for the rest of a body
                began = time.monotonic()
                assert server.get("/health")[0] == 200
                waits.append(time.monotonic() - began)
                time.sleep(0.3)
            assert max(waits) < 1.5
        finally:
            for client in slow:
                client.close()

    @pytest.mark.parametrize(
        "request_line", [b"GET /" + b"x" * 9000, b"GET / HTTP/1.1\r\nContent-Length: x", b"NONSENSE", b"GET / HTTP/9.9"]
    )
    def test_what_is_no_request_is_answered_with_the_envelope(self, server, request_line):
        with connect(server, request_line + b"\r\n\r\n") as client:
            answer = b"".join(iter(lambda: client.recv(4096), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 4") and b"x-request-id: req_" in head
        assert json.loads(body)["error"].keys() == {"message", "type", "param", "code"}

    def test_no_header_says_where_the_application_lies(self, server):
        head = b"GET /health HTTP/1.1\r\nHost: a\r\nSCRIPT_NAME: /x\r\nConnection: close\r\n\r\n"
        with connect(server, head) as client:
            assert client.recv(12) == b"HTTP/1.1 200"

    def test_half_sent_headers_are_hung_up_on(self, server):
        client = connect(server, b"POST /v1/audio/speech HTTP/1.1\r\nHost")
        client.settimeout(25)
        began = time.monotonic()
        assert client.recv(100) == b""
        assert 10 < time.monotonic() - began < 20


class TestFaults:
    """What a worker's end and the signals do under load."""

    def test_a_killed_worker_costs_only_what_it_was_speaking(self, tmp_path):
        with scripted_server(tmp_path / "log", 0.2) as own:
            own.wait_until_ready()
            running = connect(own, raw_speech("This sentence is number 8. " * 20))
            wait_for_requests(own, 1)
            os.kill(worker_of(own), signal.SIGKILL)
            assert running.recv(100) == b""
            own.wait_until_ready()
            assert own.post(SPEECH, {"model": "m", "input": "Hi."})[0] == 200

    def test_term_under_load_loses_no_accepted_request(self, tmp_path):
        with scripted_server(tmp_path / "log", 0.3, TTS_SLOTS="1") as own:
            own.wait_until_ready()
            with ThreadPoolExecutor(8) as clients:
                texts = [f"Number {number}." for number in range(8)]
                asked = [clients.submit(own.post, SPEECH, {"model": "m", "input": text}) for text in texts]
                wait_for_requests(own, 8)
                own.process.send_signal(signal.SIGTERM)
                answers = [future.result() for future in asked]
            assert [status for status, *_ in answers] == [200] * 8
            assert [number_of(decode(body)[0]) for *_, body in answers] == list(range(8))
            assert own.process.wait(10) == 0

    def test_term_does_not_wait_for_a_connection_that_says_nothing(self, tmp_path):
        with scripted_server(tmp_path / "log", 0) as own:
            own.wait_until_ready()
            with connect(own):
                time.sleep(6)  # for five seconds a thread waits with it
                own.process.send_signal(signal.SIGTERM)
                assert own.process.wait(10) == 0

    def test_hup_spares_a_worker_that_boots(self, tmp_path):
        with scripted_server(tmp_path / "log", 0) as own:
            own.wait_until_ready()
            os.kill(worker_of(own), signal.SIGKILL)
            until = time.monotonic() + 5
            while time.monotonic() < until:
                own.process.send_signal(signal.SIGHUP)
                time.sleep(0.05)
            own.wait_until_ready()
            # Not by the master's children: for a moment the killed worker's engine is one of them.
            assert (tmp_path / "log").read_text().count("Booting worker") == 2

    def test_hup_under_load_loses_nothing(self, server):
        with ThreadPoolExecutor(8) as clients:
            texts = [f"Number {number}." for number in range(40)]
            asked = [clients.submit(server.post, SPEECH, {"model": "m", "input": text}) for text in texts]
            for _ in range(5):
                server.process.send_signal(signal.SIGHUP)
                time.sleep(0.05)
            assert [future.result()[0] for future in asked] == [200] * 40

    @pytest.mark.parametrize("step_s", [1e6, -1e6])
    def test_a_stepping_clock_changes_nothing(self, client, engine, monkeypatch, step_s):
        """Neither for who is spoken to nor for who waits behind them."""
        real = time.time

        def step(text, options):
            monkeypatch.setattr(time, "time", lambda: real() + step_s)
            time.sleep(0.5)

        engine.script = step
        with ThreadPoolExecutor(2) as pool:
            body = {"model": "m", "input": "Hello."}
            for response in [pool.submit(client.application.test_client().post, SPEECH, json=body) for _ in range(2)]:
                answer = response.result()
                assert answer.status_code == 200 and 0 <= int(answer.headers["openai-processing-ms"]) < 60_000


def test_no_thread_is_left_behind(server):
    """After all the tests above, the worker has no more threads than its pool and its own few."""
    with open(f"/proc/{worker_of(server)}/status") as status:
        threads = next(int(line.split()[1]) for line in status if line.startswith("Threads"))
    assert threads <= 128 + 128 + 40
