"""Reads and checks an engine directory."""
