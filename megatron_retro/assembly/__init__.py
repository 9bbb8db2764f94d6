"""Where a model meets parallelism and a run is built."""
