"""The tasks that policies are trained on: their data, their tools, and the official metric of each."""
