#!/bin/bash
# ptxas reads a register before it is written where two e4m3 pairs are used whole and by bytes.
#
# `cvt.rn.satfinite.e4m3x2.f32` makes two bytes of two floats. Here the two pairs are stored as one
# word and as four bytes. ptxas packs the word by one instruction that merges the pairs, and takes
# the first pair from that word. But it shifts that pair's upper byte out of the pair's register
# before the word is copied there. So the second byte is what the register held before. The PTX is
# right, nothing warns, and the word itself is right. Triton 3.6 makes such PTX where it moves FP8
# values between a warp's threads; the channels 1, 5, 9, ... were wrong on an H200.
# Seen with ptxas 12.8.93 and 12.9.86, which the wheel of Triton 3.6.0 has, for sm_90a; not in 13.0.88.
# Triton's own pull request 7933 works around a fault of ptxas in such conversions.
# Needs no GPU: it looks for a register that is read first. Exits with 1 once none is.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check --no-deps triton==3.6.0
bin=$(echo env/lib/python3*/site-packages/triton/backends/nvidia/bin)

cat >pairs.ptx <<'P'
.version 8.7
.target sm_90a
.address_size 64
.visible .entry pairs(.param .u64 floats, .param .u64 word, .param .u64 bytes)
{
  .reg .b64 %rd<4>; .reg .b32 %r<6>; .reg .b16 %rs<5>;
  ld.param.u64 %rd1, [floats]; ld.param.u64 %rd2, [word]; ld.param.u64 %rd3, [bytes];
  ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];
  cvt.rn.satfinite.e4m3x2.f32 %rs1, %r2, %r1;
  cvt.rn.satfinite.e4m3x2.f32 %rs2, %r4, %r3;
  shr.u16 %rs3, %rs1, 8;
  shr.u16 %rs4, %rs2, 8;
  mov.b32 %r5, {%rs1, %rs2};
  st.global.b32 [%rd2], %r5;
  st.global.b8 [%rd3], %rs1;
  st.global.b8 [%rd3+1], %rs3;
  st.global.b8 [%rd3+2], %rs2;
  st.global.b8 [%rd3+3], %rs4;
  ret;
}
P

cat >read_first.py <<'P'
"""Prints the instructions of straight-line code that read a register which nothing wrote before."""
import re, sys

written = {"RZ"}
found = 0
for line in sys.stdin:
    code = re.search(r"/\*[0-9a-f]{4}\*/ +([A-Z0-9_.]+) (.*?) ;", line)
    if not code:
        continue
    name, operands = code[1], code[2].split(", ")
    stores = name.startswith("STG")
    sources = operands if stores else operands[1:]
    read = {r for each in sources for r in re.findall(r"\bR(?:\d+|Z)\b", each)}
    if name == "PRMT":
        read -= {operands[0]}  # it keeps the other half
    if read - written:
        print("reads first:", name, code[2])
        found += 1
    if not stores:
        base = re.fullmatch(r"R(\d+)", operands[0])
        if base:
            wide = 4 if ".128" in name else 2 if ".64" in name else 1
            written |= {f"R{int(base[1]) + i}" for i in range(wide)}
print(found, "instructions read a register that nothing wrote before")
sys.exit(0 if found else 1)
P

for ptxas in ptxas ptxas-blackwell; do
  "$bin/$ptxas" --version | grep -o 'V[0-9.]*$'
  "$bin/$ptxas" -arch=sm_90a -O3 pairs.ptx -o pairs.cubin
  "$bin/nvdisasm" -c pairs.cubin >pairs.sass
  grep -E 'F2FP|LOP3|PRMT|SHF|STG' pairs.sass | sed 's/^ *//'
  env/bin/python read_first.py <pairs.sass
done
echo "the byte at 1 is not the pair's"
