"""Models of Hugging Face's transformers, from small configurations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.zoo.exhibit import Exhibit, language, own_loss, pictures, tokens

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def gpt2() -> Exhibit:
    import transformers as t

    config = t.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return Exhibit(lambda: t.GPT2LMHeadModel(config), language, own_loss)


def llama() -> Exhibit:
    import transformers as t

    config = t.LlamaConfig(vocab_size=64, max_position_embeddings=16, num_key_value_heads=2, **SMALL)
    return Exhibit(lambda: t.LlamaForCausalLM(config), language, own_loss)


def bert() -> Exhibit:
    import transformers as t

    config = t.BertConfig(vocab_size=64, max_position_embeddings=16, **SMALL)
    return Exhibit(lambda: t.BertForMaskedLM(config), language, own_loss)


def xlnet() -> Exhibit:
    import transformers as t

    config = t.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=64)
    return Exhibit(lambda: t.XLNetLMHeadModel(config), language, own_loss)


def t5() -> Exhibit:
    import transformers as t

    config = t.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return Exhibit(lambda: t.T5ForConditionalGeneration(config), language, own_loss)


def vit() -> Exhibit:
    import transformers as t

    config = t.ViTConfig(image_size=32, patch_size=8, num_labels=10, **SMALL)
    return Exhibit(lambda: t.ViTForImageClassification(config), pictures, own_loss)


def swin() -> Exhibit:
    import transformers as t

    config = t.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=10
    )
    return Exhibit(lambda: t.SwinForImageClassification(config), pictures, own_loss)


def convnext() -> Exhibit:
    import transformers as t

    config = t.ConvNextConfig(patch_size=2, hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, num_labels=10)
    return Exhibit(lambda: t.ConvNextForImageClassification(config), pictures, own_loss)


def resnet() -> Exhibit:
    import transformers as t

    config = t.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", num_labels=10
    )
    return Exhibit(lambda: t.ResNetForImageClassification(config), pictures, own_loss)


def mixtral() -> Exhibit:
    import transformers as t

    config = t.MixtralConfig(
        vocab_size=64, max_position_embeddings=16, num_key_value_heads=2, num_local_experts=4, **SMALL
    )
    return Exhibit(lambda: t.MixtralForCausalLM(config), language, own_loss)


def deepseek() -> Exhibit:
    import transformers as t

    config = t.DeepseekV3Config(
        vocab_size=64, max_position_embeddings=16, num_key_value_heads=4, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, moe_intermediate_size=32,
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, **SMALL,
    )  # fmt: skip
    return Exhibit(lambda: t.DeepseekV3ForCausalLM(config), language, own_loss)


def llama4() -> Exhibit:
    import transformers as t

    config = t.Llama4TextConfig(
        vocab_size=64, max_position_embeddings=16, num_key_value_heads=2, num_local_experts=4, head_dim=8,
        intermediate_size_mlp=64, **SMALL,
    )  # fmt: skip
    return Exhibit(lambda: t.Llama4ForCausalLM(config), language, own_loss)


def mamba() -> Exhibit:
    import transformers as t

    config = t.MambaConfig(vocab_size=64, hidden_size=64, state_size=8, num_hidden_layers=2)
    return Exhibit(lambda: t.MambaForCausalLM(config), language, own_loss)


def whisper() -> Exhibit:
    import transformers as t

    config = t.WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=16, max_source_positions=16,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip

    def batch() -> dict[str, Tensor]:
        return {"input_features": torch.randn(8, 16, 32), "labels": tokens(length=8)}

    return Exhibit(lambda: t.WhisperForConditionalGeneration(config), batch, own_loss)


def wav2vec2() -> Exhibit:
    import transformers as t

    config = t.Wav2Vec2Config(
        vocab_size=32, conv_dim=(16, 16, 16), conv_stride=(5, 2, 2), conv_kernel=(10, 3, 3), mask_time_length=2,
        num_feat_extract_layers=3, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=8, **SMALL,
    )  # fmt: skip

    def batch() -> dict[str, Tensor]:
        return {"input_values": torch.randn(8, 800), "labels": tokens(32, length=6)}

    return Exhibit(lambda: t.Wav2Vec2ForCTC(config), batch, own_loss)


def detr() -> Exhibit:
    import scipy  # noqa: F401 (its matching of boxes)
    import transformers as t

    backbone = t.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = t.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
        num_queries=5, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_labels=5,
    )  # fmt: skip

    def batch() -> dict[str, Any]:
        labels = [{"class_labels": torch.randint(5, (2,)), "boxes": torch.rand(2, 4) * 0.4 + 0.3} for _ in range(8)]
        return {"pixel_values": torch.randn(8, 3, 64, 64), "labels": labels}

    return Exhibit(lambda: t.DetrForObjectDetection(config), batch, own_loss)
