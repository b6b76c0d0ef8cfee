"""How `jaxattn.einsum` computes an equation: a file for each way, with a record of it."""
