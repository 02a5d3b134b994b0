"""megatron_klear: Megatron-style training of long-reasoning models with SFT and GPPO."""

__version__ = "0.1.0"
