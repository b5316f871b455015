"""Saving, resuming and grafting. Only `reading` and `manager` use Orbax."""
