"""Conversations as training rows: reading, templates, masks, packing, passages for the encoder."""
