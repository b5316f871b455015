"""Architecture search: the LSTM controller of 2016, its space of layers, and cells."""
