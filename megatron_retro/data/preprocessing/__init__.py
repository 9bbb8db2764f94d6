"""Text to token files: a plan of byte ranges, workers that tokenize them, and their pieces put together in order."""
