"""The models and their adapters: loaded with every choice checked, and saved so that any stock tool loads them."""
