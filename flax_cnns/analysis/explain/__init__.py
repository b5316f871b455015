"""Look inside a network: features, class activation maps, gradients, other backward rules."""
