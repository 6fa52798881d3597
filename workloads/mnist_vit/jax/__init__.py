"""The JAX part of mnist_vit."""
