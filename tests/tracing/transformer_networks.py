"""Small random-init models of ``transformers``, each with inputs and what of its output matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import nn

Case = tuple[nn.Module, dict[str, Any], Callable[[Any], Any]]

TEXT = {"vocab_size": 96, "max_position_embeddings": 32}
WIDTHS = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
LLAMA = {**TEXT, **WIDTHS, "num_key_value_heads": 2}
ENCODER_DECODER = {
    "vocab_size": 96, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
}  # fmt: skip
IMAGE = {"image_size": 16, "patch_size": 4}


def ids(length: int = 9) -> torch.Tensor:
    return torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(0))


def image(size: int = 16) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def logits(out: Any) -> Any:
    return out.logits


def text(model: nn.Module) -> Case:
    return model, {"input_ids": ids()}, logits


def pairs(model: nn.Module, **inputs: Any) -> Case:
    return model, {**(inputs or {"input_ids": ids()}), "decoder_input_ids": ids(7)}, logits


def pictures(model: nn.Module, size: int = 16) -> Case:
    return model, {"pixel_values": image(size)}, logits


def experts(model: nn.Module) -> nn.Module:
    """PyTorch's kernel for rows that are sorted by expert knows no float64."""
    model.set_experts_implementation("batched_mm")  # type: ignore[operator]
    return model


NETWORKS: dict[str, Callable[[], Case]] = {
    "BERT": lambda: text(tf.BertForSequenceClassification(tf.BertConfig(**TEXT, **WIDTHS))),
    "GPT-2": lambda: text(
        tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=32,
                                         bos_token_id=1, eos_token_id=1))
    ),
    "OPT": lambda: text(
        tf.OPTForCausalLM(tf.OPTConfig(**TEXT, hidden_size=48, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4,
                                       word_embed_proj_dim=48))
    ),
    "GPT-NeoX": lambda: text(tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**TEXT, **WIDTHS))),
    "Llama": lambda: text(tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA))),
    "Qwen3": lambda: text(tf.Qwen3ForCausalLM(tf.Qwen3Config(**LLAMA, head_dim=12))),
    "Gemma": lambda: text(tf.GemmaForCausalLM(tf.GemmaConfig(**LLAMA, head_dim=12))),
    "T5": lambda: pairs(
        tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=96, d_model=48, d_kv=12, d_ff=64, num_layers=2,
                                                  num_heads=4, decoder_start_token_id=0))
    ),
    "BART": lambda: pairs(
        tf.BartForConditionalGeneration(tf.BartConfig(**ENCODER_DECODER, max_position_embeddings=32))
    ),
    "Whisper": lambda: pairs(
        tf.WhisperForConditionalGeneration(tf.WhisperConfig(
            **ENCODER_DECODER, num_mel_bins=8, max_source_positions=16, max_target_positions=16, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)),
        input_features=torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0)),
    ),
    "ViT": lambda: pictures(tf.ViTForImageClassification(tf.ViTConfig(**WIDTHS, **IMAGE))),
    "Swin": lambda: pictures(
        tf.SwinForImageClassification(tf.SwinConfig(image_size=32, patch_size=2, embed_dim=24, depths=[2, 2],
                                                    num_heads=[2, 4], window_size=4)), 32,
    ),
    "DeBERTa": lambda: text(
        tf.DebertaV2ForSequenceClassification(tf.DebertaV2Config(
            **TEXT, **WIDTHS, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8,
            share_att_key=True, norm_rel_ebd="layer_norm"))
    ),
    "CLIP": lambda: (
        tf.CLIPModel(tf.CLIPConfig(text_config={**TEXT, **WIDTHS, "eos_token_id": 2, "bos_token_id": 1},
                                   vision_config={**WIDTHS, **IMAGE}, projection_dim=24)),
        {"input_ids": ids(), "pixel_values": image()},
        lambda out: out.logits_per_image,
    ),
    "Mixtral": lambda: text(experts(tf.MixtralForCausalLM(tf.MixtralConfig(**LLAMA, num_local_experts=3)))),
    "wav2vec2": lambda: (
        tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(
            **{**WIDTHS, "vocab_size": 32}, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3),
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)),
        {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(0))},
        logits,
    ),
}  # fmt: skip
"""Makers by the name of the architecture."""

FLOAT32_NORMS = {"Llama", "Qwen3", "Gemma", "T5", "Mixtral"}
"""Their root-mean-square norms compute in float32, whatever the model is in."""


def made(name: str) -> Case:
    """A network in float64 and eval mode, none of whose vectors is constant."""
    torch.manual_seed(0)
    model, inputs, outputs = NETWORKS[name]()
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.3 * torch.randn_like(p)
    doubled = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    return model.double().eval(), doubled, outputs
