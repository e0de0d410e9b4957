"""Frozen models as plain functions of tensors."""
