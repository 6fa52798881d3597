"""A U-Net that reconstructs slices of a brain from undersampled k-space: transposed convolutions, L1 loss."""
