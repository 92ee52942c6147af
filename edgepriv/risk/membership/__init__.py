"""Membership inference: who was in the training set, told from scores or from a released set.

Everything but ``classifier``, ``shadows`` and ``models`` is numpy on arrays of scores and membership masks, so any
model that gives scores can be audited. ``audit`` runs every attack that the arrays allow and names the strongest.
"""
