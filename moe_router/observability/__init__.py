"""What a run tells the world: rows of metrics, routing traces, reports."""
