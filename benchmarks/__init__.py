"""What nesjax costs and what its gradients are worth: `python -m benchmarks NAME [--quick]`."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))  # where what `faults`, say, checks stands
