"""A training that needs a package that is not installed."""

import fused_attention_kernels

fused_attention_kernels.train()
