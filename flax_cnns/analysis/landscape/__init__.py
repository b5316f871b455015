"""The loss around trained parameters: planes, lines, trajectories, curvature, sharpness."""
