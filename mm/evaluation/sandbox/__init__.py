"""Runs programs that a model wrote, so that they can harm nothing: see `mm.evaluation.sandbox.run`."""
