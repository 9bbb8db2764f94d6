"""Files of tokens, chunks and neighbours, and the order in which a run reads them."""
