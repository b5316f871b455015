"""Test sets that are shifted from the data a network was trained on."""
