"""The PyTorch part of mnist_vit."""
