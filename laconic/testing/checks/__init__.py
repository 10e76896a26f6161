"""The contracts: one module per kind, one function per promise."""
