"""A fleet in virtual time: the real decisions about placement, on replayed or made-up traffic, by the cost model."""
