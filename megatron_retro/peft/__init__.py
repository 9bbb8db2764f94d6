"""Parameter-efficient tuning: small modules beside the frozen ones, attached to a finished model by hooks.

The base keeps its parameter names, so its checkpoints load as ever; what is added has names of its own below them.
"""
