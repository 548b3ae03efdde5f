"""Bits a dimension, and the same bits as they are sent from coarse to fine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine import Model
from ..losses import normal_kl
from ..sampler import Progress
from ..schedule import Schedule, check_int
from .reader import Reader


@dataclass(frozen=True, eq=False)
class BitsPerDim:
    """The variational bound of each image, in bits a dimension, and how far the predicted x0 was off.

    x_t is the paper's x_{t+1}, and column t what the paper calls L_t. OpenAI's `calc_bpd_loop` has the same
    columns from T - 1 down.

    Attributes:
        total: (B,), ``prior + vb.sum(1)``: at least ``-log2 p(x0) / D`` on average over the noise (eq. 5).
        prior: (B,), ``KL(q(x_{T-1} | x0) || N(0, I))``: what it costs to send the noisiest x.
        vb: (B, T): at t > 0 ``KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t))``, at 0 ``-log2 p(x0 | x_t)``.
        x0_mse: (B, T), the mean squared error of the x0 that is predicted (and clipped) at t.
        mse: (B, T), of the noise that goes with this x0: SNR times as much.
    """

    total: Tensor
    prior: Tensor
    vb: Tensor
    x0_mse: Tensor
    mse: Tensor

    @property
    def rate(self) -> Tensor:
        """(B, T): the bits a dimension that were sent when the receiver has x_t (algorithms 3 and 4).

        That is the prior and the columns of vb above t. To make of the last x0 the true one takes
        ``vb[:, 0]`` more.
        """
        sent = self.vb.flip(1).cumsum(1).flip(1)
        return self.prior[:, None] + sent - self.vb

    @property
    def distortion(self) -> Tensor:
        """(B, T): how far off the receiver's x0 then is, root mean square in levels of [0, 255]."""
        return 127.5 * self.x0_mse.sqrt()


@dataclass(frozen=True, eq=False)
class Progressive:
    """Progressive lossy decoding: ``bits.rate`` and ``bits.distortion``, and pictures of it.

    Attributes:
        bits: of the whole process.
        timesteps: (K,) int64.
        x0: (B, K, ...), what a receiver who has x_t predicts, at each of the timesteps.
    """

    bits: BitsPerDim
    timesteps: Tensor
    x0: Tensor


def bits_per_dim(
    model: Model,
    schedule: Schedule,
    x0: Tensor,
    *,
    prediction: str = "epsilon",
    variance: str = "fixed_small",
    clip: float | None = 1.0,
    seed: int = 0,
    first_image: int = 0,
    class_labels: Tensor | None = None,
    batch_size: int = 128,
    progress: bool | Progress = False,
) -> BitsPerDim:
    """How many bits a dimension the model needs for each image: an upper bound, one noise for each term.

    The decoder at t = 0 is that of 8-bit images, levels k / 127.5 - 1, each with a bin of 2 / 255 (section
    3.3). Of images with fewer levels in [-1, 1], as the 17 of the bundled digits, it is a bound still, but a
    loose one: what the model gives to the gaps between the bins is lost. Compare it with its like only.

    Noise is the counter's, of (seed, image, t): an image's bits do not depend on the batch, but for the
    rounding of the model. Of each of the B T pairs of an image and a time the model is called once, in
    batches; the host waits for none.

    Args:
        model: ``model(x, t)``, or ``model(x, t, class_labels)``. A module runs in eval mode.
        schedule: the T steps that the model was trained with, all of which are taken.
        x0: (B, ...) float32 or float64 in [-1, 1], where the model is; at least two dimensions.
        prediction, variance: see `steps.ddpm`. The bound belongs to a variance: "fixed_large" has another.
        clip: bound of the absolute value of the predicted x0, a number or None.
        seed, first_image: sample b is image ``first_image + b`` of this 64-bit seed.
        class_labels: B entries, handed to the model.
        batch_size: pairs at a time.
        progress: show a bar on stderr; or a function that shows one, as ``tqdm.tqdm``, given the batches.

    Returns:
        In x0's dtype, on its device.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, shape or range, or an unknown name, before any
            work; a model whose output does not fit.
    """
    reader = Reader(
        model, schedule, x0, prediction, variance, clip, seed, first_image, class_labels, batch_size, progress
    )
    return _bits(reader)


def progressive(
    model: Model,
    schedule: Schedule,
    x0: Tensor,
    timesteps: Sequence[int] = (),
    *,
    prediction: str = "epsilon",
    variance: str = "fixed_small",
    clip: float | None = 1.0,
    seed: int = 0,
    first_image: int = 0,
    class_labels: Tensor | None = None,
    batch_size: int = 128,
    progress: bool | Progress = False,
) -> Progressive:
    """Send images from coarse to fine: at each t the bits so far, and the error of x0 so far (section 4.3).

    As in the paper's code x_t is drawn from x0 anew at each t, rather than along one chain: each rate and
    each distortion is then the same on average.

    Args:
        timesteps: in [0, T): those whose predicted x0 is kept, for a picture.
        others: see `bits_per_dim`.

    Raises:
        TypeError, ValueError: as `bits_per_dim`; a timestep outside [0, T).
    """
    reader = Reader(
        model, schedule, x0, prediction, variance, clip, seed, first_image, class_labels, batch_size, progress
    )
    kept = [check_int(f"timesteps[{k}]", t, 0, schedule.T - 1) for k, t in enumerate(timesteps)]
    chosen = torch.tensor(kept, dtype=torch.int64, device=x0.device)
    found = x0.new_empty(len(kept) * len(x0), *x0.shape[1:])
    with reader.running():
        for place, t, image in reader.pairs(chosen, False):
            found[place] = reader.read(t, image).x0
    return Progressive(_bits(reader), chosen, found.unflatten(0, (len(kept), len(x0))).transpose(0, 1))


def _bits(reader: Reader) -> BitsPerDim:
    """All of it, from every pair."""
    x0, schedule = reader.x0, reader.schedule
    found = x0.new_empty(2, schedule.T * len(x0))
    with reader.running():
        for place, t, image in reader.pairs(torch.arange(schedule.T, device=x0.device), reader.progress):
            found[:, place] = torch.stack(reader.terms(t, image))
    nats, x0_mse = found.reshape(2, schedule.T, len(x0)).transpose(1, 2).contiguous()
    vb = nats / math.log(2)
    mse = x0_mse * torch.tensor(schedule.snr, dtype=x0.dtype, device=x0.device)

    apart = float(schedule.sqrt_alphas_cumprod[-1]) * x0.double()
    log_var = apart.new_tensor(schedule.log_one_minus_alphas_cumprod[-1])
    prior = normal_kl(apart, log_var, torch.zeros_like(log_var)).flatten(1).mean(1).to(x0.dtype)
    prior = prior / math.log(2)
    return BitsPerDim(prior + vb.sum(1), prior, vb, x0_mse, mse)
