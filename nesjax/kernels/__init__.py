"""Kernels for one kind of GPU, one file each, which a family's `fused=True` asks for. Experimental: not yet timed.

A kernel takes what defines it as an argument, the same by XLA, and leaves to it all that it isn't made for.
"""
