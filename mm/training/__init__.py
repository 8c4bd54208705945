"""Training: the LightningModule, optimizers, callbacks and the `mm fit | validate | test | predict` command line."""
