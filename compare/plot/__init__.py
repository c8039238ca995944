"""The curves of runs, and pictures of them."""
