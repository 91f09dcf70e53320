"""Fine-tuning on your own photographs: see the commands in `README.md` next to this file."""
