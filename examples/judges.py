"""Three judges over one long document: they share what the base model has read, and each adds a few tokens.

    python examples/judges.py

The model is small and random, so its verdicts mean nothing; the times are what it is about.
"""

from __future__ import annotations

import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import inlay

JUDGES = {"safe": [500, 501], "relevant": [500, 502], "true": [500, 503]}  # name -> the tokens that call it
YES, NO = 10, 11

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8,
    max_position_embeddings=4096,
)  # fmt: skip
document = torch.randint(20, 500, (2048,))

# A judge is a LoRA that acts from its invocation on. Before it, keys and values are the base model's.
model = None
for name, tokens in JUDGES.items():
    judge = inlay.LoraConfig(r=16, target_modules="all-linear", alora_invocation_tokens=tokens, task_type="CAUSAL_LM")
    if model is None:
        model = inlay.get_peft_model(LlamaForCausalLM(config), judge, name)
    else:
        model.add_adapter(name, judge)
assert model is not None
model.eval()


def seconds(since: float) -> str:
    return f"{time.perf_counter() - since:6.2f} s"


start = time.perf_counter()
session = model.session(document)
session.prefill()
print(f"{seconds(start)}  the base reads {len(document)} tokens, once")

for name, tokens in JUDGES.items():
    start = time.perf_counter()
    branch = session.fork()  # shares the document's keys and values
    branch.extend(tokens)
    logits = branch.logits(name)
    verdict = "yes" if logits[YES] > logits[NO] else "no"
    turn = branch.turns[-1]
    print(f"{seconds(start)}  {name}? {verdict}: {turn.prefilled} tokens computed, {turn.reused} shared")

for name, tokens in JUDGES.items():
    start = time.perf_counter()
    with model.use_adapter(name), torch.no_grad():
        model(torch.cat([document, torch.tensor(tokens)])[None], logits_to_keep=1)
    print(f"{seconds(start)}  {name}, without a session")
