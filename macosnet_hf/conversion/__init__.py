"""Published checkpoints to ours and back, and the network as one graph file."""
