"""The benchmarks' published files, read into samples: one file per format."""
