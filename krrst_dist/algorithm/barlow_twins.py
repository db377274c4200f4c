"""Barlow Twins (Zbontar et al. 2021): how the self-supervised target model g_phi is trained, on 1..N data-parallel workers.

Pure PyTorch: it sees uint8 images, and the default process group of `torch.distributed` if there is one. It does not know
where images come from, who started the workers, or where checkpoints are kept.

The number of workers changes rounding only. The global batch is fixed; what is random is drawn for the global batch from
(seed, step), and every worker uses the rows of its own images; batch norm and the cross-correlation are sums over all
workers; gradients are averaged in one flat vector (not in `DistributedDataParallel`'s buckets, whose order of summation
changes after the first step, so that a resumed run would differ from an uninterrupted one).

Letters: b images of the global batch, b_w those of this worker, k feature width, p projector width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from krrst_dist.algorithm.shard import DivergedError
from krrst_dist.algorithm.sync_batch_norm import SyncBatchNorm, all_reduce_sum, moments, rank, synchronise, world_size
from krrst_dist.augment import ssl_pair
from krrst_dist.networks import Network
from krrst_dist.seeds import seeded, torch_rng


def barlow_twins(z_a: Tensor, z_b: Tensor, off_diagonal: float) -> Tensor:
    """The Barlow Twins loss of two views' embeddings [b_w, p], a scalar that is the same on all workers.

    Each dimension is standardised over the global batch (eps 1e-5 beside the variance, as in batch norm);
    C = z_a^T z_b / b [p, p]; loss = sum_i (1 - C_ii)^2 + off_diagonal * sum_{i != j} C_ij^2 (equation 1 of the paper).
    """
    (mean_a, variance_a, count), (mean_b, variance_b, _) = moments(z_a), moments(z_b)
    z_a = (z_a - mean_a) * (variance_a + 1e-5).rsqrt()
    z_b = (z_b - mean_b) * (variance_b + 1e-5).rsqrt()
    correlation = all_reduce_sum(z_a.T @ z_b) / count  # [p, p]
    diagonal = correlation.diagonal()
    return (1 - diagonal).square().sum() + off_diagonal * (correlation.square().sum() - diagonal.square().sum())


def projector(features: int, widths: Sequence[int]) -> nn.Sequential:
    """Linear, batch norm, ReLU for every width but the last, which is linear alone (no biases)."""
    layers: list[nn.Module] = []
    for width in widths[:-1]:
        layers += [nn.Linear(features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, widths[-1], bias=False))


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int) -> float:
    """Learning rate of step 0, 1, ... steps - 1: linear warm-up to `peak`, then a cosine to 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak / 2 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def worker_rows(batch: int) -> slice:
    """The rows of a global batch that are this worker's."""
    return slice(batch * rank() // world_size(), batch * (rank() + 1) // world_size())


class TwinsTrainer:
    """The state of a training (network, projector, AdamW's moments, steps done) and its one step.

    `network` maps normalised images [b, C, H, W] to features [b, network.feature_dim]; its batch norms are made synchronous and
    its weights trained, in place. Matrices and kernels decay, biases and norms do not;
    a bias that the batch norm behind it subtracts again stays as it is. On CUDA devices that have it the
    forward pass runs in bfloat16 (the loss in float32). Not yet run on several GPUs.
    """

    def __init__(self, network: Network, *, projector_widths: Sequence[int], batch: int, steps: int, lr: float, warmup_steps: int,
                 weight_decay: float, off_diagonal: float, mean: Sequence[float], std: Sequence[float], seed: int,
                 device: torch.device | str = "cpu"):
        self.device, self.batch, self.steps, self.seed, self.off_diagonal = torch.device(device), batch, steps, seed, off_diagonal
        self._rate = {"peak": lr, "warmup_steps": warmup_steps, "steps": steps}
        with seeded(seed, "projector"):
            head = projector(network.feature_dim, projector_widths)
        self.network = network
        self.model = synchronise(nn.Sequential(network, head)).to(self.device, memory_format=torch.channels_last)
        freeze_idle_biases(self.model)
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [{"params": [p for p in self._trained if p.dim() > 1], "weight_decay": weight_decay},
                  {"params": [p for p in self._trained if p.dim() == 1], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
        self._mean, self._std = (torch.tensor(values, device=self.device).view(-1, 1, 1) for values in (mean, std))  # [C, 1, 1] each
        self.done = 0
        """steps done"""

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        return self.optimizer.param_groups[0]["lr"]

    def step(self, images: Tensor) -> Tensor:
        """One optimiser step on this worker's rows of the global batch, uint8 [b_w, C, H, W]. Returns the loss, a scalar on the device."""
        self.model.train()
        view_a, view_b = self._views(images.to(self.device))
        bfloat16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            z_a, z_b = self.model(view_a), self.model(view_b)  # [b_w, p] each
        loss = barlow_twins(z_a.float(), z_b.float(), self.off_diagonal)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self._trained)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.done, **self._rate)
        self.optimizer.step()
        self.done += 1
        return loss.detach()

    def _views(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Two augmented, normalised views of this worker's images, [b_w, C, H, W] each."""
        drawn = ssl_pair.draw(self.batch, images.shape[-1], torch_rng(self.seed, "ssl", self.done))[worker_rows(self.batch)]
        view_a, view_b = ssl_pair.apply(images.float() / 255, drawn)
        return self._normalise(view_a), self._normalise(view_b)

    def _normalise(self, view: Tensor) -> Tensor:
        return ((view - self._mean) / self._std).contiguous(memory_format=torch.channels_last)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the next step depends on, as a flat dict of tensors (safetensors takes it)."""
        moments_of = self.optimizer.state_dict()["state"]  # {parameter's number: {"step", "exp_avg", "exp_avg_sq"}}
        tensors = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        tensors |= {f"optimizer.{number}.{key}": value for number, values in moments_of.items() for key, value in values.items()}
        return {key: value.contiguous() for key, value in tensors.items()} | {"done": torch.tensor(self.done)}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Continue where `state_dict` was taken."""
        self.model.load_state_dict({key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")})
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, number, name = key.split(".")
                like = parameters[int(number)] if value.dim() else value  # in the weights' memory layout: the fused kernel goes by address
                state.setdefault(int(number), {})[name] = torch.empty_like(like, dtype=value.dtype).copy_(value)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        self.done = int(tensors["done"])


def freeze_idle_biases(model: nn.Module) -> None:
    """Leave out of the training every bias that a batch norm right behind it subtracts again.

    It has no effect and its gradient is 0 up to rounding, but AdamW would scale that rounding up to steps of full size.
    """
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            for layer, norm in pairwise(module):
                if isinstance(norm, SyncBatchNorm) and getattr(layer, "bias", None) is not None:
                    layer.bias.requires_grad_(False)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the workers; nothing to do for a single one."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def train(trainer: TwinsTrainer, batches: Callable[[int], Tensor], *,
          after_step: Callable[[int, Tensor], None] = lambda done, loss: None) -> None:
    """Train until `trainer.steps` are done, from wherever the trainer stands.

    `batches(step)` gives this worker's rows (`worker_rows`) of the global batch, uint8 [b_w, C, H, W]: a pure function of the step.
    `after_step(done, loss)` is called on every worker; the loss is the global batch's.

    Raises:
        DivergedError: the loss is NaN or infinite.
    """
    while trainer.done < trainer.steps:
        loss = trainer.step(batches(trainer.done))
        if not torch.isfinite(loss):
            raise DivergedError(f"the Barlow Twins loss is {loss.item()} at step {trainer.done}: lower target.lr or lengthen "
                                f"target.warmup_steps")
        after_step(trainer.done, loss)
