"""How a convolution is computed, in deployment and in training; nothing here knows a net."""
