"""Kiln's core: what a build is, and everything that stands below workflows and HTTP."""

__version__ = "0.1.0"
