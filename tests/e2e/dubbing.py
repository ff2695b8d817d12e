"""The dubbing pipeline around the worker, as small as it can be: a video, hearing it, translating, joining, muxing.

ffmpeg and ffprobe are the programs of that name; speech comes from the server under test, hearing from whisper-base.
"""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import numpy as np
import soundfile
from dubbing_worker import Segment, Worker
from hearing import Listener, character_error_rate
from serving import Server, decode

GAP_S, LEAST_GAP_S = 1.0, 0.6  # between the lines of the video, and what counts as one when hearing it
QUIET = 10 ** (-45 / 20)
SPEAKERS = (5, 1, 9, 4)  # numbered voices, in turn: nova, alloy, coral, onyx
PHRASES = {
    "今天天气很好。": "The weather is very nice today.",
    "我们去公园散步吧。": "Let us go for a walk in the park.",
    "请问火车站怎么走？": "Excuse me, how do I get to the train station?",
    "我想喝一杯咖啡。": "I would like a cup of coffee.",
    "会议在下午三点开始。": "The meeting starts at three in the afternoon.",
    "这本书非常有意思。": "This book is very interesting.",
    "他昨天从北京回来了。": "He came back from Beijing yesterday.",
    "明天早上我要去医院。": "Tomorrow morning I have to go to the hospital.",
    "这家饭馆的菜很好吃。": "The food in this restaurant is very good.",
    "孩子们在外面踢足球。": "The children are playing football outside.",
    "请把窗户关上。": "Please close the window.",
    "我的手机没有电了。": "My phone has run out of battery.",
    "她会说三种语言。": "She can speak three languages.",
    "谢谢你的帮助。": "Thank you for your help.",
    "飞机什么时候起飞？": "When does the plane take off?",
    "我们是很好的朋友。": "We are very good friends.",
    "学生们正在图书馆学习。": "The students are studying in the library.",
    "他的父亲是一名医生。": "His father is a doctor.",
    "我每天六点起床。": "I get up at six every day.",
    "再见，祝你一路平安。": "Goodbye, and have a safe journey.",
}


def ffmpeg(*arguments: object) -> None:
    """Run ffmpeg; raise RuntimeError with what it said where it fails."""
    command = ["ffmpeg", "-hide_banner", "-loglevel", "error", "-nostdin", "-y", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode or done.stderr:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")


def make_video(server: Server, lines: list[str], path: Path) -> None:
    """Make a video of ffmpeg's test picture in which the embedded engine says the lines, GAP_S apart."""
    spoken = [server.speak(line, voice="sage") for line in lines]
    rate = spoken[0][1]
    gap = np.zeros(round(GAP_S * rate), np.float32)
    sound = path.with_suffix(".source.wav")
    soundfile.write(sound, np.concatenate([part for samples, _ in spoken for part in (samples, gap)]), rate)
    picture = ("-f", "lavfi", "-i", "testsrc2=size=320x180:rate=10")
    ffmpeg(*picture, "-i", sound, "-c:v", "mpeg4", "-c:a", "aac", "-shortest", path)


def hear_lines(video: Path, listener: Listener) -> list[str]:
    """Extract a video's sound, cut it at its gaps and return what whisper hears in each piece."""
    sound = video.with_suffix(".sound.wav")
    ffmpeg("-i", video, "-vn", "-ac", 1, "-ar", 16000, sound)
    samples, rate = soundfile.read(sound, dtype="float32")
    return [listener.listen(piece, rate, "zh") for piece in cut_at_gaps(samples, rate)]


def cut_at_gaps(samples: np.ndarray, rate: int) -> list[np.ndarray]:
    """Cut samples where it is quiet for LEAST_GAP_S."""
    loud = np.flatnonzero(np.abs(samples) > QUIET)
    cuts = np.flatnonzero(np.diff(loud) > LEAST_GAP_S * rate)
    edge = rate // 10
    starts, ends = loud[np.r_[0, cuts + 1]], loud[np.r_[cuts, len(loud) - 1]]
    return [samples[max(0, start - edge) : end + edge] for start, end in zip(starts, ends, strict=True)]


def translate(heard: str) -> str:
    """Return the English of the phrase that is most like what was heard; raise ValueError where none is."""
    phrase = min(PHRASES, key=lambda known: character_error_rate(known, heard))
    if character_error_rate(phrase, heard) > 0.5:
        raise ValueError(f"no phrase is like {heard!r}")
    return PHRASES[phrase]


def segments_of(texts: list[str]) -> list[Segment]:
    """Return a task's segments, the speakers in turn."""
    return [Segment(number, text, SPEAKERS[number % len(SPEAKERS)]) for number, text in enumerate(texts)]


def dub(video: Path, segments: list[Segment], worker: Worker, out: Path) -> float:
    """Have the segments spoken, join and mux them; return the joined audio's seconds. Raises TaskFailed."""
    wavs = worker.speak_task(segments)
    joined = join(wavs, out.with_suffix(".parts"))
    seconds = soundfile.info(joined).duration
    lengths = ("-stream_loop", -1, "-i", video, "-i", joined, "-map", "0:v", "-map", "1:a", "-t", f"{seconds:.3f}")
    ffmpeg(*lengths, "-c:v", "mpeg4", "-c:a", "aac", out)
    return seconds


def join(wavs: list[bytes], folder: Path) -> Path:
    """Join WAVs with ffmpeg's concat demuxer, without decoding them; return the file."""
    folder.mkdir()
    for number, wav in enumerate(wavs):
        (folder / f"{number}.wav").write_bytes(wav)
    (folder / "list.txt").write_text("".join(f"file '{number}.wav'\n" for number in range(len(wavs))))
    ffmpeg("-f", "concat", "-i", folder / "list.txt", "-c", "copy", folder / "joined.wav")
    return folder / "joined.wav"


def seconds_of(wavs: list[bytes]) -> float:
    """Return how long WAVs last together."""
    return sum(len(samples) / rate for samples, rate in (soundfile.read(io.BytesIO(wav)) for wav in wavs))


def sound_of(video: Path) -> tuple[np.ndarray, int]:
    """Decode a video's sound: float32 mono samples and their rate in Hz."""
    return decode(video.read_bytes())
