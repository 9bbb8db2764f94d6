"""Who starts, restarts and scales the workers of `preprocess` and `build-retrieval`; files alone say what is done."""
