"""Step 1: from a model directory to a TensorRT-LLM checkpoint directory."""
