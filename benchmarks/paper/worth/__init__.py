"""What a layer's factors are worth as a preconditioner, beside how close they are to its curvature."""
