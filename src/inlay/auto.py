"""Loads base model and adapter in one call, from what the adapter's config says of its base."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from inlay import sources
from inlay.config import PeftConfig, TaskType
from inlay.errors import ConfigError, PeftError
from inlay.formats.peft import DEFAULT_ADAPTER
from inlay.model import PeftModel

# Libraries whose model classes `auto_mapping` in a file may name. Nothing else that a file names is ever imported.
DEFAULT_ALLOWLIST = ("diffusers", "transformers")


def get_default_import_allowlist() -> list[str]:
    """The libraries whose classes ``auto_mapping`` in a file may name."""
    return list(DEFAULT_ALLOWLIST)


def check_import_allowlist(allowlist: Sequence[str], parent_name: str) -> bool:
    """Whether a library, or a module inside it, is on a list.

    Example:
        >>> check_import_allowlist(["transformers"], "transformers.models"), check_import_allowlist(["os"], "ospath")
        (True, False)
    """
    return any(parent_name == name or parent_name.startswith(f"{name}.") for name in allowlist)


class AutoNotConstructibleError(PeftError, OSError):
    """An Auto class was called; it is loaded with ``from_pretrained``."""


class AutoPeftModel:
    """A base model with a saved adapter on it, of the class that the adapter's config asks for.

    Example:
        ```python
        model = inlay.AutoPeftModelForCausalLM.from_pretrained("path/of/adapter")
        ```
    """

    task: ClassVar[TaskType | None] = None
    auto_class: ClassVar[str | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise AutoNotConstructibleError(
            f"{name} is designed to be instantiated using the `{name}.from_pretrained(path_or_id)`."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = DEFAULT_ADAPTER,
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Loads the base that the adapter names, then the adapter.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): The adapter's directory, or its id on the hub.
            adapter_name (`str`, *optional*, defaults to `"default"`): What to call it here.
            is_trainable (`bool`, *optional*, defaults to `False`): Whether to train it on.
            config (`PeftConfig`, *optional*): Stands in for the file's.
            revision (`str`, *optional*): Revision of the adapter.
            import_allowlist (`list[str]`, *optional*): Libraries that `auto_mapping` may name; diffusers and
                transformers if not given.
            kwargs: For the base model's and the adapter's ``from_pretrained``.

        Raises:
            ConfigError: The adapter names no base, is of another task, or names a library that is not allowed.
        """
        hub = {k: v for k, v in kwargs.items() if k in sources.HUB_ARGUMENTS}
        hub |= {"revision": revision, "subfolder": kwargs.pop("subfolder", None)}
        own = config or PeftConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        base_cls = cls._base_class(own, tuple(import_allowlist or DEFAULT_ALLOWLIST))
        if not own.base_model_name_or_path:
            raise ConfigError(
                f"The adapter at {pretrained_model_name_or_path} names no base model: load the base yourself."
            )
        base = base_cls.from_pretrained(own.base_model_name_or_path, revision=own.revision, **kwargs)
        _fit_embeddings(base, pretrained_model_name_or_path)
        return PeftModel.from_pretrained(base, pretrained_model_name_or_path, adapter_name, is_trainable, **hub)

    @classmethod
    def _base_class(cls, config: PeftConfig, allowed: tuple[str, ...]) -> Any:
        if cls.task is not None and config.task_type is not None and config.task_type != cls.task:
            task = getattr(config.task_type, "value", config.task_type)
            raise ConfigError(
                f"Expected target PEFT class: that of {task}, but {cls.__name__} loads {cls.task.value}."
            )
        if (auto_class := cls.auto_class or _BY_TASK.get(config.task_type)) is not None:
            import transformers

            return getattr(transformers, auto_class)
        mapping = config.auto_mapping or {}
        library, name = str(mapping.get("parent_library", "")), str(mapping.get("base_model_class", ""))
        if not check_import_allowlist(allowed, library) or not name.isidentifier():
            raise ConfigError(
                f"The auto mapping wants to import the class {name!r} of {library!r}, which is not in the import "
                f"allowlist: only classes of {', '.join(allowed)} are loaded for a file. Load the base yourself, or "
                "pass import_allowlist if you trust the file."
            )
        return getattr(importlib.import_module(library.partition(".")[0]), name)


def _fit_embeddings(base: Any, directory: str | Path) -> None:
    """Resizes the base's embeddings where a larger tokenizer was saved beside the adapter."""
    if (Path(directory) / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        embeddings = base.get_input_embeddings()
        if len(tokenizer) > embeddings.num_embeddings:
            base.resize_token_embeddings(len(tokenizer))


class AutoPeftModelForCausalLM(AutoPeftModel):
    """A causal language model with a saved adapter."""

    task, auto_class = TaskType.CAUSAL_LM, "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """An encoder-decoder with a saved adapter."""

    task, auto_class = TaskType.SEQ_2_SEQ_LM, "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """A sequence classifier with a saved adapter."""

    task, auto_class = TaskType.SEQ_CLS, "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """A token classifier with a saved adapter."""

    task, auto_class = TaskType.TOKEN_CLS, "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """A span predictor with a saved adapter."""

    task, auto_class = TaskType.QUESTION_ANS, "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """An encoder with a saved adapter."""

    task, auto_class = TaskType.FEATURE_EXTRACTION, "AutoModel"


# what is loaded where the class asks for no task and the adapter names one
_BY_TASK: dict[str | None, str | None] = {cls.task: cls.auto_class for cls in AutoPeftModel.__subclasses__()}
