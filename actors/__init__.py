"""Processes: controller, expert shards, attention workers, gateway, links, command line."""
