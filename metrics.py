"""What GET /metrics tells Prometheus: requests, queue, first audio, real-time factor, cache, the process itself."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 60, 180, 600)
RTF = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1, 1.5, 2, 4)


class Metrics:
    """The figures of one service, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "speech_requests", "Requests answered", ["route", "status", "voice", "format"], registry=registry
        )
        self.first_audio_s = Histogram(
            "speech_first_audio_seconds", "From a request's arrival to its first bytes of audio, by kind of answer",
            ["answer"], buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.slot_wait_s = Histogram(
            "speech_slot_wait_seconds", "How long an utterance waited for its turn", buckets=SECONDS, registry=registry
        )
        self.rtf = Histogram(
            "speech_rtf", "Seconds of computing over seconds of audio, of an utterance", buckets=RTF, registry=registry
        )
        self.audio_s = Counter("speech_audio_seconds", "Seconds of audio in answers", registry=registry)
        self.compute_s = Counter("speech_compute_seconds", "Seconds that slots spent making audio", registry=registry)
        self.utterances = Counter(
            "speech_utterances", "Utterances by how they came: miss, shared, hit", ["origin"], registry=registry
        )
        self.errors = Counter("speech_errors", "Requests that failed in speaking, by code", ["code"], registry=registry)
        self.busy_slots = Gauge(
            "speech_slots_busy", "Utterances in the making: one more than there are slots where a request begins",
            registry=registry,
        )  # fmt: skip

    def watch(self, name: str, told: str, value: Callable[[], float]) -> None:
        """Show a figure that is asked for at each scrape."""
        Gauge(name, told, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """Return everything in Prometheus's text format."""
        return generate_latest(self.registry)
