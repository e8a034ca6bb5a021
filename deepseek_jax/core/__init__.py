"""Configs as values: overriding, saving and reading them; knows no neural networks."""
