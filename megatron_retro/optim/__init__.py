"""Optimizer, schedule, clipping."""
