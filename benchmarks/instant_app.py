"""The real service around an engine that answers at once: what is left is the server's own cost.

    gunicorn -c gunicorn.conf.py 'benchmarks.instant_app:create_app()'
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from app import create_app as create_real_app
from audio import AudioChunk
from engines import SynthesisOptions
from settings import Settings
from voices import Voice

RATE = 24_000
NOISE = np.random.default_rng(0).uniform(-0.3, 0.3, RATE // 2).astype(np.float32)  # half a second


class InstantEngine:
    """Says the same half second to every text."""

    name, model, sample_rate = "instant", "instant-1", RATE
    max_utterance_tokens = 508
    can_clone = can_emote = emotes_by_text = False
    honours: frozenset[str] = frozenset()
    speed_range = (1.0, 1.0)
    slots = 1
    first_alone = False
    usual_syllables = 56

    def load(self) -> None:
        """Nothing to load."""

    def check(self, voice: Voice) -> None:
        """Any voice will do."""

    def unspoken(self, text: str) -> str:
        """Nothing."""
        return ""

    def fits(self, utterance: str) -> bool:
        """Any length."""
        return True

    def sound_key(self, voice: Voice, options: SynthesisOptions) -> Hashable | None:
        """None: every request is made, also those for the same text."""
        return None

    def report(self) -> dict[str, Any]:
        """Nothing more."""
        return {}

    def synthesize(self, utterance: str, voice: Voice, options: SynthesisOptions) -> AudioChunk:
        """Half a second of noise."""
        return AudioChunk(NOISE, RATE)

    def healthy(self) -> str | None:
        """Always."""
        return None

    def close(self) -> None:
        """Nothing to close."""


def create_app() -> Any:
    """Return the real app around this engine."""
    return create_real_app(Settings.from_env(), InstantEngine())
