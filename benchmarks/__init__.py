"""Measurements: one script per question, each writing CSV rows. Method, columns and commands: benchmarks/README.md."""
