"""Text to token files: a job cut into blocks, workers that tokenize them, and part files joined in order."""
