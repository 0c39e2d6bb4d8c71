"""The operator: one mathematics (`outlook_attention`), several engines."""
