"""The expert shard: slots of expert weights, and the server that runs them for packets."""
