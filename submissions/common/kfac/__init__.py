"""What the K-FAC submissions share: everything but the approximation and the point."""
