"""CPU kernels, compiled at first use."""
