"""Pretrained networks that come inside packages, and the text that they are measured on. Nothing is downloaded."""
