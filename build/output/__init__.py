"""Writes to disk: directories that appear whole or not at all, safetensors files in pieces."""
