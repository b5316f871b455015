"""Networks: one family per file, with its `PAPER` and its table `VARIANTS`.

`registry` finds a network by its name. `fields` checks the values of its fields.
"""
