"""The compiled predictor of a deploy form, and the plans that say how each of its layers is computed."""
