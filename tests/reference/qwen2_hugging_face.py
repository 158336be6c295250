"""Oracle of the decoder: transformers' own Qwen2ForCausalLM with the NVLM-D weights.

In: a `model_dir` (Hugging Face layout). Out: a torch module on the CPU, its greedy tokens and
logits. It knows neither TensorRT-LLM's layout nor FP8. Source: config.json and modeling_nvlm_d.py
of nvidia/NVLM-D-72B. rope_scaling is dropped, by the numerics contract; llm_config's model_type
"llama" is stale.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from .safetensors_numpy import read_config, read_weights

# What Qwen2 reads of llm_config; attention_bias, mlp_bias and the generation leftovers it does not.
_CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
)


def load(
    model_dir: Path,
    *,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    attention: str = "eager",
) -> Qwen2ForCausalLM:
    """The decoder in `dtype`; `weight_dtype` rounds the stored weights first (torch.bfloat16)."""
    stored = read_config(model_dir)["llm_config"]
    assert stored["architectures"] == ["Qwen2ForCausalLM"], stored["architectures"]
    theta = float(stored["rope_theta"])
    config = Qwen2Config(
        **{key: stored[key] for key in _CONFIG_KEYS},
        tie_word_embeddings=False,
        rope_theta=theta,  # transformers 4
        rope_parameters={"rope_type": "default", "rope_theta": theta},  # transformers 5
        attn_implementation=attention,
    )
    model = Qwen2ForCausalLM(config).to(dtype)
    weights = read_weights(model_dir, "language_model.", weight_dtype)
    state = {name: torch.from_numpy(values).to(dtype) for name, values in weights.items()}
    model.load_state_dict(state, strict=True)
    _restore_rope(model, theta)
    return model.eval()


def _restore_rope(model: Qwen2ForCausalLM, theta: float) -> None:
    """Checks that theta was honoured and undoes the rounding of inv_freq by `.to(dtype)`."""
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    frequencies = torch.tensor([theta ** (-2 * i / head_dim) for i in range(head_dim // 2)])
    rope = model.model.rotary_emb
    torch.testing.assert_close(rope.inv_freq.float(), frequencies, rtol=0.01, atol=0.0)
    rope.inv_freq = rope.original_inv_freq = frequencies


def embed(
    model: Qwen2ForCausalLM,
    token_ids: list[int],
    image_token_id: int | None = None,
    image_embeddings: torch.Tensor | np.ndarray | None = None,
) -> torch.Tensor:
    """[1, num_tokens, hidden]: the positions equal to `image_token_id` overwritten in order.

    image_embeddings: [..., hidden], flattened to rows as generate() of modeling_nvlm_d.py
    does.
    """
    ids = torch.tensor(token_ids)
    embeds = model.get_input_embeddings().weight.detach()[ids]  # a copy
    if image_embeddings is not None:
        rows = torch.as_tensor(image_embeddings).reshape(-1, embeds.shape[-1]).to(embeds.dtype)
        positions = (ids == image_token_id).nonzero()[:, 0]
        assert len(positions) == len(rows), f"{len(positions)} positions, {len(rows)} embeddings"
        embeds[positions] = rows
    return embeds[None]


@torch.inference_mode()
def greedy(
    model: Qwen2ForCausalLM, inputs_embeds: torch.Tensor, num_steps: int
) -> tuple[list[int], torch.Tensor]:
    """(token ids, logits [num_steps, vocab] float32); row i chose token i. Never stops at the eos.

    inputs_embeds: [1, num_tokens, hidden].
    """
    token_ids: list[int] = []
    rows: list[torch.Tensor] = []
    output = model(inputs_embeds=inputs_embeds, use_cache=True, logits_to_keep=1)
    while True:
        rows.append(output.logits[0, -1].float())
        token_ids.append(int(rows[-1].argmax()))
        if len(rows) == num_steps:
            return token_ids, torch.stack(rows)
        output = model(
            input_ids=torch.tensor([token_ids[-1:]]),
            past_key_values=output.past_key_values,
            use_cache=True,
        )


@torch.inference_mode()
def all_logits(
    model: Qwen2ForCausalLM, inputs_embeds: torch.Tensor, *, num_last: int = 0
) -> torch.Tensor:
    """Logits of every position (of the `num_last` last ones), no cache: [num_tokens, vocab]."""
    output = model(inputs_embeds=inputs_embeds, use_cache=False, logits_to_keep=num_last)
    return output.logits[0].float()
