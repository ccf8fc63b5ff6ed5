"""Default targets by `model.config.model_type`: one table, and what single methods have otherwise."""

from __future__ import annotations

DEFAULT_TARGETS: dict[str, list[str] | str] = {
    "bart": ["q_proj", "v_proj"],
    "bert": ["query", "value"],
    "blip-2": ["q", "q_proj", "v", "v_proj"],
    "bloom": ["query_key_value"],
    "btlm": ["c_attn", "c_proj"],
    "chatglm": ["query_key_value"],
    "codegen": ["qkv_proj"],
    "deberta": ["in_proj"],
    "deberta-v2": ["query_proj", "value_proj"],
    "electra": ["query", "value"],
    "falcon": ["query_key_value"],
    "gemma": ["q_proj", "v_proj"],
    "gemma2": ["q_proj", "v_proj"],
    "gemma3_text": ["q_proj", "v_proj"],
    "gemma4": ".*language_model\\..*\\.(q_proj|v_proj)",
    "gpt2": ["c_attn"],
    "gpt_bigcode": ["c_attn"],
    "gpt_neo": ["q_proj", "v_proj"],
    "gpt_neox": ["query_key_value"],
    "gptj": ["q_proj", "v_proj"],
    "layoutlm": ["query", "value"],
    "llama": ["q_proj", "v_proj"],
    "llama4": ["q_proj", "v_proj"],
    "mistral": ["q_proj", "v_proj"],
    "mixtral": ["q_proj", "v_proj"],
    "mpt": ["Wqkv"],
    "mt5": ["q", "v"],
    "nemotron_h": ["k_proj", "o_proj", "q_proj", "v_proj"],
    "opt": ["q_proj", "v_proj"],
    "phi": ["fc1", "fc2", "q_proj", "v_proj"],
    "qwen2": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "v_proj"],
    "RefinedWeb": ["query_key_value"],
    "RefinedWebModel": ["query_key_value"],
    "roberta": ["query", "value"],
    "rwkv": ["key", "output", "receptance", "value"],
    "rwkv7": ["k_proj", "key", "o_proj", "r_proj", "v_proj", "value"],
    "stablelm": ["q_proj", "v_proj"],
    "t5": ["q", "v"],
    "xlm-roberta": ["query", "value"],
}

# AdaLoRA moves its budget between layers, so it starts on more of them.
ADALORA_TARGETS: dict[str, list[str] | str] = DEFAULT_TARGETS | {
    "bart": ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"],
    "deberta-v2": ["dense", "key_proj", "query_proj", "value_proj"],
    "mt5": ["k", "o", "q", "v", "wi_0", "wi_1", "wo"],
    "opt": ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"],
    "roberta": ["dense", "key", "query", "value"],
    "t5": ["k", "o", "q", "v", "wi", "wo"],
}

# (IA)^3: keys, values, and the feed-forward layer whose input is scaled.
IA3_TARGETS: dict[str, list[str] | str] = {
    "RefinedWeb": ["query_key_value", "dense_4h_to_h"],
    "RefinedWebModel": ["query_key_value", "dense_4h_to_h"],
    "bart": ["q_proj", "v_proj", "fc2"],
    "bert": ["key", "value", "output.dense"],
    "bloom": ["query_key_value", "mlp.dense_4h_to_h"],
    "deberta": ["in_proj", "output.dense"],
    "deberta-v2": ["key_proj", "value_proj", "output.dense"],
    "falcon": ["query_key_value", "dense_4h_to_h"],
    "gemma": ["q_proj", "v_proj", "down_proj"],
    "gemma2": ["q_proj", "v_proj", "down_proj"],
    "gemma3_text": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "gpt_bigcode": ["c_attn", "mlp.c_proj"],
    "gpt_neo": ["q_proj", "v_proj", "c_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "gptj": ["q_proj", "v_proj", "fc_out"],
    "llama": ["k_proj", "v_proj", "down_proj"],
    "llama4": ["q_proj", "v_proj", "down_proj"],
    "mistral": ["k_proj", "v_proj", "down_proj"],
    "mixtral": ["k_proj", "v_proj", "w2"],
    "mt5": ["k", "v", "wi_1"],
    "opt": ["q_proj", "k_proj", "fc2"],
    "phi": ["q_proj", "v_proj", "fc2"],
    "qwen2": ["q_proj", "v_proj", "down_proj"],
    "qwen3": ["q_proj", "v_proj", "down_proj"],
    "roberta": ["key", "value", "output.dense"],
    "t5": ["k", "v", "wo"],
}

# mt5 has none: the gate of its feed-forward is scaled like a key.
IA3_FEEDFORWARD: dict[str, list[str]] = {
    model_type: [] if model_type == "mt5" else list(targets[-1:]) for model_type, targets in IA3_TARGETS.items()
}
