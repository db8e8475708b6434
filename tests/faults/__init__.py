"""Faults put in on purpose: every file operation of whole small runs, crash states, damaged files, values of any kind."""
