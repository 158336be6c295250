"""Checkpoints that other engines load: folders in Hugging Face's layout, quantised."""
