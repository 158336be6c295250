"""The small NVLM-D of models/nvlm-d-tiny: its tokenizer, training data, training and evaluation.

docs/tiny_model.md describes all. In order of use: `fonts` and `words` name what is drawn, `scene`
draws random scenes as numbers, `compositor` turns them into pixels on the GPU, `train` trains,
`evaluation` draws held-out pictures with Pillow, which shares no code with the compositor.
"""
