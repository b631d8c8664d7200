"""GPU kernels, compiled at first use."""
