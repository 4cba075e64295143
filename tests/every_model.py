"""Tiny, random causal language models of every architecture of transformers that can be made from a small configuration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.toy import make_tiny_tokenizer

VOCABULARY = 64
"""As many tokens as the tokenizer of tests/toy.py."""
WINDOW = 96
"""Tokens that layers see which do not see all."""
MOST_PARAMETERS = 4_000_000
SIZES: dict[str, object] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "embed_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads", "mamba_n_groups", "n_groups"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "kv_channels", "swa_head_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "mamba_d_head"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "moe_num_shared_experts", "num_shared_experts"), 1),
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 12,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 16,
    "o_lora_rank": 16,
    "o_groups": 2,
    "d_state": 8,
    "state_size": 8,
    "mamba_d_state": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    **dict.fromkeys(
        ("sliding_window", "window_size", "attention_chunk_size", "attention_window_size", "local_attention"), WINDOW
    ),
    "initializer_range": 0.2,
    "init_std": 0.2,
}
"""Values for the settings of these names, where a configuration has them. Weights are ten times larger than usual, so that
distributions are uneven and a wrong mask changes them."""


SPECIAL: dict[str, dict[str, object]] = {
    # Larger weights amplify what float32 rounds off.
    **{name: {"initializer_range": 0.05} for name in ("hrm_text", "granitemoe", "granitemoeshared")},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16, "layer_types": ["mamba", "attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "zamba2": {"layer_types": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "xlnet": {"d_head": 16},
    "longcat_flash": {"vocab_size": VOCABULARY, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 64},
    "ctrl": {"dff": 64},
    "reformer": {"is_decoder": True},
}
"""What some architectures ask for, and settings without which a small one would lack a kind of layer."""


def model_types() -> list[str]:
    """All that `AutoModelForCausalLM` knows, in alphabetical order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **sizes: object) -> PretrainedConfig:
    """The configuration of such a model, with small values wherever a setting is known. Raises where it cannot be made."""
    kind = CONFIG_MAPPING[model_type]
    names = set(kind().to_dict()) | set(getattr(kind, "attribute_map", {}))
    chosen = {name: value for name, value in (SIZES | sizes).items() if name in names}
    mapped = {kind.attribute_map[name] for name in chosen if name in getattr(kind, "attribute_map", {})}
    chosen = {name: value for name, value in chosen.items() if name not in mapped}
    if "qk_rope_head_dim" in chosen:
        chosen |= {"head_dim": chosen["qk_rope_head_dim"], "num_key_value_heads": chosen["num_attention_heads"]}
    return kind(**chosen | SPECIAL.get(model_type, {}))


def make_every(model_type: str, folder: Path, **sizes: object) -> str | None:
    """Write such a model and a tokenizer to `folder`, with these in place of `SIZES`; None where none can be made so small."""
    try:
        config = tiny_config(model_type, **sizes)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST_PARAMETERS:
            return None
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    except Exception:  # transformers has as many ways to refuse a configuration as it has architectures
        return None
    make_tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def own_log_probs(model: PreTrainedModel, prompt: npt.NDArray[np.int32], response: npt.NDArray[np.int32]) -> torch.Tensor:
    """Of each response token, by transformers' own forward on this row alone."""
    tokens = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
    log_probs_TV = torch.log_softmax(model(tokens[None], use_cache=False).logits[0], -1)
    return log_probs_TV[len(prompt) - 1 : -1].gather(1, tokens[len(prompt) :, None])[:, 0]
