"""What a model's tokens say, kept in result files, compared and judged."""
