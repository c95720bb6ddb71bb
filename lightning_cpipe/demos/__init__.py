"""Ordinary Lightning modules and data for the recipes; they know nothing of pipelines.

digits         classify scikit-learn's digits with a residual MLP
char_gpt       a small GPT that predicts the next character of English text
hf_causal_lm   any causal language model of ``transformers``
warm_up        AdamW with a linear warm-up, for both of them
"""
