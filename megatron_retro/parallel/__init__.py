"""The cut of a model over processes."""
