"""Configuration: frozen data, cheap to read, no torch.

Sections stand in one file per subject, with the rules between them, which `sections.py` checks all at once.
`settings.py` holds the sections of one run together, `command_line.py` and `toml_files.py` fill them. A field's name
is its flag (`num_layers` is `--num-layers`) and its TOML key, and is unique over all sections.
"""
