"""The model card of a saved adapter: the metadata that the hub and transformers read."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from inlay.config import FORMAT_VERSION, PeftConfig, TaskType
from inlay.errors import UnwritableError

NAME = "README.md"
_PIPELINES = {TaskType.CAUSAL_LM: "text-generation", TaskType.SEQ_2_SEQ_LM: "text2text-generation"}

_BODY = """
# An adapter

Base model: {base}. Method: {method}. Load it with

```python
import inlay
model = inlay.PeftModel.from_pretrained(base_model, "path or id of this adapter")
```

### Framework versions

- PEFT {version}
"""


def text(directory: Path, config: PeftConfig, model: nn.Module) -> str:
    """The card's text: of the one in ``directory`` with its metadata brought up to date, or a new one.

    Args:
        directory (`Path`): Where the adapter is saved.
        config (`PeftConfig`): The adapter's config.
        model (`nn.Module`): The adapted model.

    Raises:
        UnwritableError: What stands there as ``README.md`` is no text file.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = directory / NAME
    method = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    base = config.base_model_name_or_path
    try:
        card = ModelCard.load(path) if path.is_file() else None
    except (UnicodeDecodeError, ValueError) as error:
        raise UnwritableError(f"{path} is no model card to update ({error}): move it away.") from error
    if card is None and path.exists():
        raise UnwritableError(f"{path} is not a file: move it away.")
    data = card.data if card is not None else ModelCardData()
    data["library_name"] = "peft"
    tags = list(data.get("tags") or [])
    library = type(model).__module__.partition(".")[0]
    new = [f"base_model:adapter:{base}" if base else None, method, library if library == "transformers" else None]
    new += getattr(model, "model_tags", None) or []
    data["tags"] = sorted({*tags, *(t for t in new if t)})
    if base:
        data["base_model"] = base
    if config.task_type in _PIPELINES and "pipeline_tag" not in data.to_dict():
        data["pipeline_tag"] = _PIPELINES[TaskType(config.task_type)]
    if card is None:
        body = _BODY.format(base=f"`{base}`" if base else "not named", method=method, version=FORMAT_VERSION)
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")
    return str(card)
