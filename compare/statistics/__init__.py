"""What results of runs prove: intervals, tests, and which question they answer."""
