"""How good are the generated digits? A classifier and a Frechet distance, beside the same of real digits.

    python examples/evaluate_digits.py [--checkpoint DIR] [--n 2000] [--dtype bfloat16] [--picture out.png]

For every method: the share of digits to which a classifier, trained on real ones, gives at least 0.9; the
class histogram; the Frechet distance to the training images in the space of their 24 principal components,
also of no more images than are held out, since it is biased by their number; and the median distance to the
nearest training image, relative to that of the held-out digits (well below 1 would mean copies). The held-out
real digits stand beside them. With a --dtype, what the U-Net runs in, its error beside float32 is told too.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from sklearn.decomposition import PCA
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from ddpm_fast import Sampler, UNet, checkpoint, pictures, to_uint8
from ddpm_fast.training.data import digits

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RUNS = (("ddpm", None), ("ddim", 50), ("dpm_solver", 20))


def flat(images: Tensor) -> np.ndarray:
    return images.reshape(len(images), -1).numpy()


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance of Gaussians fitted to the rows of a and b (Heusel et al. 2017, eq. 6)."""
    mean, cov_a, cov_b = a.mean(0) - b.mean(0), np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return float(mean @ mean + np.trace(cov_a + cov_b - 2 * root))


def nearest(images: np.ndarray, others: np.ndarray) -> float:
    """Median distance of an image to the nearest of the others."""
    return float(torch.cdist(torch.from_numpy(images), torch.from_numpy(others)).amin(1).median())


@torch.inference_mode()
def errors(model: UNet, low: UNet, exact: Sampler) -> np.ndarray:
    """Relative error (L2) of ``low`` beside ``model`` at each step but the first of a run on 64 digits."""
    dtype, found = next(low.parameters()).dtype, []
    steps = list(exact.trajectory(64, seed=0))
    for (_, _, x, _), (_, t, _, _) in pairwise(steps):
        out = model(x, t)
        found.append(float((low(x.to(dtype), t).float() - out).norm() / out.norm()))
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=checkpoint.DIGITS)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()

    (train, train_labels), (held_out, held_out_labels) = digits()
    classifier = MLPClassifier((256, 128), alpha=1e-2, max_iter=300, random_state=0)
    classifier.fit(flat(train), train_labels)
    print(f"classifier: {classifier.score(flat(held_out), held_out_labels):.1%} right on held-out digits")
    space = PCA(24, random_state=0).fit(flat(train))

    def report(name: str, images: Tensor, seconds: float | None = None) -> None:
        probability = classifier.predict_proba(flat(images))
        histogram = np.bincount(probability.argmax(1), minlength=10) / len(images)
        features, reference = space.transform(flat(images)), space.transform(flat(train))
        few = frechet(features[: len(held_out)], reference)
        copies = nearest(flat(images), flat(train)) / nearest(flat(held_out), flat(train))
        print(
            f"{name:16} {len(images):5} images  >= 0.9: {(probability.max(1) >= 0.9).mean():6.1%}  "
            f"least class {histogram.min():5.1%}  Frechet {frechet(features, reference):.3f} "
            f"({few:.3f} of {len(held_out)})  nearest {copies:.2f}"
            + ("" if seconds is None else f"  {seconds:.0f} s")
        )
        print("  classes " + " ".join(f"{share:5.1%}" for share in histogram))

    report("real, held out", held_out)
    model, schedule, settings = checkpoint.load(args.checkpoint)
    of_model = checkpoint.of_model(settings)
    for method, num_steps in RUNS:
        run = {"method": method, "num_steps": num_steps, **of_model}
        sampler = Sampler(model, schedule, dtype=DTYPES[args.dtype], **run)
        start = time.perf_counter()
        images = [
            sampler(min(250, args.n - first), seed=args.seed, first_image=first, progress=True)
            for first in range(0, args.n, 250)
        ]
        x = torch.cat(images)
        report(f"{method}/{len(sampler.table)}", x.clamp(-1, 1), time.perf_counter() - start)
        if args.dtype != "float32":
            low, middle, high = np.quantile(
                errors(model, sampler.model, Sampler(model, schedule, **run)), (0, 0.5, 1)
            )
            print(f"  error of the U-Net a step: median {middle:.1e}, {low:.1e} to {high:.1e}")
        if args.picture:
            out = args.picture.with_stem(f"{args.picture.stem}-{method}")
            pictures.write(to_uint8(x[:100]), out, "png-grid")


if __name__ == "__main__":
    main()
