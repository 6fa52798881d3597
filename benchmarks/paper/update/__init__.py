"""One update of a wide residual network by batch size: first order, K-FAC-expand, K-FAC-reduce."""
