"""Surgical loading: rules decide where each leaf comes from, or leave it fresh."""
