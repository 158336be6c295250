#!/usr/bin/env bash
# safetensors.numpy of 0.8.0 saves a transposed array with its values in other places.
#
# The file says the array's shape and dtype, which are right, but its bytes are those that lie in
# memory. A transposed weight lies there column by column, and the reader takes it row by row: same
# shape, same set of values, other places. Neither save nor load says anything. A good engineer
# expects the values back, as 0.7.0 gives them, or an error, as safetensors.torch gives for the same
# view. The documentation asks for "contiguous and dense" arrays; NumPy itself calls a transposed
# array contiguous (flags.f_contiguous, and flags.forc is true).
# Seen with safetensors 0.8.0 and numpy 1.26.4. Upstream: issue 825 of safetensors.
# numpy.ascontiguousarray before saving helps. Exits with 1 once 0.8.0 gives the values back.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
pip="env/bin/python -m pip install --quiet --disable-pip-version-check"
$pip numpy==1.26.4 2>/dev/null
for version in 0.7.0 0.8.0; do
  $pip --no-deps --target "$version" "safetensors==$version" 2>/dev/null
done

cat >save.py <<'P'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

weight = np.arange(6, dtype=np.float32).reshape(2, 3)
save_file({"weight": weight.T, "copy": np.ascontiguousarray(weight.T)}, "weight.safetensors")
found = load_file("weight.safetensors")
is_right = np.array_equal(found["weight"], weight.T)
print("safetensors", safetensors.__version__, "numpy", np.__version__)
print("  NumPy calls it contiguous, by rows or by columns:", weight.T.flags.forc)
print("  saved", weight.T.tolist())
print("  read ", found["weight"].tolist(), "right" if is_right else "WRONG")
assert found["weight"].shape == weight.T.shape
assert sorted(found["weight"].flat) == sorted(weight.flat), "not even the same values"
assert np.array_equal(found["copy"], weight.T), "a copy by rows is wrong too"
sys.exit(0 if is_right else 3)
P
code=0
PYTHONPATH=0.7.0 env/bin/python save.py || code=$?
[ "$code" = 0 ] || { echo "CHANGED: 0.7.0 is wrong too"; exit 1; }
PYTHONPATH=0.8.0 env/bin/python save.py || code=$?
[ "$code" = 3 ] || { echo "CHANGED"; exit 1; }
echo "as recorded"
