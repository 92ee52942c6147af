"""Leakage audit of federated updates (arXiv 2202.06924): see README.md in this folder."""
