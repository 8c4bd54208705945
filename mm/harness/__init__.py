"""Our models inside other people's evaluation harnesses: lmms-eval and lm-eval. Neither is needed by anything else."""
