"""Which parallelism, on which hardware, and why: a cost model of one step, and a choice among plans by it."""
