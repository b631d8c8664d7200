"""A fleet in virtual time: the real decisions about placement, on traffic replayed or made up, against the cost model."""
