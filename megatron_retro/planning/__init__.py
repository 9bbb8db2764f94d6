"""What a run would cost before it is started: memory, time, communication, balance, money, and whether it fits.

Arithmetic over configurations, held to reality by tests: parameters against the built model, memory against real runs,
the cut against exhaustive search. `shards.py` builds the real shards on the meta device under a fake process group.
"""
