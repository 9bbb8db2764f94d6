"""From a chunk database to neighbour tables: vectors, index, search, quality.

`stages.py` runs a build: `build_estimate.py`, `index_training.py` and `index_building.py` make the index,
`neighbor_search.py` fills tables, `quality.py` says how good they are. A trainer never imports this package: it maps
tables. faiss and transformers are imported where they are used.
"""
