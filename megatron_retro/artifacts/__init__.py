"""Files and directories that can be trusted: written whole or not at all, and able to say what they are.

`files.py` writes atomically, `manifest.py` describes and checks, `claims.py` shares blocks of work between any
number of workers.
"""
