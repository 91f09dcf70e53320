"""Fine-tuning on your own photographs: `README.md` beside this file has the commands."""
