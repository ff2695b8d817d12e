"""Makes a random IndexTTS-2 checkpoint in the layout of index-tts-vllm: for tests and figures, not for listening.

    python tests/indextts/make_checkpoint.py CHECKOUT FOLDER [--size small|middle|full] [--codes N]

--size   full: the real dimensions, 7 GB; middle: a quarter of the GPT, half of each dimension after it, so that the
         stages keep about their shares; small: the smallest that the checkout's code allows, 1.3 GB
--codes  about how many audio codes an utterance gets (50 are a second)

Two things are steered. The stop token's score follows the position, so that utterances end around --codes; and audio
code 0 is likely, as decoding it while another request starts is what killed the checkout's engine. Both scores come
through the bias that the checkout leaves out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import sentencepiece
import torch
import transformers
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

START, STOP = 8192, 8193  # of the 8194 audio codes
DIM = 1280  # the GPT's width, which the checkout's s2mel expects
SENTENCES = (
    "你好,今天的天气真好.", "大家好,欢迎收看本期节目!", "我们一起去公园散步吧?", "人工智能正在改变世界.",
    "请问这个多少钱?", "HELLO WORLD , THIS IS A SHORT TEST .", "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG .",
    "HOW ARE YOU TODAY ?", "WE ARE DUBBING A VIDEO , LINE BY LINE !",
    "一 二 三 四 五 六 七 八 九 十 , 0 1 2 3 4 5 6 7 8 9",
)  # fmt: skip


class Sizes:
    """Picks each dimension: the real one, the smallest that works, or half of the real one where none is given."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, full: int, small: int, middle: int | None = None) -> int:
        return {"full": full, "middle": middle or full // 2, "small": small}[self.name]


def gpt_config(size: Sizes) -> dict[str, Any]:
    """Return the GPT's shape."""

    def conformer(units: int, heads: int, blocks: int) -> dict[str, Any]:
        return {
            "output_size": size(512, 64), "linear_units": size(units, 64), "attention_heads": heads,
            "num_blocks": size(blocks, 1), "input_layer": "conv2d2", "perceiver_mult": 2,
        }  # fmt: skip

    return {
        "model_dim": DIM, "max_mel_tokens": 1815, "max_text_tokens": 600, "heads": 20, "use_mel_codes_as_input": True,
        "mel_length_compression": 1024, "layers": size(24, 2, 6), "number_text_tokens": 12000, "number_mel_codes": 8194,
        "start_mel_token": START, "stop_mel_token": STOP, "start_text_token": 0, "stop_text_token": 1,
        "train_solo_embeddings": False, "condition_type": "conformer_perceiver",
        "condition_module": conformer(2048, 8, 6), "emo_condition_module": conformer(1024, 4, 4),
    }  # fmt: skip


def s2mel_config(size: Sizes) -> dict[str, Any]:
    """Return the flow matching's shape."""
    spectrum = {"n_fft": 1024, "win_length": 1024, "hop_length": 256, "n_mels": 80, "fmin": 0, "fmax": "None"}
    regulator = {
        "channels": size(512, 64), "is_discrete": False, "in_channels": 1024,
        "content_codebook_size": size(2048, 64), "sampling_ratios": [1] * size(4, 1), "vector_quantize": False,
        "n_codebooks": 1, "quantizer_dropout": 0.0, "f0_condition": False, "n_f0_bins": 512,
    }  # fmt: skip
    transformer = {
        "hidden_dim": size(512, 64), "num_heads": size(8, 2), "depth": size(13, 3, 7), "class_dropout_prob": 0.1,
        "block_size": 8192, "in_channels": 80, "style_condition": True, "final_layer_type": "wavenet",
        "target": "mel", "content_dim": size(512, 64), "content_codebook_size": 1024, "content_type": "discrete",
        "f0_condition": False, "n_f0_bins": 512, "content_codebooks": 1, "is_causal": False,
        "long_skip_connection": True, "zero_prompt_speech_token": False, "time_as_token": False,
        "style_as_token": False, "uvit_skip_connection": True, "add_resblock_in_transformer": False,
    }  # fmt: skip
    wavenet = {
        "hidden_dim": size(512, 64), "num_layers": size(8, 2), "kernel_size": 5, "dilation_rate": 1,
        "p_dropout": 0.2, "style_condition": True,
    }  # fmt: skip
    return {
        "preprocess_params": {"sr": 22050, "spect_params": spectrum}, "dit_type": "DiT", "reg_loss_type": "l1",
        "style_encoder": {"dim": 192}, "length_regulator": regulator, "DiT": transformer, "wavenet": wavenet,
    }  # fmt: skip


def config(size: Sizes) -> Any:
    """Return config.yaml: the real one's values, or smaller ones where the code allows."""
    codec = {
        "codebook_size": 8192, "hidden_size": 1024, "codebook_dim": 8, "vocos_dim": size(384, 48),
        "vocos_intermediate_dim": size(2048, 64), "vocos_num_layers": size(12, 2),
    }  # fmt: skip
    return OmegaConf.create({
        "dataset": {"bpe_model": "bpe.model", "sample_rate": 24000}, "gpt": gpt_config(size),
        "semantic_codec": codec, "s2mel": s2mel_config(size), "gpt_checkpoint": "gpt.pth",
        "s2mel_checkpoint": "s2mel.pth", "w2v_stat": "wav2vec2bert_stats.pt", "emo_matrix": "feat2.pt",
        "spk_matrix": "feat1.pt", "emo_num": [3, 17, 2, 8, 4, 5, 10, 24], "qwen_emo_path": "qwen0.6bemo4-merge/",
        "vocoder": {"type": "bigvgan", "name": "bigvgan"}, "version": 2.0,
    })  # fmt: skip


def write_gpt(folder: Path, settings: Any, codes: int) -> None:
    """Write gpt.pth and, as the checkout's convert_hf_format.py does, gpt/."""
    from indextts.gpt.model_v2 import UnifiedVoice

    gpt = UnifiedVoice(**settings.gpt).eval()
    for weights in gpt.parameters():
        if weights.dim() > 1 and not torch.isfinite(weights).all():
            weights.normal_(0, 0.02)
    steer(gpt, codes)
    torch.save({"model": gpt.state_dict()}, folder / "gpt.pth")
    gpt = gpt.half()
    gpt.post_init_gpt2_config()
    gpt.inference_model.save_pretrained(folder / "gpt", safe_serialization=False)


def steer(gpt: Any, codes: int) -> None:
    """Let utterances end around that many codes, hold code 0 now and then, and never the start token.

    Code 0 needs that much: it is also the placeholder of the prompt, for which sampling divides its score by 10.
    """
    for block in gpt.gpt.h:  # else their noise drowns the position
        block.attn.c_proj.weight *= 0.05
        block.mlp.c_proj.weight *= 0.05
    direction = torch.nn.functional.normalize(torch.randn(DIM), dim=0)
    positions = gpt.mel_pos_embedding.emb.weight
    reach = ((torch.arange(len(positions)) - codes) / (codes / 2)).clamp(-1, 1)
    positions += 1.5 * reach.unsqueeze(1) * direction
    gpt.mel_head.weight.normal_(0, 0.02)
    gpt.mel_head.weight[STOP] = 0.3 * direction
    gpt.mel_head.bias.zero_()
    gpt.mel_head.bias[[START, 0]] = torch.tensor([-100.0, 28.0])


def write_tokenizer(folder: Path, special: list[str], settings: dict[str, Any]) -> dict[str, int]:
    """Write a tokenizer of GPT-2's bytes and some special tokens; return its vocabulary, in which "!" is 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: n for n, symbol in enumerate([*alphabet, *special])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return vocabulary


def write_prompt_tokenizer(folder: Path) -> None:
    """Write what vLLM reads the GPT's placeholder "!" with, and the feature extractor that it looks for."""
    end = "<|endoftext|>"
    named = {"tokenizer_class": "GPT2Tokenizer", "bos_token": end, "eos_token": end, "unk_token": end}
    assert write_tokenizer(folder, [end], named)["!"] == 0
    listener = transformers.WhisperFeatureExtractor(feature_size=128).to_dict()
    named = json.dumps({**listener, "processor_class": "Qwen2AudioProcessor"})
    (folder / "preprocessor_config.json").write_text(named)


def write_listeners(folder: Path, settings: Any, size: Sizes) -> None:
    """Write w2v-bert, its statistics, the semantic codec and CAMPPlus."""
    from indextts.s2mel.modules.campplus.DTDNN import CAMPPlus
    from indextts.utils.maskgct_utils import build_semantic_codec

    bert = transformers.Wav2Vec2BertConfig(
        hidden_size=1024, num_hidden_layers=size(24, 17, 17), num_attention_heads=16,
        intermediate_size=size(4096, 64, 512), feature_projection_input_dim=160, apply_spec_augment=False,
    )  # fmt: skip
    transformers.Wav2Vec2BertModel(bert).save_pretrained(folder / "w2v-bert-2.0")
    transformers.SeamlessM4TFeatureExtractor().save_pretrained(folder / "w2v-bert-2.0")
    torch.save({"mean": torch.zeros(1024), "var": torch.ones(1024)}, folder / "wav2vec2bert_stats.pt")
    (folder / "semantic_codec").mkdir()
    codec = build_semantic_codec(settings.semantic_codec)
    safetensors.torch.save_model(codec, folder / "semantic_codec" / "model.safetensors")
    (folder / "campplus").mkdir()
    torch.save(CAMPPlus(feat_dim=80, embedding_size=192).state_dict(), folder / "campplus" / "campplus_cn_common.bin")


def write_sounders(folder: Path, checkout: Path, settings: Any, size: Sizes) -> None:
    """Write s2mel, BigVGAN and the emotions' examples."""
    from indextts.s2mel.modules.bigvgan import bigvgan
    from indextts.s2mel.modules.commons import MyModel

    s2mel = MyModel(settings.s2mel, use_gpt_latent=True)
    torch.save({"net": {name: s2mel.models[name].state_dict() for name in s2mel.models}}, folder / "s2mel.pth")
    (folder / "bigvgan").mkdir()
    shape = json.loads((checkout / "indextts/s2mel/modules/bigvgan/config.json").read_text())
    shape["upsample_initial_channel"] = size(1536, 128)
    if size.name == "small":
        shape.update(resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3, 5]])
    (folder / "bigvgan" / "config.json").write_text(json.dumps(shape))
    vocoder = bigvgan.BigVGAN(bigvgan.load_hparams_from_json(folder / "bigvgan" / "config.json"), use_cuda_kernel=False)
    torch.save({"generator": vocoder.state_dict()}, folder / "bigvgan" / "bigvgan_generator.pt")
    torch.save(torch.randn(73, 192), folder / "feat1.pt")
    torch.save(torch.randn(73, DIM) * 0.02, folder / "feat2.pt")


def write_text_tokenizer(folder: Path) -> None:
    """Write bpe.model, trained on a few sentences cut as the checkout cuts text: Han characters one by one."""
    lines = ["".join(f" {c} " if "\u4e00" <= c <= "\u9fff" else c for c in line).strip() for line in SENTENCES]
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines * 20), model_prefix=str(folder / "bpe"), vocab_size=200, hard_vocab_limit=False,
        model_type="bpe", character_coverage=1.0, bos_id=0, eos_id=1, unk_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip


def write_emotion_model(folder: Path) -> None:
    """Write a small Qwen3 in place of the emotion model's 0.6 B; what it says means nothing."""
    folder.mkdir()
    end = "<|im_end|>"
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "chat_template": template}
    vocabulary = write_tokenizer(folder, ["<|endoftext|>", "<|im_start|>", end], named)
    shape = transformers.Qwen3Config(
        vocab_size=264, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, eos_token_id=vocabulary[end],
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(shape).half().save_pretrained(folder)


def make_checkpoint(checkout: Path, folder: Path, size_name: str, codes: int) -> None:
    """Write the whole checkpoint."""
    sys.path.insert(0, str(checkout))
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    folder.mkdir(parents=True, exist_ok=True)
    size = Sizes(size_name)
    settings = config(size)
    OmegaConf.save(settings, folder / "config.yaml")
    write_gpt(folder, settings, codes)
    write_prompt_tokenizer(folder / "gpt")
    write_listeners(folder, settings, size)
    write_sounders(folder, checkout, settings, size)
    write_text_tokenizer(folder)
    write_emotion_model(folder / settings.qwen_emo_path)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=("small", "middle", "full"), default="small")
    parser.add_argument("--codes", type=int, default=30)
    given = parser.parse_args()
    make_checkpoint(given.checkout.resolve(), given.folder, given.size, given.codes)


if __name__ == "__main__":
    main()
