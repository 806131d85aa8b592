"""Every op in plain PyTorch: the oracle of the tests, and what runs without a GPU."""
