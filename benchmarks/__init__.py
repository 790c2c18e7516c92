"""What nesjax costs and what its gradients are worth: `python -m benchmarks NAME [--quick]`."""
