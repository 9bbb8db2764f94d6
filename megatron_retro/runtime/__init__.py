"""What every program needs while it runs: console, events, worker numbers, processes, seeds, signals."""
