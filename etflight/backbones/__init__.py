"""Backbones registered in timm."""
