"""Report on a weight file as an HTML page: `python -m repvgg_jax show`.

`collect` computes the facts (`facts`), and `page` writes them as HTML (`sections`, `charts`, `markup`).
"""
