"""The LightningModules and LightningDataModules that ``train.py`` runs."""
