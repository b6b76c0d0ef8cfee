"""How attention over windows is computed: each module here is one way, on the same operands and options."""
