"""The pictures, and the one style that they share."""
