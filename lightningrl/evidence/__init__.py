"""What the rollouts alone don't say: each producer fills one field of `table.Evidence`."""
