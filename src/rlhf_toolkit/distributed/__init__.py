"""Everything that knows about ranks. No other package imports DeepSpeed or ``torch.distributed``."""
