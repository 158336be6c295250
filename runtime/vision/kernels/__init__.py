"""The steps of a vision layer as fused kernels: Triton on a GPU, plain torch everywhere else.

`PlainForms` states every step and is the oracle; `TritonForms` overrides all of them.
"""
