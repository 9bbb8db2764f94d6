"""Studies: grids of runs over configuration fields, and what they say side by side."""
