"""Audits: choose methods, spend the budget, gather findings into a document."""

from patchclamp.audit.run import audit, problems

__all__ = ["audit", "problems"]
