"""Benchmarks: one file each, from the authors' files to questions, references and the official aggregate."""
