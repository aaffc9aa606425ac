"""What to train for. An `Objective` is its examples, its weight, and a loss. `tokenpaths.training` has all of them."""
