"""The variational bound, and the losses of training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...losses import Loss
from .kinds import LossType, ModelMeanType, ModelVarType
from .losses import discretized_gaussian_log_likelihood, normal_kl
from .nn import mean_flat
from .process import Kwargs, Model, Process, Terms, index


class Bound(Process):
    """The methods of `GaussianDiffusion` that measure."""

    def _vb_terms_bpd(
        self,
        model: Model,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Kwargs = None,
    ) -> Terms:
        """The term of the bound at t in bits a dimension (Ho et al. 2020, eq. 5; at t = 0, eq. 13): a dict of
        ``output`` (B,) and ``pred_xstart``."""
        true_mean, _, true_log = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        out = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        apart = true_mean - out["mean"]
        if self._is_ours("p_mean_variance") and self.model_mean_type is not ModelMeanType.PREVIOUS_X:
            # Both means have the same part of x_t, in whose rounding a small difference would drown.
            apart = x_start - out["pred_xstart"]
            apart = self._at("posterior_mean_coef1", t, apart) * apart
        kl = normal_kl(apart, true_log, 0.0, out["log_variance"])
        likelihood = discretized_gaussian_log_likelihood(
            x_start, means=out["mean"], log_scales=0.5 * out["log_variance"]
        )
        nats = torch.where(t == 0, -mean_flat(likelihood), mean_flat(kl))
        return {"output": nats / math.log(2), "pred_xstart": out["pred_xstart"]}

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: Kwargs = None,
        noise: Tensor | None = None,
    ) -> Terms:
        """The loss of each sample: a dict of ``loss`` (B,), of ``mse`` unless it is the bound alone, and of
        ``vb`` where a variance is learned beside it, with the mean held fixed.

        Raises:
            AssertionError: as `p_mean_variance`.
            NotImplementedError: an unknown loss type.
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise=noise)
        if self.loss_type.is_vb():
            scale = self.num_timesteps if self.loss_type is LossType.RESCALED_KL else 1
            if not self._is_ours("_vb_terms_bpd", "p_mean_variance"):
                bound = self._vb_terms_bpd(model, x_start, x_t, t, False, model_kwargs)["output"]
            else:
                x_t, out, _ = self._evaluate(model, x_t, t, model_kwargs)
                bound = self._bound(x_t, out, x_start, t, noise)
            return {"loss": bound * scale}
        if self.loss_type not in (LossType.MSE, LossType.RESCALED_MSE):
            raise NotImplementedError(self.loss_type)
        x_t, out, _ = self._evaluate(model, x_t, t, model_kwargs)
        return self._squared_error(x_t, out, x_start, t, noise)

    def _squared_error(self, x_t: Tensor, out: Tensor, x_start: Tensor, t: Tensor, noise: Tensor) -> Terms:
        C, terms = x_t.shape[1], {}
        predicted, v = out[:, :C], out[:, C:]
        if self._learned:
            bound = self._bound(x_t, torch.cat([predicted.detach(), v], dim=1), x_start, t, noise)
            # As in the first implementation, where otherwise the bound hurt the rest.
            scale = self.num_timesteps / 1000 if self.loss_type is LossType.RESCALED_MSE else 1
            terms["vb"] = bound * scale
        target = {"epsilon": noise, "x0": x_start}.get(self._prediction)
        if target is None:
            target = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)[0]
        terms["mse"] = mean_flat((target - predicted) ** 2)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def _bound(self, x_t: Tensor, out: Tensor, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """`_vb_terms_bpd`'s output where x_0 is not clipped, by `Loss`: from the error of what is predicted,
        in one pass, and exact where x_0 is a small difference of large numbers."""
        if not self._is_ours("_vb_terms_bpd", "p_mean_variance"):
            return self._vb_terms_bpd(lambda *_: out, x_start, x_t, t, clip_denoised=False)["output"]
        key = self.model_mean_type, self.model_var_type, x_t.device, x_t.dtype
        if key not in self._losses:
            with torch.inference_mode(False):
                self._losses[key] = self._loss(x_t)
        return self._losses[key](lambda *_: out, x_start.to(x_t), index(t, x_t), noise=noise.to(x_t))

    def _loss(self, x: Tensor) -> Loss:
        variance = "learned_range" if self._learned else self.model_var_type.name.lower()
        where = {"device": x.device, "dtype": x.dtype}
        loss = Loss(self._schedule, self._prediction, kind="kl", variance=variance, **where)
        if self.model_var_type is ModelVarType.LEARNED:  # v itself, as the logs of the range are -1 and 1
            loss.bound[:, 2:] = torch.tensor([-1.0, 1.0])
        return loss

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, 1)) in bits a dimension, (B,): no model has a part in it."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, dtype=torch.int64, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2)

    def calc_bpd_loop(
        self, model: Model, x_start: Tensor, clip_denoised: bool = True, model_kwargs: Kwargs = None
    ) -> Terms:
        """The whole bound in bits a dimension, noise drawn by torch's own generator at every t.

        A dict of ``total_bpd`` and ``prior_bpd``, (B,); and of ``vb``, ``xstart_mse`` and ``mse`` (of eps),
        (B, T), the largest t first.
        """
        columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        snr = self._schedule.snr
        for i in range(self.num_timesteps)[::-1]:
            t = torch.full((len(x_start),), i, dtype=torch.int64, device=x_start.device)
            x_t = self.q_sample(x_start=x_start, t=t, noise=torch.randn_like(x_start))
            with torch.no_grad():
                out = self._vb_terms_bpd(
                    model, x_start, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs
                )
            of_x0 = mean_flat((out["pred_xstart"] - x_start) ** 2)
            columns["vb"].append(out["output"])
            columns["xstart_mse"].append(of_x0)
            columns["mse"].append(of_x0 * snr[i])  # eps - noise = sqrt(snr) (x0 - pred_xstart)
        terms = {name: torch.stack(column, dim=1) for name, column in columns.items()}
        prior = self._prior_bpd(x_start)
        return {"total_bpd": terms["vb"].sum(dim=1) + prior, "prior_bpd": prior, **terms}
