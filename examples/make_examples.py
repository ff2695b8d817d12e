"""Make examples/voice_01.wav to voice_11.wav: the reference audio of the eleven voices, spoken by the embedded engine.

Each is 6 to 9 s of clean speech, mono s16 at 24 kHz, all at the same loudness; nobody's voice and nobody's rights.
"""

from pathlib import Path

import av
import numpy as np
import soundfile

from app import Order, Speech
from audio import AudioChunk, audio_frame, level, pulled, to_int16
from engines import choose_engine
from settings import Settings

TEXT = "清晨的阳光照进安静的小镇，人们慢慢地打开窗户，新的一天就这样开始了。The day begins."
LUFS = -21.0  # leaves every peak under -1 dBFS
HERE = Path(__file__).resolve().parent


def loudness(chunk: AudioChunk) -> float:
    """Integrated loudness in LUFS (EBU R 128, FFmpeg's ebur128)."""
    graph = av.filter.Graph()
    source = graph.add_abuffer(sample_rate=chunk.sample_rate, format="flt", layout="mono")
    graph.link_nodes(source, graph.add("ebur128", "metadata=1"), graph.add("abuffersink")).configure()
    graph.push(audio_frame(chunk, "flt"))
    graph.push(None)
    measured = [frame.metadata["lavfi.r128.I"] for frame in pulled(graph) if "lavfi.r128.I" in frame.metadata]
    return float(measured[-1])  # the last frame, when shorter than 0.1 s, carries none


def speak(service: Speech, voice_id: str) -> AudioChunk:
    """Speak the text in a voice, at LUFS."""
    order = Order(TEXT, service.voices.resolve(voice_id))
    chunks = list(service.speak(order))
    whole = AudioChunk(np.concatenate([chunk.samples for chunk in chunks]), order.sample_rate)
    return level(whole, LUFS - loudness(whole))


def main() -> None:
    """Write the eleven files and say what they are."""
    settings = Settings()
    service = Speech(settings, choose_engine(settings))
    service.load()
    for voice in service.voices.voices:
        chunk = speak(service, voice.id)
        path = HERE / Path(voice.reference_audio).name
        soundfile.write(path, to_int16(chunk.samples), chunk.sample_rate, subtype="PCM_16")
        peak = 20 * np.log10(np.abs(chunk.samples).max())
        print(f"{path.name}  {voice.id:8} {chunk.seconds:5.2f} s  {loudness(chunk):6.1f} LUFS  peak {peak:5.1f} dBFS")


if __name__ == "__main__":
    main()
