"""Tiny random models of many classes of transformers, by name."""

import torch
import transformers

from tests.tiny_models import VOCAB_SIZE

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    # Larger than usual, so that routers, gates and soft caps have something to do.
    "initializer_range": 0.2,
}
_HEADS = {"head_dim": 8}
_MLA = {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
_GROUPED = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 16}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}

# By the class's name without `ForCausalLM`: its configuration's name, and what differs from the options above.
MODELS = {
    "Cohere": ("Cohere", {"logit_scale": 0.5, "use_qk_norm": True}),
    "Cohere2": ("Cohere2", {"logit_scale": 0.5}),
    "DeepseekV3": (
        "DeepseekV3",
        _MLA | _GROUPED | {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    ),
    "Exaone4": ("Exaone4", _HEADS),
    "FalconH1": (
        "FalconH1",
        _HEADS
        | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
        | {"mamba_chunk_size": 8, "lm_head_multiplier": 0.5},
    ),
    "GPT2": ("GPT2", {"n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "GPTNeoX": ("GPTNeoX", {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "Gemma": ("Gemma", _HEADS),
    "Gemma2": ("Gemma2", _HEADS | {"final_logit_softcapping": 2.0, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "Gemma3": (
        "Gemma3Text",
        _HEADS | {"final_logit_softcapping": 2.0, "sliding_window": 8, "query_pre_attn_scalar": 8},
    ),
    "Glm4": ("Glm4", _HEADS),
    "Glm4Moe": (
        "Glm4Moe",
        _HEADS | _GROUPED | {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "use_qk_norm": True},
    ),
    "GptOss": ("GptOss", _HEADS | _LOCAL | {"sliding_window": 8}),
    "Granite": ("Granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    "GraniteMoe": ("GraniteMoe", _LOCAL | {"logits_scaling": 4.0}),
    "Lfm2": ("Lfm2", {"full_attn_idxs": [1], "block_auto_adjust_ff_dim": False, "conv_bias": True}),
    "Lfm2Moe": (
        "Lfm2Moe",
        _MOE | {"num_dense_layers": 0, "layer_types": ["full_attention", "conv"]},
    ),
    "Llama": ("Llama", {}),
    "Llama4": (
        "Llama4Text",
        _HEADS | _LOCAL | {"num_experts_per_tok": 1, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1},
    ),
    "MiniMaxM2": ("MiniMaxM2", _HEADS | _LOCAL),
    "Mistral": ("Mistral", _HEADS | {"sliding_window": 8}),
    "Mixtral": ("Mixtral", _LOCAL),
    "Nemotron": ("Nemotron", {}),
    "NemotronH": (
        "NemotronH",
        _HEADS
        | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "moe", "attention", "mlp"], "mamba_num_heads": 4}
        | {"mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8, "num_experts_per_tok": 2}
        | _GROUPED
        | {"moe_shared_expert_intermediate_size": 16},
    ),
    "Olmo2": ("Olmo2", {}),
    "Olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "Phi": ("Phi", {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "Phi3": ("Phi3", {}),
    "Qwen2": ("Qwen2", {}),
    "Qwen2Moe": ("Qwen2Moe", _MOE | {"shared_expert_intermediate_size": 16}),
    "Qwen3": ("Qwen3", _HEADS),
    "Qwen3Moe": ("Qwen3Moe", _HEADS | _MOE | {"norm_topk_prob": True}),
    "Qwen3Next": (
        "Qwen3Next",
        _HEADS
        | _MOE
        | {"shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"]}
        | {
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "SmolLM3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "StableLm": ("StableLm", {}),
    "Starcoder2": ("Starcoder2", {"residual_dropout": 0.0, "embedding_dropout": 0.0}),
}
# That TRL 1.16 itself cannot train: it looks for the auxiliary loss, or for the backbone, in another place.
NOT_TRAINED_BY_TRL = ("GraniteMoe", "Llama4")
_SUFFIXES = {"GPT2": "LMHeadModel"}


def zoo_model(name, experts_implementation="eager", **options):
    """A model of the class, whose norm scales, biases and other vectors are generic too."""
    config_name, own = MODELS[name]
    config = getattr(transformers, f"{config_name}Config")(**(_COMMON | own | options))
    torch.manual_seed(0)
    model_class = getattr(transformers, name + _SUFFIXES.get(name, "ForCausalLM"))
    implementation = {} if experts_implementation is None else {"experts_implementation": experts_implementation}
    model = model_class._from_config(config, **implementation)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            # Zeros and ones would hide mistakes in their rules, and experts and routers are often left at zero.
            scale = 0.2 if parameter.dim() == 1 or not parameter.any() else 0.02
            parameter += scale * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):  # of routers, as long as there are experts
                buffer += 0.1 * torch.randn(buffer.shape, generator=generator)
    return model
