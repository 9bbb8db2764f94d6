"""The mathematics of GPT and Retro on plain local tensors."""
