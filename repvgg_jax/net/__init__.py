"""What a RepVGG is: its variants, branches, blocks, fusion, and the walk through its deploy form."""
