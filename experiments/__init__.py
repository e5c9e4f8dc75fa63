"""One file per experiment: a frozen `Config` dataclass and an absl `main`; the agents they train are in `agents/`."""
