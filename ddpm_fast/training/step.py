"""One update of a model: loss, gradients, clip, optimizer; as it is, or captured as one compiled graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..losses import Loss
from ..ops import as_image_index, as_seed
from ..reference import q_sample
from ..schedule import check_number

__all__ = ["TrainStep"]


# Plain operations, in a compiled graph: inductor fuses them with what reads x_t, and a kernel it could not.
FUSED = {getattr(torch.ops.ddpm_fast, op).default: q_sample for op in ("q_sample", "q_sample_forward")}


class TrainStep:
    """``step(x0, t) -> (loss, norm)``: one update of the model, and nothing in it asks the host.

    Equivalent to::

        mean = loss(model, x0, t, **given).mean()
        mean.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)     # the optimizer's
        optimizer.step()
        optimizer.zero_grad()

    With ``compile=True`` the update is traced once for each shape of its arguments, from the noise to the
    optimizer, and compiled as one graph: what the model decides in Python is frozen then, as in a CUDA graph,
    while all tensors are read and written in place. A small network, whose time goes into launching ops,
    gains most. The first update runs as it is, so that the optimizer makes its own state, which stays the
    only one: checkpoints are those of the optimizer.

    Args:
        model: ``model(x_t, t) -> out``, in train mode if it has one.
        loss: see `Loss`.
        optimizer: over the model's parameters. To compile: torch's Adam or AdamW.
        clip: bound of the norm of all gradients together; None: they are not clipped.
        compile: trace and compile, which takes some seconds for a small network and far longer for a U-Net.
            The second update raises what inductor raises where there is no C++ compiler.
        autocast: the dtype of ``torch.autocast`` around the model, bfloat16 or None.
        observe: is given t and each sample's loss, unweighted and detached, of every part of an update. Not
            with ``compile``.

    Raises:
        TypeError, ValueError: an argument of a wrong kind; an optimizer, or an option of it, that ``compile``
            does not know.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float | None = None,
        compile: bool = False,
        autocast: torch.dtype | None = None,
        observe: Callable[[Tensor, Tensor], object] | None = None,
    ) -> None:
        for name, value, kind in (
            ("model", model, nn.Module),
            ("loss", loss, Loss),
            ("optimizer", optimizer, torch.optim.Optimizer),
            ("compile", compile, bool),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}")
        if clip is not None:
            clip = check_number("clip", clip, lambda clip: clip > 0, "None or above 0")
        if autocast not in (None, torch.bfloat16):
            raise ValueError(f"autocast must be None or bfloat16, got {autocast}")
        if compile:
            if observe is not None:
                raise ValueError("compile=True takes no observe: the losses of the samples stay in the graph")
            _check_adam(optimizer)
        self.model, self.loss, self.optimizer, self.clip, self.compile = model, loss, optimizer, clip, compile
        self.autocast, self.observe = autocast, observe
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._compiled: dict[Any, _Compiled] = {}

    def __call__(
        self,
        x0: Tensor,
        t: Tensor,
        *,
        noise: Tensor | None = None,
        seed: int | Tensor | None = None,
        image_index: int | Tensor | None = None,
        class_labels: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One update; the mean loss and the norm of the gradients before the clip, 0-d, on the device.

        Args:
            x0, t, noise, seed, image_index, class_labels: see `Loss`.
            weight: (B,), of each sample's loss in the mean, as `SecondMomentSampler` returns it.
        """
        if seed is not None and image_index is not None:  # tensors: a number would be frozen in the graph
            seed = as_seed(seed, len(x0), x0.device)
            image_index = as_image_index(image_index, len(x0), x0.device)
        given = {
            "noise": noise,
            "seed": seed,
            "image_index": image_index,
            "class_labels": class_labels,
            "weight": weight,
        }
        given = {"x0": x0, "t": t} | {name: value for name, value in given.items() if value is not None}
        if not self.compile or not self.optimizer.state:
            return self.backward(**given), self.finish()
        key = (
            *((name, value.shape, value.dtype, value.stride()) for name, value in given.items()),
            self.model.training,
            torch.is_autocast_enabled(x0.device.type),
        )
        if key not in self._compiled:
            self._compiled[key] = _Compiled(self, given)
        return self._compiled[key](given)

    def backward(self, x0: Tensor, t: Tensor, *, share: float = 1.0, **given: Any) -> Tensor:
        """Add the gradients of ``share`` times the mean loss, and return that, 0-d.

        An update of several parts, whose gradients do not fit in memory at once, is a call for each, with
        shares that add up to 1, and then `finish`.
        """
        mean = share * self.mean(self.model, x0, t, **given)
        mean.backward()
        return mean.detach()

    def finish(self) -> Tensor:
        """Clip the gradients that were added, and let the optimizer move; returns their norm before."""
        if self.clip is None:
            gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        else:
            norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def mean(
        self,
        model: Callable[..., Tensor],
        x0: Tensor,
        t: Tensor,
        *,
        weight: Tensor | None = None,
        **given: Any,
    ) -> Tensor:
        """The loss that is descended, 0-d."""
        with torch.autocast(x0.device.type, self.autocast, enabled=self.autocast is not None):
            losses = self.loss(model, x0, t, **given)
        if self.observe is not None:
            self.observe(t, losses.detach())
        return (losses if weight is None else weight * losses).mean()


class _Compiled:
    """The update for arguments of one shape, on the model's and the optimizer's own tensors."""

    def __init__(self, step: TrainStep, given: dict[str, Tensor]) -> None:
        self.step, self.names = step, tuple(given)
        self.state = step.optimizer.state
        members = [
            (parameter, g)
            for g, group in enumerate(self.groups)
            for parameter in group["params"]
            if parameter in self.state  # those that had a gradient
        ]
        self.parameters, self.group_of = zip(*members, strict=True)
        device = given["x0"].device
        self.rates: list[float | None] = [None] * len(self.groups)
        self.own = {
            "rates": [torch.zeros((), device=device) for _ in self.groups],
            "scales": torch.zeros(len(members), 2, device=device),
        }
        self._gather()
        self._set_rates()
        self.run = self._compile(given)

    def __call__(self, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if self.state is not self.step.optimizer.state:  # another was loaded
            self.state = self.step.optimizer.state
            self._gather()
        self._set_rates()
        with torch.no_grad():
            mean, norm = self.run(*self.tensors, *given.values())
        return mean, norm

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.step.optimizer.param_groups

    def _gather(self) -> None:
        tensors = {
            "parameters": [parameter.detach() for parameter in self.parameters],
            "buffers": list(self.step.model.buffers()),
            **{
                name: [self.state[parameter][name] for parameter in self.parameters]
                for name in ("step", "exp_avg", "exp_avg_sq")
            },
            **self.own,
        }
        self.tensors, self.layout = tree_flatten(tensors)

    def _set_rates(self) -> None:
        for k, group in enumerate(self.groups):
            rate = group["lr"]
            if isinstance(rate, Tensor):
                self.own["rates"][k].copy_(rate)
            elif rate != self.rates[k]:
                self.rates[k] = rate
                self.own["rates"][k].fill_(rate)

    def _compile(self, given: dict[str, Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
        """Traced with tensors that hold no values: nothing is changed and no number drawn."""

        def update(*flat: Tensor) -> tuple[Tensor, Tensor]:
            tensors = tree_unflatten(flat[: len(self.tensors)], self.layout)
            return self._update(tensors, dict(zip(self.names, flat[len(self.tensors) :], strict=True)))

        arguments = [*self.tensors, *given.values()]
        with torch.enable_grad():
            graph = make_fx(update, FUSED, "fake", _allow_non_fake_inputs=True)(*arguments)
        return torch._inductor.compile(graph, arguments)

    def _update(self, tensors: dict[str, Any], given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        model, step = self.step.model, self.step
        leaves = [p.detach().requires_grad_() for p in tensors["parameters"]]
        by_object = dict(zip(map(id, self.parameters), leaves, strict=True))
        values = {name: by_object.get(id(p), p) for name, p in model.named_parameters()}
        values |= dict(zip((name for name, _ in model.named_buffers()), tensors["buffers"], strict=True))
        mean = step.mean(lambda *args: functional_call(model, values, args), **given)
        gradients = torch.autograd.grad(mean, leaves)
        with torch.no_grad():
            norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
            norm = torch.linalg.vector_norm(torch.stack(norms))
            if step.clip is not None:
                bound = (step.clip / (norm + 1e-6)).clamp(max=1)
                gradients = [gradient * bound for gradient in gradients]
            self._adam(tensors, gradients)
        return mean.detach(), norm

    def _adam(self, tensors: dict[str, Any], gradients: Sequence[Tensor]) -> None:
        """Adam (Kingma & Ba 2015, algorithm 1), AdamW (Loshchilov & Hutter 2019, algorithm 2)."""
        rates, scales = tensors["rates"], []
        for count, g in zip(tensors["step"], self.group_of, strict=True):
            count.add_(1)
            beta1, beta2 = self.groups[g]["betas"]
            rate = rates[g] / -torch.expm1(count * math.log(beta1))
            scales.append(torch.stack([rate, (-torch.expm1(count * math.log(beta2))).rsqrt()]))
        # Through a buffer, so that a kernel reads them, rather than works them out again for each element.
        scales = tensors["scales"].copy_(torch.stack(scales))
        for k, g in enumerate(self.group_of):
            group, parameter, gradient = self.groups[g], tensors["parameters"][k], gradients[k]
            mean, square = tensors["exp_avg"][k], tensors["exp_avg_sq"][k]
            (beta1, beta2), decay = group["betas"], group["weight_decay"]
            if decay and group["decoupled_weight_decay"]:
                parameter.mul_(1 - rates[g] * decay)
            elif decay:
                gradient = gradient + decay * parameter
            mean.lerp_(gradient, 1 - beta1)
            square.lerp_(gradient * gradient, 1 - beta2)
            parameter.sub_(scales[k, 0] * mean / (square.sqrt() * scales[k, 1] + group["eps"]))


def _check_adam(optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        raise ValueError(f"compile=True takes torch's Adam or AdamW, got {type(optimizer).__name__}")
    for group in optimizer.param_groups:
        for name in ("amsgrad", "maximize", "differentiable"):
            if group[name]:
                raise ValueError(f"compile=True takes an optimizer without {name}")
        for parameter in group["params"]:
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"compile=True takes float32 or float64 parameters, got {parameter.dtype}")
            if parameter.device.type != "cpu" and not (group["capturable"] or group["fused"]):
                raise ValueError(f"compile=True on {parameter.device} takes an optimizer with fused=True")
