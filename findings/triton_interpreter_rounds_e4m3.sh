#!/bin/bash
# Triton's interpreter halves or zeroes some numbers that it rounds to e4m3.
#
# With TRITON_INTERPRET=1 a kernel runs on a CPU, in numpy, and so is tested without a GPU. A cast
# from float32 to float8e4nv is done there by hand. Where rounding carries into the exponent, the
# carry is or-ed in instead of added. It is lost where the exponent is odd: 1.9375 becomes 1 instead
# of 2, and 127 becomes 64 instead of 128. Of two neighbours as near as each other it takes the one
# away from zero, where IEEE 754 and every GPU take the even one. NaN becomes 384. What is above 448
# becomes NaN or, at 500, 256; a GPU saturates at 448, and torch's column is clamped. So a test of an
# FP8 kernel fails in the interpreter where the kernel is right, by up to half the value.
# Seen with Triton 3.6.0. Upstream: issue 8322, pull requests 9808 and 11897, open in September 2026.
# Exits with 1 once the interpreter rounds as torch does.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==1.26.4
env/bin/python -m pip install --quiet --disable-pip-version-check --no-deps triton==3.6.0

cat >rounds.py <<'P'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def to_e4m3(x, y, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    tl.store(y + place, tl.load(x + place).to(tl.float8e4nv))


x = torch.tensor([1.0, 1.9375, 127.0, 1.0625, 250.0, 464.0, 500.0, float("nan")])
found = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
to_e4m3[(1,)](x, found, COUNT=len(x))
found, expected = found.float(), x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
print(f"Triton {triton.__version__}: float32, e4m3 in the interpreter, e4m3 by torch")
for row in zip(x.tolist(), found.tolist(), expected.tolist()):
    print("%9g %9g %9g" % row)
sys.exit(found[1:4].tolist() != [1.0, 64.0, 1.125] or bool(found[7].isnan()))
P
TRITON_INTERPRET=1 env/bin/python rounds.py
