"""Decisions: placement, dispatch, scheduling. Pure: no Ray, torch, gRPC, clock or environment."""
