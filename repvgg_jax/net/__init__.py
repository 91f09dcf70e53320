"""The RepVGG network: variants, branches, blocks, fusion, and the walk through the deploy form."""
