"""Speed and memory against stated targets; never part of the tests."""
