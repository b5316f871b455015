"""Saving, resuming and surgical loading. Only `reading` and `manager` touch Orbax."""
