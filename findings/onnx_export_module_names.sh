#!/usr/bin/env bash
# torch.onnx.export (dynamo=True) writes the dotted names of your Python modules into the ONNX file.
#
# Seen with torch 2.13.0 and onnxscript 0.7.2. Every node gets metadata properties such as
# pkg.torch.onnx.class_hierarchy and pkg.torch.onnx.stack_trace. They hold the module path of each
# layer's class. A good engineer would expect two exports of one network to be equal; move the class
# to another file, and the bytes and the size change though the graph computes the same. A build
# that hashes its artefacts then takes a renamed file for another model.
# verbose=False and the default arguments keep them; clearing node.metadata_props of the program's
# model before saving makes the files equal.
# Source: https://docs.pytorch.org/docs/stable/onnx_export.html (says nothing of it).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 'numpy<2' 2>/dev/null
cd "$folder"
for name in short a_much_longer_name_of_a_module; do
  cat > "$name.py" <<'PY'
import torch


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).relu()
PY
done
cat > export.py <<'PY'
import hashlib, importlib, logging, sys, warnings
import onnxscript, torch

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")


def export(name, clear):
    torch.manual_seed(0)
    layer = importlib.import_module(name).Layer().eval()
    program = torch.onnx.export(layer, (torch.ones(2, 4),), dynamo=True, verbose=False)
    if clear:
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()
    program.save(f"{name}.onnx")
    data = open(f"{name}.onnx", "rb").read()
    return len(data), hashlib.sha256(data).hexdigest()[:12], name.encode() in data


names = ("short", "a_much_longer_name_of_a_module")
print("torch", torch.__version__, "onnxscript", onnxscript.__version__)
as_it_is = [export(name, clear=False) for name in names]
cleared = [export(name, clear=True) for name in names]
for title, rows in (("as exported", as_it_is), ("metadata cleared", cleared)):
    for name, (size, digest, has_name) in zip(names, rows):
        print(f"{title}: {name}: {size} bytes, {digest}, holds the module's name: {has_name}")
surprising = all(row[2] for row in as_it_is) and as_it_is[0] != as_it_is[1] and cleared[0] == cleared[1]
print("as recorded" if surprising else "CHANGED")
sys.exit(0 if surprising else 1)
PY
"$folder/venv/bin/python" export.py
