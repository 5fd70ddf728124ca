"""Mirror of ``torch.distributed.elastic.agent``."""
