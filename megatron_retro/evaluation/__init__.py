"""Measures trained models: perplexity and leakage, question and summary sets."""
