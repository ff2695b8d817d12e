"""Makes small random IndexTTS-2 and IndexTTS-2.5 checkpoints in the layout that vllm-omni reads.

    python checkpoints.py FOLDER        writes FOLDER/indextts2 and FOLDER/indextts2_5

What they say is noise, but it ends: the stop token grows more likely with every audio code, so an utterance lasts about
a second, as a trained model's would end by itself. The widths that vllm-omni fixes are real, the depths are not.
"""

import base64
import copy
import json
import random
import shutil
import sys
from pathlib import Path

import sentencepiece
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
)
from vllm_omni.model_executor.models.indextts2 import tokenizer_v2_5
from vllm_omni.model_executor.models.indextts2.codec import EnhancedCodec
from vllm_omni.model_executor.models.indextts2.configuration_indextts2 import IndexTTS2Config, IndexTTS25Config
from vllm_omni.model_executor.models.indextts2.gpt.conformer_encoder import ConformerEncoder
from vllm_omni.model_executor.models.indextts2.gpt.embeddings import LearnedPositionEmbeddings
from vllm_omni.model_executor.models.indextts2.gpt.perceiver import PerceiverResampler
from vllm_omni.model_executor.models.indextts2.s2mel.modules import bigvgan
from vllm_omni.model_executor.models.indextts2.s2mel.modules.commons import AttrDict, MyModel
from vllm_omni.model_executor.models.indextts2.utils.campplus.dtdnn import CAMPPlus
from vllm_omni.model_executor.models.indextts2.utils.maskgct.repcodec_model import RepCodec

LAYERS = 2
ENCODER = {"output_size": 64, "linear_units": 64, "attention_heads": 4, "num_blocks": 1}  # of voice and of emotion
WORDS = "THE QUICK BROWN FOX JUMPS OVER A LAZY DOG HELLO WORLD THIS IS A TEST 好 了 你 世 界 今 天 气 很 我 们 在 测 试"
SPEAKER_DIM, FEATURE_DIM = 192, 1024  # of CAMPPlus and of w2v-bert
USUAL_CODES = 60  # after about so many audio codes an utterance ends


def make_indextts2(folder: Path) -> None:
    """Write an IndexTTS-2 checkpoint, the model that reads emotions out of words included."""
    torch.manual_seed(0)
    config = small_config(IndexTTS2Config)
    config["gpt"]["number_text_tokens"] = 512
    write_config(folder, config, "indextts2", "IndexTTS2TalkerForConditionalGeneration")
    train_bpe(folder)
    save_features(folder)
    save_vocoder(folder)
    save_emotions(folder, config, config["gpt"]["model_dim"])
    torch.save(RepCodec(codebook_size=8192, hidden_size=FEATURE_DIM, codebook_dim=8).state_dict(),
               folder / "semantic_codec.pth")  # fmt: skip
    save_s2mel(folder, config, use_gpt_latent=True)
    save_talker(folder, config, voice_parts(config))
    save_emotion_model(folder / "qwen0.6bemo4-merge")


def make_indextts25(folder: Path, indextts2: Path) -> None:
    """Write an IndexTTS-2.5 checkpoint without an emotion-text model; what both have in common is the other one's."""
    torch.manual_seed(0)
    config = small_config(IndexTTS25Config)
    config["gpt"].update(model_dim=256, heads=4)
    config["semantic_codec"].update(vocos_dim=64, vocos_intermediate_dim=64, vocos_num_layers=2)
    write_config(folder, config, "indextts2_5", "IndexTTS25TalkerForConditionalGeneration")
    write_tiktoken(folder)
    for name in ("w2v-bert-2.0", "bigvgan"):
        shutil.copytree(indextts2 / name, folder / name)
    for name in ("wav2vec2bert_stats.pt", "campplus_cn_common.bin"):
        shutil.copy(indextts2 / name, folder)
    save_emotions(folder, config, config["gpt"]["model_dim"])
    codec = EnhancedCodec(**config["semantic_codec"], cfg=config["semantic_codec"])
    torch.save({"model": codec.state_dict()}, folder / "codec.pth")
    save_s2mel(folder, config, use_gpt_latent=False)
    dim = config["gpt"]["model_dim"]
    languages = nn.Embedding(len(tokenizer_v2_5.LANGUAGE_DICT) + 1, dim)
    save_talker(folder, config, {"spk_emb_proj": nn.Linear(SPEAKER_DIM, dim), "lang_embedding": languages})


def small_config(kind: type[IndexTTS2Config]) -> dict:
    """Return a model's configuration with few and narrow layers where vllm-omni lets us choose."""
    config = copy.deepcopy(kind._DEFAULTS)
    config["gpt"]["layers"] = LAYERS
    for encoder in ("condition_module", "emo_condition_module"):
        config["gpt"][encoder].update(ENCODER)
    config["s2mel"]["DiT"].update(hidden_dim=64, num_heads=4, depth=3, content_dim=64)
    config["s2mel"]["length_regulator"].update(channels=64)
    config["s2mel"]["wavenet"].update(hidden_dim=64, num_layers=2)
    return config


def write_config(folder: Path, config: dict, model_type: str, architecture: str) -> None:
    """Write config.json, from which the engine knows the model."""
    folder.mkdir(parents=True)
    transformer = {
        "hidden_size": config["gpt"]["model_dim"], "num_attention_heads": config["gpt"]["heads"],
        "num_hidden_layers": LAYERS, "max_position_embeddings": 4096, "torch_dtype": "float32",
    }  # fmt: skip
    named = {"model_type": model_type, "architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(config | transformer | named, indent=1))


def train_bpe(folder: Path) -> None:
    """Write bpe.model, trained on a few words."""
    chosen = random.Random(0)
    text = folder / "bpe.txt"
    text.write_text("".join(" ".join(chosen.choices(WORDS.split(), k=8)) + ".\n" for _ in range(3000)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "bpe"), vocab_size=200, model_type="bpe", hard_vocab_limit=False,
        bos_id=0, eos_id=1, unk_id=2, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    text.unlink()


def write_tiktoken(folder: Path) -> None:
    """Write a byte-level vocabulary with as many entries as IndexTTS-2.5's."""
    pairs = (bytes([a, b]) for a in range(256) for b in range(256))
    tokens = [bytes([a]) for a in range(256)]
    tokens += [next(pairs) for _ in range(tokenizer_v2_5.INDEXTTS25_MERGEABLE_RANKS - len(tokens))]
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (folder / tokenizer_v2_5.INDEXTTS25_TOKENIZER_FILE).write_text("".join(lines))


def save_features(folder: Path) -> None:
    """Save what hears the reference audio: w2v-bert (its layer 17 is read) and CAMPPlus."""
    hearing = Wav2Vec2BertConfig(
        hidden_size=FEATURE_DIM, num_hidden_layers=17, num_attention_heads=4, intermediate_size=64,
        conv_depthwise_kernel_size=3, position_embeddings_type=None, add_adapter=False,
    )  # fmt: skip
    Wav2Vec2BertModel(hearing).save_pretrained(folder / "w2v-bert-2.0")
    extractor = SeamlessM4TFeatureExtractor(
        feature_size=80, num_mel_bins=80, sampling_rate=16000, stride=2, padding_value=1.0
    )
    extractor.save_pretrained(folder / "w2v-bert-2.0")
    torch.save({"mean": torch.zeros(FEATURE_DIM), "var": torch.ones(FEATURE_DIM)}, folder / "wav2vec2bert_stats.pt")
    speaker = CAMPPlus(feat_dim=80, embedding_size=SPEAKER_DIM)
    torch.save(speaker.state_dict(), folder / "campplus_cn_common.bin")


def save_vocoder(folder: Path) -> None:
    """Save a thin BigVGAN for 22.05 kHz."""
    (folder / "bigvgan").mkdir()
    settings = {
        "resblock": "1", "upsample_rates": [4, 4, 2, 2, 2, 2], "upsample_kernel_sizes": [8, 8, 4, 4, 4, 4],
        "upsample_initial_channel": 64, "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3, 5]],
        "use_tanh_at_final": False, "use_bias_at_final": False, "activation": "snakebeta", "snake_logscale": True,
        "num_mels": 80, "sampling_rate": 22050, "n_fft": 1024, "hop_size": 256, "win_size": 1024, "fmin": 0,
        "fmax": None,
    }  # fmt: skip
    config = folder / "bigvgan/config.json"
    config.write_text(json.dumps(settings))
    vocoder = bigvgan.BigVGAN(bigvgan.load_hparams_from_json(str(config)))
    torch.save({"generator": vocoder.state_dict()}, folder / "bigvgan/bigvgan_generator.pt")


def save_emotions(folder: Path, config: dict, dim: int) -> None:
    """Save the tables of emotions and of the speakers they are chosen by."""
    rows = sum(config["emo_num"])
    torch.save(torch.randn(rows, dim), folder / "feat2.pt")
    torch.save(torch.randn(rows, SPEAKER_DIM), folder / "feat1.pt")


def save_s2mel(folder: Path, config: dict, use_gpt_latent: bool) -> None:
    """Save what makes a spectrogram of audio codes."""
    nested = {key: AttrDict(value) if isinstance(value, dict) else value for key, value in config["s2mel"].items()}
    model = MyModel(AttrDict(nested), use_emovec=False, use_gpt_latent=use_gpt_latent)
    torch.save({"net": {name: part.state_dict() for name, part in model.models.items()}}, folder / "s2mel.pth")


def conformer() -> ConformerEncoder:
    """Return an encoder of w2v-bert's features."""
    sizes = {key: ENCODER[key] for key in ("output_size", "linear_units", "attention_heads", "num_blocks")}
    return ConformerEncoder(input_size=FEATURE_DIM, input_layer="conv2d2", **sizes)


def perceiver(dim: int, latents: int) -> PerceiverResampler:
    """Return a resampler of an encoder's output."""
    return PerceiverResampler(
        dim, dim_context=ENCODER["output_size"], ff_mult=2, heads=ENCODER["attention_heads"], num_latents=latents
    )


def voice_parts(config: dict) -> dict[str, nn.Module]:
    """Return what puts a voice in front of the text in IndexTTS-2."""
    dim = config["gpt"]["model_dim"]
    return {
        "speed_emb": nn.Embedding(2, dim),
        "conditioning_encoder": conformer(),
        "perceiver_encoder": perceiver(dim, config["gpt"]["condition_num_latent"]),
    }


def save_talker(folder: Path, config: dict, voice: dict[str, nn.Module]) -> None:
    """Save the GPT that says audio codes, under the names of the official checkpoint."""
    gpt = config["gpt"]
    dim = gpt["model_dim"]
    parts = {
        "text_embedding": nn.Embedding(gpt["number_text_tokens"] + 1, dim),
        "mel_embedding": nn.Embedding(gpt["number_mel_codes"], dim),
        "text_pos_embedding": LearnedPositionEmbeddings(gpt["max_text_tokens"] + 2, dim),
        "mel_pos_embedding": LearnedPositionEmbeddings(gpt["max_mel_tokens"] + 3, dim),
        "emo_layer": nn.Linear(dim, dim),
        "emovec_layer": nn.Linear(FEATURE_DIM, dim),
        "emo_conditioning_encoder": conformer(),
        "emo_perceiver_encoder": perceiver(FEATURE_DIM, latents=1),
        "mel_head": nn.Linear(dim, gpt["number_mel_codes"]),
        "final_norm": nn.LayerNorm(dim),
        **voice,
    }
    state = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    blocks = GPT2Model(GPT2Config(vocab_size=8, n_positions=16, n_embd=dim, n_layer=LAYERS, n_head=gpt["heads"]))
    state |= {f"gpt.{key}": value for key, value in blocks.state_dict().items() if not key.startswith(("wte", "wpe"))}
    state["emovec_layer.weight"] *= 20  # or the emotion of an audio would not be heard
    let_it_end(state, dim, gpt["stop_mel_token"])
    torch.save(state, folder / "gpt.pth")


def let_it_end(state: dict[str, torch.Tensor], dim: int, stop: int) -> None:
    """Make the stop token likelier with every audio code: a direction that grows with the position, and its reader."""
    direction = torch.randn(dim)
    direction -= direction.mean()  # layer norm would take the mean out
    direction /= direction.norm()
    positions = state["mel_pos_embedding.emb.weight"]
    growth = torch.arange(len(positions)) / (2 * USUAL_CODES) * dim**0.5  # a code's own embedding is dim**0.5 long
    positions += growth[:, None] * direction
    state["mel_head.weight"] *= 3  # or no code would be likelier than another
    state["mel_head.weight"][stop] = direction * 18 / dim**0.5


def save_emotion_model(folder: Path) -> None:
    """Save a language model of bytes: its words are noise, out of which vllm-omni reads an even temper."""
    alphabet = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    end = "<|im_end|>"
    tokenizer = Tokenizer(models.BPE(vocab=alphabet | {end: len(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, chat_template=template).save_pretrained(folder)
    size = Qwen3Config(
        vocab_size=len(alphabet) + 1, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, eos_token_id=len(alphabet),
    )  # fmt: skip
    Qwen3ForCausalLM(size).save_pretrained(folder)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    make_indextts2(target / "indextts2")
    make_indextts25(target / "indextts2_5", target / "indextts2")
