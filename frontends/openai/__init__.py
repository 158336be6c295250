"""The HTTP door: OpenAI's chat completions, and what their clients ask beside them."""
