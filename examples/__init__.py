"""Examples of training, fine-tuning and using RepVGG nets."""
