"""The loop and its observers."""
