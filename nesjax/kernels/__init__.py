"""Kernels for one kind of GPU, one file each, which a family's `fused=True` asks for. Experimental: not yet timed.

A kernel takes what defines it as an argument, the same by XLA, and leaves to it all that it isn't made for. It ends
with the noise: bias and activation are XLA's. Taken along they would save a pass over the activations, but a value that
waits for them is multiplied anew at each of its uses (`gelu` has four), and a member's bias is an array by then.
"""
