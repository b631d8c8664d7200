"""The controller: which shards and workers there are, and which placement is in force."""
