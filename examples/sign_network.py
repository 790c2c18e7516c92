"""A network of hard thresholds learns scikit-learn's handwritten digits: every hidden unit is `sign(x @ w + b)`.

Its derivative is zero wherever it exists, so there is nothing to backpropagate. With `credit="inputs"` only the part
of a member's noise that its one sample could feel is credited with its loss, and several times fewer evaluations do.

Expected: over 95 % held-out accuracy (seeds 0 to 3: 95.6, 95.8, 95.3, 96.4) in under a minute on two CPU cores.
The plain estimate reaches 79 % with the same settings, and 89 % in 1,000 generations of Adam 0.003.

    python examples/sign_network.py --seed 0
    python examples/sign_network.py --seed 0 --plain --out runs/plain      # the same without credit
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import run
from digits import load

import nesjax

GROUP = 8  # members that share a sample


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = jnp.sign(nn.Dense(256)(x))
        return nn.Dense(10)(x)


def main():
    parser = run.options(__doc__, steps=300, minutes=5)
    parser.add_argument("--population", type=int, default=1024, help=f"members, a multiple of {GROUP}")
    parser.add_argument("--plain", action="store_true", help="without credit")
    args = run.parse(parser)

    (images, labels), (test_images, test_labels) = load(args.seed)
    net, key = Net(), jax.random.key(args.seed)

    def loss_fn(params, x, y):  # one network, one sample
        return optax.softmax_cross_entropy_with_integer_labels(net.apply(params, x), y)

    population = run.population(parser, args.population, std=0.03, group_size=GROUP)
    optimizer = optax.contrib.muon(optax.cosine_decay_schedule(0.02, args.steps), adam_b2=0.99)
    state = nesjax.TrainState.create(params=net.init(key, images[:1]), optimizer=optimizer, key=key)
    credit = None if args.plain else "inputs"
    step = nesjax.make_train_step(loss_fn, optimizer, population, in_axes=0, credit=credit)

    @jax.jit
    def batch(step):  # a sample of its own for each group of members
        rows = jax.random.randint(jax.random.fold_in(key, step), (args.population // GROUP,), 0, len(images))
        return images[rows], labels[rows]

    @jax.jit
    def accuracy(state):
        return {"held-out accuracy": (net.apply(state.params, test_images).argmax(-1) == test_labels).mean()}

    title = f"Thresholds, {args.population} members"
    _, figures = run.train(args, state, step, population, inputs=batch, evaluate=accuracy, every=50, title=title)
    print(f"held-out accuracy {figures['held-out accuracy']:.4f}")


if __name__ == "__main__":
    main()
