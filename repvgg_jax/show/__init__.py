"""`python -m repvgg_jax show`: a report on a weight file as one HTML page.

`collect` computes the facts (`facts`), and `page` writes them as HTML (`sections`, `charts`, `markup`).
"""
