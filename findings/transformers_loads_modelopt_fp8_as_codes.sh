#!/usr/bin/env bash
# transformers loads a ModelOpt FP8 checkpoint without dequantising it: weights are raw e4m3 codes.
#
# Seen with transformers 5.23.0 and torch 2.13.0. A folder in ModelOpt's unified Hugging Face layout
# has `quantization_config` with quant_method "modelopt" and a `weight_scale` beside each weight.
# A good engineer would expect from_pretrained to refuse a method that it does not know, or to apply
# the scales. It warns in the log, casts the codes to the model's dtype and leaves the scales out:
# weights are hundreds of times too large, and the model answers nonsense without any error.
# The same weights as compressed-tensors ("float-quantized", with that package) are read rightly.
# Source: https://huggingface.co/docs/transformers/main/en/main_classes/quantization (lists no
# modelopt); `python -c "from transformers.quantizers import auto; print(auto.AUTO_QUANTIZER_MAPPING)"`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 'numpy<2' 2>/dev/null
cd "$folder"
cat > load.py <<'PY'
import json, sys

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
config = Qwen2Config(vocab_size=64, num_key_value_heads=2, tie_word_embeddings=False, **sizes)
model = Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
model.save_pretrained("plain")
name = "model.layers.0.mlp.down_proj.weight"
state = {key: value.clone() for key, value in model.state_dict().items()}
true = state[name].float()
scale = true.abs().max() / 448
state[name] = (true / scale).to(torch.float8_e4m3fn)
state["model.layers.0.mlp.down_proj.weight_scale"] = scale
state["model.layers.0.mlp.down_proj.input_scale"] = torch.tensor(1.0)
numbers = {"dynamic": False, "num_bits": 8, "type": "float"}
group = {"weights": numbers, "input_activations": numbers, "targets": ["Linear"]}
values = json.load(open("plain/config.json"))
values["quantization_config"] = {
    "quant_method": "modelopt", "quant_algo": "FP8", "config_groups": {"group_0": group}, "ignore": []
}
import os
os.mkdir("fp8")
json.dump(values, open("fp8/config.json", "w"))
save_file(state, "fp8/model.safetensors", {"format": "pt"})
found = AutoModelForCausalLM.from_pretrained("fp8").state_dict()[name]
ratio = float(found.float().abs().max() / true.abs().max())
print("transformers", transformers.__version__, "torch", torch.__version__)
print(f"loaded as {found.dtype}, largest weight {float(found.float().abs().max()):.0f}, true {true.abs().max():.3f}")
print(f"{ratio:.0f} times the true weight; 1 / scale is {float(1 / scale):.0f}")
surprising = abs(ratio * float(scale) - 1) < 0.05
print("as recorded" if surprising else "CHANGED")
sys.exit(0 if surprising else 1)
PY
"$folder/venv/bin/python" load.py 2>&1
