"""IndexTTS2 of an index-tts-vllm checkout taken apart: each stage of its infer() is one call here.

The arithmetic is that of indextts/infer_vllm_v2.py and indextts/gpt/model_vllm_v2.py, so that the same audio codes and
seed give the samples that infer() gives. Everything but tokenize() belongs on one thread with grad off.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import librosa
import numpy as np
import torch
import torchaudio
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from vllm_engine import Reference

LOADED_RATE = 22_050  # Hz; what infer() loads a speaker's audio at, and what the voice speaks at
FEATURE_RATE = 16_000  # Hz; what w2v-bert and CAMPPlus listen to
FLOW_STEPS, GUIDANCE = 25, 0.7  # of the flow matching, as in infer()
FRAMES_PER_CODE = 1.72  # mel frames of 256 samples to an audio code


class Conditioning(NamedTuple):
    """What a reference audio comes down to; d is the GPT's width."""

    latent: Tensor  # [1, 32, d], the speaker for the GPT
    base: Tensor  # [1, d], the emotion of the audio as a speaker's
    emotion: Tensor  # [1, d], the emotion of the same audio as an emotion audio's: resampled another way
    mel: Tensor  # [1, 80, frames]
    condition: Tensor  # [1, frames, 512], for the flow matching
    style: Tensor  # [1, 192]


class Line(NamedTuple):
    """An utterance ready to be spoken."""

    prompt: dict[str, Any]  # what vLLM's GPT is given
    tokens: Tensor  # int32 [1, n]
    speaker: Conditioning
    emotion: Tensor  # [1, d]


class Stages:
    """The stages of one loaded IndexTTS2."""

    def __init__(self, tts: Any):
        self._tts, self._gpt, self._device = tts, tts.gpt, torch.device(tts.device)
        self._lock = threading.Lock()
        self.engine = tts.gpt.llm
        self.sampling = tts.gpt.sampling_params
        self.stop_code: int = tts.gpt.stop_mel_token
        self.max_text_tokens: int = tts.gpt.max_text_tokens
        self.max_codes: int = tts.gpt.max_mel_tokens

    @staticmethod
    def prepare_thread() -> None:
        """Switch grad off in the calling thread, for good."""
        torch.set_grad_enabled(False)

    @lru_cache(maxsize=1024)  # noqa: B019 - one Stages a process
    def tokenize(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text's tokens after the model's own normalisation; any thread may ask."""
        tokenizer = self._tts.tokenizer
        with self._lock:
            return tuple(tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)))

    def condition(self, reference: Reference) -> Conditioning:
        """Listen to a reference audio."""
        tts = self._tts
        audio = torch.tensor(resampled(reference, LOADED_RATE)).unsqueeze(0)
        audio_16k = torchaudio.transforms.Resample(LOADED_RATE, FEATURE_RATE)(audio)
        speaker = self._listen(audio_16k)
        emotion = self._listen(resampled(reference, FEATURE_RATE))
        mel = tts.mel_fn(audio.to(self._device).float())
        return Conditioning(
            latent=self._gpt.get_conditioning(speaker.transpose(1, 2), self._lengths(speaker)),
            base=self._gpt.get_emovec(speaker, self._lengths(speaker)),
            emotion=self._gpt.get_emovec(emotion, self._lengths(emotion)),
            mel=mel,
            condition=self._regulate(tts.semantic_codec.quantize(speaker)[1], mel.size(2)),
            style=self._style(audio_16k.to(self._device)),
        )

    def write(
        self,
        ids: Sequence[int],
        speaker: Conditioning,
        emotional: Conditioning | None = None,
        weight: float = 1.0,
        vector: Sequence[float] | None = None,
        choice: random.Random | None = None,
    ) -> Line:
        """Put text, speaker and emotion together: of an emotion audio by `weight`, or of eight emotions.

        choice: picks each of the eight emotions' examples; none: the one most like the speaker is taken.
        """
        emotion = speaker.base + weight * ((emotional or speaker).emotion - speaker.base)
        if vector is not None:
            emotion = self._emote(vector, speaker.style, choice, emotion)
        tokens = torch.tensor(ids, dtype=torch.int32, device=self._device).unsqueeze(0)
        return Line(self._prompt(tokens, speaker.latent, emotion), tokens, speaker, emotion)

    def sound(self, line: Line, codes: Sequence[int], seed: int | None) -> np.ndarray:
        """Turn audio codes into float32 samples [n] at LOADED_RATE; `seed` is the flow's noise."""
        tts, s2mel = self._tts, self._tts.s2mel.models
        coded = torch.tensor(codes, dtype=torch.long, device=self._device).unsqueeze(0)
        latent = s2mel["gpt_layer"](self._relate(line, coded))
        semantic = tts.semantic_codec.quantizer.vq2emb(coded.unsqueeze(1)).transpose(1, 2) + latent
        frames = (torch.LongTensor([len(codes)]) * FRAMES_PER_CODE).long().item()
        condition = torch.cat([line.speaker.condition, self._regulate(semantic, frames)], dim=1)
        lengths = torch.LongTensor([condition.size(1)]).to(self._device)
        reference = line.speaker.mel.size(-1)
        with self._seeded(seed), without_frames(s2mel["cfm"].estimator.wavenet, reference):
            mel = s2mel["cfm"].inference(
                condition, lengths, line.speaker.mel, line.speaker.style, None, FLOW_STEPS, inference_cfg_rate=GUIDANCE
            )
        samples = tts.bigvgan(mel[:, :, reference:].float())
        return samples.flatten().cpu().numpy()

    def _listen(self, audio_16k: Any) -> Tensor:
        """Return w2v-bert's embedding [1, frames, 1024]."""
        heard = self._tts.extract_features(audio_16k, sampling_rate=FEATURE_RATE, return_tensors="pt")
        features, mask = (heard[name].to(self._device) for name in ("input_features", "attention_mask"))
        return self._tts.get_emb(features, mask)

    def _lengths(self, tensor: Tensor) -> Tensor:
        """Return the last dimension; infer() takes it for an embedding's length too, which cuts audio over 20 s."""
        return torch.tensor([tensor.shape[-1]], device=self._device)

    def _style(self, audio_16k: Tensor) -> Tensor:
        """Return CAMPPlus's speaker embedding [1, 192]."""
        bank = torchaudio.compliance.kaldi.fbank(audio_16k, num_mel_bins=80, dither=0, sample_frequency=FEATURE_RATE)
        return self._tts.campplus_model((bank - bank.mean(dim=0, keepdim=True)).unsqueeze(0))

    def _regulate(self, semantic: Tensor, frames: int) -> Tensor:
        """Stretch semantic features to a number of mel frames: [1, frames, 512]."""
        lengths = torch.LongTensor([frames]).to(self._device)
        return self._tts.s2mel.models["length_regulator"](semantic, ylens=lengths, n_quantizers=3, f0=None)[0]

    def _emote(self, vector: Sequence[float], style: Tensor, choice: random.Random | None, own: Tensor) -> Tensor:
        """Mix eight emotions over the one that is there."""
        rows = [
            choice.randrange(len(speakers)) if choice else most_similar(style, speakers)
            for speakers in self._tts.spk_matrix
        ]
        examples = torch.cat(
            [emotion[row].unsqueeze(0) for row, emotion in zip(rows, self._tts.emo_matrix, strict=True)]
        )
        weights = torch.tensor(vector).to(self._device)
        return torch.sum(weights.unsqueeze(1) * examples, 0).unsqueeze(0) + (1 - torch.sum(weights)) * own

    def _prompt(self, tokens: Tensor, latent: Tensor, emotion: Tensor) -> dict[str, Any]:
        """Return what vLLM is given: one placeholder, and the embeddings [36 + n, d] that go in its place."""
        gpt = self._gpt
        inner, _ = gpt.build_aligned_inputs_and_targets(tokens, gpt.start_text_token, gpt.stop_text_token)
        start = gpt.mel_embedding(torch.full((1, 1), gpt.start_mel_token, dtype=torch.long, device=self._device))
        parts = [
            latent + emotion.unsqueeze(1),
            gpt.speed_emb(torch.tensor([[1, 0]], device=self._device)),
            gpt.text_embedding(inner) + gpt.text_pos_embedding(inner),
            start + gpt.mel_pos_embedding(start),
        ]
        return {"prompt": "!", "multi_modal_data": {"audio": {"audio_embeds": [torch.cat(parts, 1).squeeze(0).cpu()]}}}

    def _relate(self, line: Line, codes: Tensor) -> Tensor:
        """Run the GPT once over text and codes together: its hidden states [1, codes, d]."""
        return self._gpt(
            line.speaker.latent, line.tokens, self._lengths(line.tokens), codes, self._lengths(codes), None,
            emo_vec=line.emotion, use_speed=torch.zeros(1, dtype=torch.long, device=self._device),
        )  # fmt: skip

    @contextlib.contextmanager
    def _seeded(self, seed: int | None) -> Iterator[None]:
        """Draw from a generator of its own inside; without a seed, from the process's."""
        if seed is None:
            yield
            return
        with torch.random.fork_rng([self._device.index or 0] if self._device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield


@contextlib.contextmanager
def without_frames(wavenet: Any, count: int) -> Iterator[None]:
    """Have the flow's WaveNet leave out, as zeros, the first frames: nothing that it makes of the reference is kept.

    It has no norm over time, so that the others stay as they are where those within its reach go with them.
    """
    reach = sum((layer.conv.conv.kernel_size[0] - 1) * layer.conv.conv.dilation[0] // 2 for layer in wavenet.in_layers)
    whole, start = wavenet.forward, max(0, count - reach)

    def forward(x: Tensor, mask: Tensor, g: Tensor) -> Tensor:
        return pad(whole(x[..., start:], mask[..., start:], g=g), (start, 0))

    wavenet.forward = forward  # on the object, over the class's
    try:
        yield
    finally:
        del wavenet.forward


def resampled(reference: Reference, rate: int) -> np.ndarray:
    """Return a reference audio's samples at a rate in Hz, as librosa.load would from its file."""
    return librosa.resample(reference.samples, orig_sr=reference.sample_rate, target_sr=rate)


def most_similar(style: Tensor, speakers: Tensor) -> int:
    """Return the row of `speakers` [n, 192] most like a style [1, 192]."""
    return int(torch.argmax(cosine_similarity(style.float(), speakers.float(), dim=1)))
