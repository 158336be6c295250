"""Benchmarks: physical quantities for people, one line of JSON last for machines."""
