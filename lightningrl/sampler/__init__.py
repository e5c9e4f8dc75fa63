"""Sampling from the policy: fixed slots, continuous batching, the same tokens whatever else is running."""
