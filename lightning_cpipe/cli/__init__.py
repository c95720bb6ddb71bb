"""The command ``cpipe``."""
