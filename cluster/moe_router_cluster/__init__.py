"""Training across Ray actors. The only package here that imports Ray.

One run, from the command down: `cli` reads the config, `train` opens the run folder and Ray,
`supervisor` drives a `shard_group` of `expert_shard` actors and replaces the lost, `finish` writes
the sample, the summary and the report.
"""
