"""Saving, resuming and surgical loading. Only `manager` touches Orbax."""
