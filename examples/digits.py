"""An ordinary Flax network learns scikit-learn's handwritten digits by NES: no backpropagation anywhere.

Expected: 97.8 % held-out accuracy (median of seeds 0 to 4, none below 95) in under a minute on two CPU cores. The
settings were chosen on such splits. Writes the learning curve to `digits.png`.

    python examples/digits.py --family LowRank --population 2048 --seed 0
"""

import argparse
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import nesjax

matplotlib.use("Agg")
from matplotlib import pyplot as plt

GROUP, SAMPLES = 16, 32  # members that share samples, and how many


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(10)(x)


def load(seed: int):
    """Training and held-out images [n, 64] and labels [n], split 80 : 20."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels = jnp.asarray(images[order] / 16 - 0.3, jnp.float32), jnp.asarray(labels[order])
    return (images[360:], labels[360:]), (images[:360], labels[:360])


def train(state, step, batch, accuracy, steps: int, title: str, out: Path):
    """Trains with a progress bar, draws the learning curve into `out` and says how good the network became."""
    if out.suffix != ".png" or not out.parent.is_dir():
        raise SystemExit(f"argument --out: must be a .png file in an existing folder, got {out}")
    losses, accuracies = [], []
    progress = tqdm(range(steps))
    for at in progress:
        state, metrics = step(state, *batch(at))
        losses.append(float(metrics["loss"]))
        accuracies.append(float(accuracy(state.params)))
        progress.set_postfix(loss=f"{losses[-1]:.3f}", accuracy=f"{accuracies[-1]:.3f}")

    figure, left = plt.subplots(figsize=(6, 3.5), layout="constrained")
    left.plot(losses, "tab:blue")
    left.set(xlabel="generation", ylabel="population's mean loss", title=title)
    right = left.twinx()
    right.plot(accuracies, "tab:orange")
    right.set(ylabel="held-out accuracy", ylim=(0, 1))
    figure.savefig(out, dpi=120)
    print(f"held-out accuracy {accuracies[-1]:.4f} after {steps} generations; learning curve in {out}")


def main():
    families = {family.__name__: family for family in nesjax.FAMILIES}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=families, default="LowRank")
    parser.add_argument("--population", type=int, default=2048, help=f"members, a multiple of {GROUP}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--out", type=Path, default=Path("digits.png"))
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"argument --steps: must be at least 1, got {args.steps}")

    (images, labels), (test_images, test_labels) = load(args.seed)
    net, key = Net(), jax.random.key(args.seed)

    def loss_fn(params, x, y):  # one network, one batch: it knows nothing of populations
        return optax.softmax_cross_entropy(net.apply(params, x), optax.smooth_labels(jax.nn.one_hot(y, 10), 0.1)).mean()

    try:
        population = nesjax.Population(args.population, std=0.05, group_size=GROUP, noise=families[args.family]())
    except ValueError as error:
        parser.error(f"argument --population: {error}")
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, args.steps))
    state = nesjax.TrainState.create(params=net.init(key, images[:1]), optimizer=optimizer, key=key)
    step = nesjax.make_train_step(loss_fn, optimizer, population, shaping=nesjax.centered_rank, in_axes=0)

    @jax.jit
    def batch(step):  # samples of its own for each group of members
        drawn = jax.random.fold_in(key, step)
        rows = jax.random.randint(drawn, (args.population // GROUP, SAMPLES), 0, len(images))
        return images[rows], labels[rows]

    @jax.jit
    def accuracy(params):
        return (net.apply(params, test_images).argmax(-1) == test_labels).mean()

    train(state, step, batch, accuracy, args.steps, f"{args.family}, {args.population} members", args.out)


if __name__ == "__main__":
    main()
