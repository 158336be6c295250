"""Weights as Megatron-Core saves them: iter_*/mp_rank_*/model_optim_rng.pt."""
