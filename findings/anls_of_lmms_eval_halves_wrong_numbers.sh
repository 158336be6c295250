#!/usr/bin/env bash
# lmms-eval's ANLS gives half a point to wrong two-digit numbers and years; the paper's formula gives 0.
#
# ANLS scores DocVQA and InfoVQA: 1 minus edit distance over the longer length, or 0 beyond a threshold
# of 0.5. Its paper (Biten et al., arXiv 1905.13648) wants the distance's share below 0.5, while the
# competition's description keeps a similarity of 0.5 (metric card in pull request 413 of evaluate).
# That sounds like one case in thousands. With numbers it is common: one wrong digit of two, two of
# four in a year, one digit of two missing. lmms-eval goes by the latter, the package anls by the former.
# Second: lmms-eval takes the distance of texts whose runs of white space are one space, but the length
# of the texts before that. So columns' spaces or empty lines lift an answer that is all wrong. Another
# harness corrected the same in pull request 1649 of evalscope.
# A good engineer expects one number of one metric, and that white space which is ignored is ignored.
# Seen with lmms-eval 0.7.3 and anls 0.0.2. Only what importing lmms-eval's metrics takes is installed.
# Exits with 1 once one of these scores changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
pip="env/bin/python -m pip install --quiet --disable-pip-version-check"
$pip torch==2.13.0 transformers==5.23.0 evaluate==0.4.6 sacrebleu==2.6.0 loguru==0.7.3 pytz==2026.6 \
    numpy==2.4.0 2>/dev/null
$pip --no-deps lmms-eval==0.7.3 anls==0.0.2 2>/dev/null

cat >score.py <<'P'
import sys
from importlib.metadata import version

from anls import anls_score
from lmms_eval.api.metrics import anls

ROWS = [  # answer, truth, score by lmms-eval, by anls
    ("13", "13", 1.0, 1.0),
    ("Jon Smith", "John Smith", 0.9, 0.9),
    ("12", "13", 0.5, 0.0),
    ("7", "17", 0.5, 0.0),
    ("1998", "1987", 0.5, 0.0),
    ("blue", "black", 0.0, 0.0),
    ("24 37", "51 68", 0.0, 0.0),
    ("24      37", "51 68", 0.6, 0.0),
    ("24\n\n\n\n\n\n37", "51 68", 0.6, 0.0),
]
print("lmms-eval", version("lmms-eval"), "anls", version("anls"))
print(f"{'answer':>18} {'truth':>12}  lmms-eval  anls")
changed = False
for answer, truth, recorded, other in ROWS:
    # As its tasks call it: all truths, and a list of one answer.
    found, expected = anls([truth], [answer])["anls"], anls_score(answer, [truth])
    print(f"{answer!r:>18} {truth!r:>12}  {found:9.2f}  {expected:4.2f}")
    changed |= abs(found - recorded) > 1e-6 or abs(expected - other) > 1e-6
print("CHANGED" if changed else "as recorded")
sys.exit(changed)
P
env/bin/python -W ignore score.py
