"""What nesjax costs: timings, and what XLA makes of it for an H100."""
