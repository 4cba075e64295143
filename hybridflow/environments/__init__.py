"""Episodes: the policy and an environment take turns, on the engine that runs. `docs/environments.md` is the way in."""
