"""Pictures and tables of what a network sees. Each module holds some kinds of `visualize`."""
