"""Files of answers: written in order, resumed after a stop, compared."""
