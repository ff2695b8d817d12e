"""A scripted voice model with a real child process, for what is about timing, order and faults; an app around it."""

import asyncio
import os
import re
import subprocess
import sys
import threading

import numpy as np

import app
from app import create_app as create_real_app
from engines import VllmEngine
from settings import Settings
from vllm_engine import Spoken

RATE = 22_050


def noise(seconds=0.5, scale=0.3):
    """Samples at speech level."""
    return np.random.default_rng(0).uniform(-scale, scale, round(seconds * RATE)).astype(np.float32)


def level_of(number, seconds=0.5):
    """Samples whose level tells a number from 0 to 999."""
    return np.full(round(seconds * RATE), (number % 1000 + 100) / 2000, np.float32)


def number_of(samples):
    """The number that level_of was given."""
    return round(float(np.median(np.abs(samples))) * 2000) - 100


class ScriptedVoice:
    """A voice model with a child process, whose answers a test decides; half a second of noise else."""

    sample_rate, max_utterance_tokens = RATE, 200
    speed_range, seeded, emotes_by_text = (1.0, 1.0), True, False

    def __init__(self):
        self.asked, self.answers, self.delay_s, self.cancelled, self.closed = [], [], 0.0, 0, False
        self.sick = None

    async def create(self):
        """Start the process that stands for the engine's."""
        self.thread = threading.get_ident()
        self.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        return self

    def count_tokens(self, text):
        """One a character."""
        return len(text)

    async def speak(self, text, reference, **options):
        """Answer what the test laid ready."""
        self.asked.append((text, reference, options))
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.answers:
            return self.answers.pop(0)
        number = re.search(r"\d+", text)
        return Spoken(level_of(int(number[0])) if number else noise(), False)

    def ailment(self):
        """Whatever the test set."""
        return self.sick

    def report(self):
        """One figure."""
        return {"conditioning_hits": 7}

    def close(self):
        """Leave the process to the owner."""
        self.closed = True


def create_app():
    """Return the real app around a scripted voice; SCRIPT_DELAY_S is how long an utterance takes it.

    It does not load where there is the file SCRIPT_NO_MEMORY. SCRIPT_SEND_TIMEOUT_S is the patience with readers.
    """
    app.SEND_TIMEOUT_S = float(os.environ.get("SCRIPT_SEND_TIMEOUT_S", app.SEND_TIMEOUT_S))
    voice = ScriptedVoice()
    voice.delay_s = float(os.environ.get("SCRIPT_DELAY_S", 0))

    async def create(_settings):
        if os.path.exists(os.environ.get("SCRIPT_NO_MEMORY", "")):
            raise RuntimeError("no memory left")
        return await voice.create()

    settings = Settings.from_env()
    return create_real_app(settings, VllmEngine("indextts", settings, "scripted", create))
