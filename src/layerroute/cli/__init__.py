"""The command line: one verb is one function; parse once, call down once."""
