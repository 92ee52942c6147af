"""Acceptance by attack: win the masked model back, find the decoys, and compare with honest references."""
