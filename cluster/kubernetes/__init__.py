"""Decisions about objects of Kubernetes: what to apply, what a live one keeps, what pods and kubectl complain of."""
