"""Hydra configs, shipped as ``tgmm_nn.configs``: ``pkg://tgmm_nn.configs`` on a search path of your own app."""
