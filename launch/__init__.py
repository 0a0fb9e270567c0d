"""Rank discovery, and supervised jobs on Slurm or on one machine."""
