"""Images to which a network's units respond strongly: feature visualization and DeepDream."""
