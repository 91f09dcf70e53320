"""`python -m repvgg_jax show`: what a weight file holds and does, on one page of HTML.

`collect` finds the facts (`facts`), `page` writes them as HTML (`sections`, `charts`, `markup`).
"""
