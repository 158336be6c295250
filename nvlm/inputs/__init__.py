"""From a question and pictures to token ids and tiles.

In `nvlm` because calibration (build) and answering (runtime) must see the same inputs.
"""
