"""The Python face of `csrc/`: operators with a reference in plain PyTorch, chosen once at start."""
