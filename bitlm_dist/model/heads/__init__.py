"""Diffusion heads: they denoise the M x K bits of a block, given the states of the block before."""
