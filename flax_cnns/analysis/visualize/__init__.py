"""Images that a network's units want: feature visualization and DeepDream."""
