"""Asks an engine the questions of a benchmark."""
