"""Fixtures: a scripted engine behind the real app where timing or faults are the point, and a real server."""

import numpy as np
import pytest
from serving import Server

from app import create_app
from audio import AudioChunk
from settings import Settings


class ScriptedEngine:
    """An engine whose timing and faults a test decides; what it says is a level that names the text."""

    name, model, sample_rate = "scripted", "scripted-1", 24_000
    max_utterance_tokens = 508
    can_clone = can_emote = emotes_by_text = False
    honours = frozenset({"seed"})
    speed_range = (1.0, 1.0)
    slots = 1
    first_alone = False
    usual_syllables = 56

    def __init__(self):
        self.spoken, self.script, self.ailment = [], lambda text, options: None, None

    def load(self):
        """Nothing to load."""

    def check(self, voice):
        """Any voice will do."""

    def unspoken(self, text):
        """Kana."""
        return "".join(c for c in text if "\u3040" <= c <= "\u30ff")

    def fits(self, utterance):
        """Any length will do."""
        return True

    def sound_key(self, voice, options):
        """Seeded requests repeat, others do not."""
        return options.seed if options.seed is None else (options.seed, voice.id)

    def report(self):
        """Nothing more."""
        return {}

    def synthesize(self, utterance, voice, options):
        """Half a second of noise, after whatever the test's script does or returns."""
        self.spoken.append(utterance)
        made = self.script(utterance, options)
        noise = np.random.default_rng(0).uniform(-0.3, 0.3, 12_000).astype(np.float32)
        return AudioChunk(noise if made is None else made, self.sample_rate)

    def healthy(self):
        """Whatever the test set."""
        return self.ailment

    def close(self):
        """Nothing to close."""


@pytest.fixture
def engine():
    """A scripted engine."""
    return ScriptedEngine()


@pytest.fixture
def app(engine):
    """The real app on the scripted engine, loaded and ready."""
    app = create_app(Settings(queue_requests=8), engine)
    app.extensions["speech"].trouble = None
    return app


@pytest.fixture
def client(app):
    """A client of that app."""
    return app.test_client()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A real server: gunicorn and the embedded engine, started as `make run` does."""
    with Server(log=tmp_path_factory.mktemp("server") / "log") as running:
        running.wait_until_ready()
        yield running
