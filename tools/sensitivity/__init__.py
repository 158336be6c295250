"""The whole model's answers with one part in FP8 at a time."""
