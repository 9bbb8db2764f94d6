"""The command line: a table of verbs, and the entry that turns errors into messages and exit codes."""
