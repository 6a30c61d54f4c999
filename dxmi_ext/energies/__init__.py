"""The task of few-step samplers of a given energy."""
