"""What every vLLM process of this server does first: vLLM's entry point `vllm.general_plugins`.

vLLM finds it through speech_server.dist-info beside this file: both folders only have to be on sys.path.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECKOUT_VARIABLE = "SPEECH_INDEXTTS_CHECKOUT"  # indextts_voice.py names its checkout in it; unset for other engines
OMNI_VARIABLE = "SPEECH_OMNI"  # omni_voice.py sets it
CALM = [0.0] * 7 + [1.0]  # of IndexTTS's eight emotions the last
EMOTION_MODEL = "qwen0.6bemo4-merge"  # its folder in that of the weights
PR_SET_PDEATHSIG = 1  # linux/prctl.h

log = logging.getLogger("speech.plugin")


def register() -> None:
    """Tie a spawned process to its parent; teach vLLM the checkout's model, or mend vLLM-Omni's, where it is in use."""
    if parent := multiprocessing.parent_process():
        die_with_parent(parent.pid)
    if checkout := os.environ.get(CHECKOUT_VARIABLE):
        register_indextts(checkout)
    if os.environ.get(OMNI_VARIABLE):
        mend_omni()


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies: else it would keep its GPU memory for good."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel was asked
        os._exit(1)


def register_indextts(checkout: str) -> None:
    """Register the checkout's GPT with vLLM and mend what is wrong with it."""
    if checkout not in sys.path:
        sys.path.insert(0, checkout)
    import patch_vllm  # noqa: F401 - registers the model and its positions
    from indextts.gpt.index_tts_gpt2_vllm_v1 import GPT2TTSModel

    GPT2TTSModel.embed_input_ids = embed_input_ids
    GPT2TTSModel.compute_logits = compute_logits


def embed_input_ids(
    self: Any, input_ids: Any, multimodal_embeddings: Any = None, *, is_multimodal: Any = None, **_: Any
) -> Any:
    """Embed audio codes, and put the prompts where vLLM says they are.

    The checkout puts them where the id is 0, which is also an audio code: one decoded while another request starts
    makes one place too many, and the engine dies.
    """
    from vllm.model_executor.models.utils import _merge_multimodal_embeddings

    embeddings = self.audio_emb(input_ids)
    if not multimodal_embeddings:
        return embeddings
    places = input_ids == 0 if is_multimodal is None else is_multimodal
    return _merge_multimodal_embeddings(embeddings, multimodal_embeddings, places)


def compute_logits(self: Any, hidden_states: Any) -> Any:
    """Score the next audio code, with the bias that the checkout leaves out: the stop token's is part of it."""
    return self.logits_processor(self.lm_head, hidden_states, self.lm_head.bias)


def mend_omni() -> None:
    """Have the model that reads emotions load with the talker, answer the same each time, and never end the talker."""
    from vllm_omni.model_executor.models.indextts2 import indextts2_talker as talker

    model = talker.IndexTTS2TalkerForConditionalGeneration
    talker.load_qwen_emotion = without_sampling(talker.load_qwen_emotion)
    model._warmup_external_models = with_emotions(model._warmup_external_models, talker.load_qwen_emotion)
    model._predict_emotion_from_text = calm_at_worst(model._predict_emotion_from_text)


def with_emotions(load: Callable[[Any, Any], None], load_emotions: Callable[..., Any]) -> Callable[[Any, Any], None]:
    """Return a loader of the talker's other models that loads what emotions need too.

    At their first use memory may be short, or the files gone, and the talker would end.
    """

    @functools.wraps(load)
    def loaded(self: Any, device: Any) -> None:
        load(self, device)
        for matrix in ("emo_matrix", "spk_matrix"):
            self._ensure_matrix_loaded(f"_{matrix}", matrix, matrix)
        if any(Path(self.model_path, below, EMOTION_MODEL, "config.json").is_file() for below in (".", "checkpoints")):
            load_emotions(self.model_path, device)

    return loaded


def without_sampling(load: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """Return a loader whose model gives its likeliest answer: it would sample, without a seed."""

    @functools.wraps(load)
    def loaded(*arguments: Any, **options: Any) -> tuple[Any, Any]:
        model, tokenizer = load(*arguments, **options)
        if model is not None:
            model.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
        return model, tokenizer

    return loaded


def calm_at_worst(predict: Callable[..., list[float] | None]) -> Callable[..., list[float]]:
    """Return a reader of emotions that takes what it cannot read for calm, as it does where it reads none."""

    @functools.wraps(predict)
    def predicted(self: Any, text: str, device: Any) -> list[float]:
        try:
            return predict(self, text, device) or CALM
        except Exception:
            log.exception("the emotion of a text could not be read; it is spoken calmly")
            return CALM

    return predicted
