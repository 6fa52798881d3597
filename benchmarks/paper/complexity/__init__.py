"""What statistics cost against the paper's orders: time and memory of A, B and a step, both approximations."""
