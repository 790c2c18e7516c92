"""Kernels for one kind of GPU, one file each, and beside each how it is reached. Experimental: none was timed yet."""
