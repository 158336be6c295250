"""Figures of docs/ from the files in bench/results."""
