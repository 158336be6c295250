"""The model card's benchmarks: data sets to answer lines, answer lines to scores and a report."""
