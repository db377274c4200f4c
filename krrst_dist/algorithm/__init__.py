"""KRR-ST in pure PyTorch: no Ray, no FFCV, no files. Read `distill.py` beside Algorithm 1 of the paper."""

from krrst_dist.algorithm.contribution import Contribution, mean, total
from krrst_dist.algorithm.distill import distill
from krrst_dist.algorithm.meta_gradient import MetaGradient, meta_gradient
from krrst_dist.algorithm.outer import Outer, OuterOptimizer
from krrst_dist.algorithm.pool import DivergedError, ModelPool, PoolMember
from krrst_dist.algorithm.ridge import RidgeError, ridge_head, with_bias
from krrst_dist.algorithm.shard import Shard
from krrst_dist.algorithm.slices import Slice, SlicedShard, Solved

__all__ = ["Contribution", "DivergedError", "MetaGradient", "ModelPool", "Outer", "OuterOptimizer", "PoolMember", "RidgeError", "Shard",
           "Slice", "SlicedShard", "Solved", "distill", "mean", "meta_gradient", "ridge_head", "total", "with_bias"]
