"""One family of networks a file, each with its `PAPER` and its table `VARIANTS`.

`registry` knows them by name, `fields` says what their fields may hold.
"""
