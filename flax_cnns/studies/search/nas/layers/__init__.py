"""The search of 2016 in small: layers of different filters and skips, chosen by the controller."""
