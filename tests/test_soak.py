"""What the soak calls answered, refused and lost, and how it tells a drift."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_cloning import wav

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import soak

WHOLE = (200, wav(), 2.0)
BUSY = (503, b"{}", 5.0)


@pytest.fixture
def traffic(monkeypatch):
    """Clients of no server: `answers` says what each try brings, an exception is raised."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    traffic = soak.Traffic(SimpleNamespace(url="http://127.0.0.1:1"), until=0)
    traffic.answers = []

    def send(_path, _body):
        answer = traffic.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(traffic, "send", send)
    return traffic


@pytest.mark.parametrize(
    ("path", "answers", "outcome"),
    [
        ("/v1/audio/speech", [WHOLE], "answered"),
        ("/tts_url", [BUSY, ConnectionResetError(), BUSY, WHOLE], "answered"),
        ("/v1/audio/speech", [BUSY] * 4, "refused"),
        ("/tts_url", [BUSY] * 4, "lost"),
        ("/v1/audio/speech", [BUSY, BUSY, BUSY, ConnectionResetError()], "lost"),
        ("/v1/audio/speech", [(200, b"RIFF", 2.0)] * 4, "lost"),
        ("/v1/audio/speech", [(500, b"{}", 2.0)] * 4, "lost"),
    ],
)
def test_a_line_is_answered_refused_or_lost(traffic, path, answers, outcome):
    traffic.answers = list(answers)
    assert traffic.deliver(path, json.dumps({}).encode(), "wav") == outcome
    assert not traffic.answers


def test_a_fragment_is_wrong(traffic):
    traffic.answers = [(200, wav()[:1000], 2.0)]
    assert traffic.attempt("/tts_url", b"{}", "wav") == "wrong"
    assert traffic.tally.counts["wrong: 200"] == 1


def test_a_drift_is_told_of_the_last_workers_time_alone():
    seen = [(float(at), {"resident MB": 100.0 + at}) for at in range(100, 140)]
    rows = soak.drift(seen, [(1.0, 99.0), (112.0, 2.0), (135.0, 3.0)])
    assert rows == [["resident MB", "214.5", "234.5", "1.09"], ["latency s", "2.0", "3.0", "1.50"]]
