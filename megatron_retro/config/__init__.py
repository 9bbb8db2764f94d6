"""Configuration: frozen data, cheap to read, no torch.

One file per section; `settings.py` holds the sections of one run together, `command_line.py` and
`toml_files.py` fill them, `checks.py` reports every broken rule at once. A field's name is its flag
(`num_layers` is `--num-layers`) and its TOML key, and is unique over all sections.
"""
