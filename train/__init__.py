"""Training and evaluation of RepVGG nets: data, recipes, the training loop and its commands."""
