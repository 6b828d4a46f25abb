"""What the zoo holds: one entry a target, one entry a pair. A recipe is every number; the rest is `train_*.py`."""

from suites.zoo.train_draft import DraftRecipe
from suites.zoo.train_target import TargetRecipe

SLIDING, FULL = "sliding_attention", "full_attention"
HYBRID = [SLIDING, SLIDING, SLIDING, FULL] * 2

TARGETS = {
    "llama": TargetRecipe(
        "llama",
        {
            "hidden_size": 192,
            "intermediate_size": 256,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
        tokens_a_step=4096,
        learning_rate=4e-3,
        muon_rate=None,
        warmup=60,
        loop_rounds=0,
    ),
    "gemma3": TargetRecipe(
        "gemma3_text",
        {
            "hidden_size": 128,
            "intermediate_size": 288,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 64,
            "layer_types": HYBRID,
        },
        loop_rounds=6,
    ),
    "gemma4": TargetRecipe(
        "gemma4_text",
        {
            "hidden_size": 128,
            "intermediate_size": 288,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_global_key_value_heads": 1,
            "global_head_dim": 64,
            "attention_k_eq_v": True,
            "sliding_window": 64,
            "layer_types": HYBRID,
            "final_logit_softcapping": 30.0,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 1024,
        },
    ),
    "deepseek": TargetRecipe(
        "deepseek_v3",
        {
            "hidden_size": 128,
            "intermediate_size": 256,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 7,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 48,
            "kv_lora_rank": 48,
            "qk_nope_head_dim": 24,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 0,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3_moe": TargetRecipe(
        "qwen3_moe",
        {
            "hidden_size": 128,
            "intermediate_size": 256,
            "moe_intermediate_size": 40,
            "num_hidden_layers": 7,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "tie_word_embeddings": False,
        },
    ),
}

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
EAGLE = {**HEADS, "intermediate_size": 512, "draft_vocab_size": 832}

DRAFTS = {
    "llama-eagle3": DraftRecipe("eagle3", EAGLE, draft_vocab=832, steps=2400, samples=2048, muon_rate=None, warmup=60),
    "llama-eagle3-postnorm": DraftRecipe("eagle3-postnorm", EAGLE, draft_vocab=832, steps=400, samples=512),
    "llama-peagle": DraftRecipe("peagle", {**EAGLE, "num_hidden_layers": 2}, draft_vocab=832, steps=1000),
    "llama-dflash": DraftRecipe(
        "dflash", {**HEADS, "intermediate_size": 384, "num_hidden_layers": 2, "block_size": 4}, steps=1200
    ),
    "llama-standalone": DraftRecipe(
        "standalone",
        {
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 32,
        },
        steps=600,
        draft_steps=1,
        samples=512,
    ),
    "gemma3-eagle3": DraftRecipe("eagle3", EAGLE, draft_vocab=832),
    "deepseek-eagle3-mla": DraftRecipe(
        "eagle3-mla",
        {
            "intermediate_size": 512,
            "draft_vocab_size": 832,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 48,
            "kv_lora_rank": 48,
            "qk_nope_head_dim": 24,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
        },
        draft_vocab=832,
        steps=900,
        samples=256,
    ),
    "qwen3_moe-mtp": DraftRecipe("mtp", {}, bfloat16=False),
    "gemma4-assistant": DraftRecipe(
        "assistant",
        {
            "text_config": {
                "model_type": "gemma4_text",
                "vocab_size": 1024,
                "hidden_size": 128,
                "intermediate_size": 192,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "num_global_key_value_heads": 1,
                "global_head_dim": 64,
                "attention_k_eq_v": True,
                "num_kv_shared_layers": 4,
                "sliding_window": 64,
                "layer_types": [*[SLIDING] * 3, FULL],
                "hidden_size_per_layer_input": 0,
                "vocab_size_per_layer_input": 0,
                "max_position_embeddings": 512,
                "rms_norm_eps": 1e-6,
                "bos_token_id": 0,
                "eos_token_id": 0,
            }
        },
        hidden_dropout=0.5,
    ),
}
"""a draft's folder is its target's name, a hyphen and its own"""


def target_of(draft: str) -> str:
    """llama-eagle3-postnorm -> llama"""
    return draft.partition("-")[0]
