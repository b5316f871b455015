"""Processes: starting several, leaving in time, what they print and compile."""
