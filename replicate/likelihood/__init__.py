"""Estimators of log p and log Z, each with its kind and error."""
