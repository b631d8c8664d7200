"""What is timed. Each file is a command; results with their machine and versions are kept in results/."""
