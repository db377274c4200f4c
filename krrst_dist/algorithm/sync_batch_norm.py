"""Batch norm over the images of all data-parallel workers, and the differentiable sum behind it.

Why it exists: `torch.nn.SyncBatchNorm` runs on CUDA only, and a run on CPUs (gloo) should compute what a run on
GPUs (NCCL) computes. It knows the default process group of `torch.distributed`, or that there is none; nothing of
networks or of who started the workers.

Convention for gradients: every worker holds the same loss (made of sums over all workers), and the workers'
gradients are averaged afterwards. The backward pass of a sum is therefore the sum of the workers' gradients.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm


def world_size() -> int:
    """Workers in the default process group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This worker's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _AllReduceSum.apply(gradient)


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of x over the workers, differentiable; x itself for a single worker."""
    return x if world_size() == 1 else _AllReduceSum.apply(x)


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [c], variance [c] (divided by the count) and count [] of x [n, c, ...] per channel, over all workers; differentiable.

    Workers may hold different numbers of images. The workers' moments are combined around the common mean (no
    difference of large squares), from one collective: a sum of [workers, 2c + 1] tables that are zero except for the own row.
    """
    variance, mean = torch.var_mean(x, dim=[d for d in range(x.dim()) if d != 1], correction=0)  # [c], [c]
    count = mean.new_full((1,), x.numel() / x.shape[1])
    if world_size() == 1:
        return mean, variance, count[0]
    row = torch.cat([mean, variance, count])  # [2c + 1]
    table = all_reduce_sum(functional.pad(row[None], (0, 0, rank(), world_size() - rank() - 1)))  # [workers, 2c + 1]
    means, variances = table[:, : x.shape[1]], table[:, x.shape[1] : -1]  # [workers, c] each
    total = table[:, -1].sum()
    share = table[:, -1:] / total  # [workers, 1]
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0), total


class SyncBatchNorm(_BatchNorm):
    """Batch norm of [n, c, ...] with the statistics of all workers' images; plain batch norm for a single worker.

    The state dict is that of `nn.BatchNorm2d`. Statistics are computed in float32, whatever the input's type.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected [n, c, ...], got shape {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        """[n, c, ...] -> the same shape and type."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            values = x if x.dtype == torch.float64 else x.float()
            mean, variance, count = moments(values)
            self._update_running(mean.detach(), variance.detach(), count)
            scale = (variance + self.eps).rsqrt()  # [c]
            scale = scale if self.weight is None else scale * self.weight
            shift = -mean * scale if self.bias is None else self.bias - mean * scale
            channels = [1, -1, *[1] * (x.dim() - 2)]
            return torch.addcmul(shift.view(channels), values, scale.view(channels)).to(x.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), self.momentum)


def synchronise(module: nn.Module) -> nn.Module:
    """Replace every batch norm inside `module` by a synchronised one with the same weights and state-dict keys; returns it.

    They must track running statistics, as torch's do unless told otherwise.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            like = {"device": child.running_mean.device, "dtype": child.running_mean.dtype}
            sync = SyncBatchNorm(child.num_features, child.eps, child.momentum, child.affine, **like)
            sync.load_state_dict(child.state_dict())
            setattr(module, name, sync.train(child.training))
        else:
            synchronise(child)
    return module
