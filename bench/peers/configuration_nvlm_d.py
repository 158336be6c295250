"""What a reader of transformers' configurations needs for NVLM-D, in place of NVIDIA's own file."""

from typing import Any

from transformers import PretrainedConfig, Qwen2Config


class NVLM_D_Config(PretrainedConfig):  # type: ignore[no-untyped-call]  # noqa: N801
    """Vision and text sections; the text's stale model_type gives way to Qwen2's."""

    model_type = "NVLM_D"
    has_no_defaults_at_init = True

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        llm_config: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        defaults: dict[str, Any] = {
            "initializer_factor": 0.1,
            "initializer_range": 0.02,
            "attention_dropout": 0.0,
            "dropout": 0.0,
            "drop_path_rate": 0.0,
        }
        self.vision_config = PretrainedConfig(**{**defaults, **(vision_config or {})})
        text = {key: value for key, value in (llm_config or {}).items() if key != "model_type"}
        self.text_config = self.llm_config = Qwen2Config(**text)
        super().__init__(**others)

    def get_text_config(self, *_: Any, **__: Any) -> Qwen2Config:
        return self.text_config
