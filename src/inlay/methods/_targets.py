"""Default targets by `model.config.model_type`: one table, and what single methods have otherwise."""

from __future__ import annotations

Targets = dict[str, list[str] | str]


def _table(rows: Targets) -> Targets:
    """An entry for each of the model types that a row names."""
    return {
        model: targets if isinstance(targets, str) else [*targets]
        for models, targets in rows.items()
        for model in models.split()
    }


DEFAULT_TARGETS: Targets = _table(
    {
        "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4": ["q_proj", "v_proj"],
        "mistral mixtral opt qwen2 qwen3 stablelm": ["q_proj", "v_proj"],
        "bert electra layoutlm roberta xlm-roberta": ["query", "value"],
        "blip-2": ["q", "q_proj", "v", "v_proj"],
        "bloom chatglm falcon gpt_neox RefinedWeb RefinedWebModel": ["query_key_value"],
        "btlm": ["c_attn", "c_proj"],
        "codegen": ["qkv_proj"],
        "deberta": ["in_proj"],
        "deberta-v2": ["query_proj", "value_proj"],
        "gemma4": ".*language_model\\..*\\.(q_proj|v_proj)",
        "gpt2 gpt_bigcode": ["c_attn"],
        "mpt": ["Wqkv"],
        "mt5 t5": ["q", "v"],
        "nemotron_h": ["k_proj", "o_proj", "q_proj", "v_proj"],
        "phi": ["fc1", "fc2", "q_proj", "v_proj"],
        "rwkv": ["key", "output", "receptance", "value"],
        "rwkv7": ["k_proj", "key", "o_proj", "r_proj", "v_proj", "value"],
    }
)

# AdaLoRA moves its budget between layers, so it starts on more of them.
ADALORA_TARGETS: Targets = DEFAULT_TARGETS | _table(
    {
        "bart opt": ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"],
        "deberta-v2": ["dense", "key_proj", "query_proj", "value_proj"],
        "mt5": ["k", "o", "q", "v", "wi_0", "wi_1", "wo"],
        "roberta": ["dense", "key", "query", "value"],
        "t5": ["k", "o", "q", "v", "wi", "wo"],
    }
)

# (IA)^3: keys, values, and the feed-forward layer whose input is scaled.
IA3_TARGETS: Targets = _table(
    {
        "bart phi": ["q_proj", "v_proj", "fc2"],
        "bert roberta": ["key", "value", "output.dense"],
        "bloom": ["query_key_value", "mlp.dense_4h_to_h"],
        "deberta": ["in_proj", "output.dense"],
        "deberta-v2": ["key_proj", "value_proj", "output.dense"],
        "falcon gpt_neox RefinedWeb RefinedWebModel": ["query_key_value", "dense_4h_to_h"],
        "gemma gemma2 gemma3_text llama4 qwen2 qwen3": ["q_proj", "v_proj", "down_proj"],
        "gpt2 gpt_bigcode": ["c_attn", "mlp.c_proj"],
        "gpt_neo": ["q_proj", "v_proj", "c_proj"],
        "gptj": ["q_proj", "v_proj", "fc_out"],
        "llama mistral": ["k_proj", "v_proj", "down_proj"],
        "mixtral": ["k_proj", "v_proj", "w2"],
        "mt5": ["k", "v", "wi_1"],
        "opt": ["q_proj", "k_proj", "fc2"],
        "t5": ["k", "v", "wo"],
    }
)

# mt5 has none: the gate of its feed-forward is scaled like a key.
IA3_FEEDFORWARD: dict[str, list[str]] = {
    model: [] if model == "mt5" else list(targets[-1:]) for model, targets in IA3_TARGETS.items()
}
