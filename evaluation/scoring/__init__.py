"""Answer lines to scores, by the rules of Megatron-LM's evaluators (examples/multimodal)."""
