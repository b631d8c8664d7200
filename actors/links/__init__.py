"""Links: each joins exactly two ends; Gloo between CPUs, NCCL between GPUs."""
