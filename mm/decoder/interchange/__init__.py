"""Other people's checkpoints: reading their settings and tensors, and writing them again. See mm.decoder.families."""
