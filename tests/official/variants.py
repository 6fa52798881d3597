"""AlgoPerf's variants of its workloads: other activations, normalisations and sizes, from version 0.5 on."""

from __future__ import annotations

VARIANTS = (
    "criteo1tb_test",
    "criteo1tb_layernorm",
    "criteo1tb_embed_init",
    "criteo1tb_resnet",
    "fastmri_model_size",
    "fastmri_tanh",
    "fastmri_layernorm",
    "imagenet_resnet_silu",
    "imagenet_resnet_gelu",
    "imagenet_resnet_large_bn_init",
    "imagenet_vit_glu",
    "imagenet_vit_post_ln",
    "imagenet_vit_map",
    "librispeech_conformer_attention_temperature",
    "librispeech_conformer_layernorm",
    "librispeech_conformer_gelu",
    "librispeech_deepspeech_tanh",
    "librispeech_deepspeech_no_resnet",
    "librispeech_deepspeech_norm_and_spec_aug",
    "ogbg_gelu",
    "ogbg_silu",
    "ogbg_model_size",
    "wmt_post_ln",
    "wmt_attention_temp",
    "wmt_glu_tanh",
)

# Those that AlgoPerf itself cannot build: `init_model_fn` raises before any submission is asked, with this message.
BROKEN = {
    # Its Encoder1DBlock calls what its dropout returns.
    ("imagenet_vit_post_ln", "jax"): "TypeError: 'DynamicJaxprTracer' object is not callable",
}
