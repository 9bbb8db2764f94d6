"""State of a run on disk, on any layout."""
