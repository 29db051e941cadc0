"""Train a model on one rank of a group, without Ray."""
