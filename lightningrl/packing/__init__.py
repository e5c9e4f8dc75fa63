"""Transitions -> rows of tries of fixed shape, and the edge list that says where each action token's log-prob is read."""
