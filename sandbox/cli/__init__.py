"""The command line: one file per topic; the only place with click, rich and exit codes."""
